"""Pictures before the first step: features of a frozen tower kept in a cache, and the projector's word alignment.

Joins the cache (`features.py`) and the alignment (`align.py`) to a run's records. Refuses to cache the features of a
tower that is trained, and to align with records that are not captions. Ranks share the features; the alignment, which
is one short training, is rank 0's, and the others get its projector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmit.data.image_identity import image_key
from mmit.data.sources import open_source
from mmit.errors import ConfigError, RecordError, located
from mmit.models.partition import shape, whole
from mmit.train.align import align_words
from mmit.train.features import FeatureCache, compute_features

if TYPE_CHECKING:
    from mmit.data.dataset import InstructionData
    from mmit.data.measure import Scan
    from mmit.data.preparation import ImagePreparation
    from mmit.models.vlm import VLM
    from mmit.records import Record
    from mmit.train.engines.world import World

Say = Callable[[Any], None]


def cache_features(  # noqa: PLR0913
    vlm: VLM,
    data: InstructionData,
    scan: Scan,
    *,
    kind: str,
    frozen: bool,
    folder: Path,
    preparation: ImagePreparation | None,
    world: World,
    begin: Callable[[str], None],
    say: Say,
) -> FeatureCache | None:
    """Features of all pictures of a run; None where `kind` is "off" or there is nothing to see. Raises ConfigError."""
    if kind == "off" or vlm.vision is None or preparation is None or not len(scan.illustrated):
        return None
    if not frozen:
        raise ConfigError(
            "features of a tower that is trained cannot be cached",
            where="model.vision.cache",
            remedy="set model.vision.cache=off or tune.vision.mode=frozen",
        )
    say(f"computing features of {scan.pictures} pictures once")
    pictures = data.pictures(scan.illustrated)
    options: dict[str, Any] = {"count": scan.crops, "kind": kind, "folder": folder, "world": world, "begin": begin}
    return compute_features(vlm.vision, pictures, preparation, **options)


def align_to_captions(  # noqa: PLR0913
    vlm: VLM,
    tokenizer: Any,
    preparation: ImagePreparation | None,
    *,
    captions: str,
    features: FeatureCache | None,
    run_dir: Path,
    epochs: int,
    lr: float,
    seed: int,
    world: World,
    begin: Callable[[str], None],
    say: Say,
) -> None:
    """Word alignment of the projector with the captions in an mmit JSONL. Raises ConfigError, RecordError.

    A model that reads tiles is aligned on whole pictures: a word has no tile of its own. All ranks come here; rank 0
    trains.
    """
    if vlm.projector is None or vlm.vision is None or preparation is None:
        raise ConfigError("there is no projector to align", where="align", remedy="set model.vision, or align=null")
    projector = vlm.projector
    if projector.deep:
        problem = "a projector for DeepStack gives more than word embeddings, and only these can be aligned"
        raise ConfigError(problem, where="align", remedy="set align=null, or projector kind mlp")
    with world.together():  # rank 0 converts a foreign format first, the others then find the result
        records = _captions(captions, run_dir / "data") if world.main else []
    with world.together():
        records = records or _captions(captions, run_dir / "data")
    words = [tokenizer(" " + r.turns[-1].text, add_special_tokens=False)["input_ids"] for r in records]
    keys = [image_key(r.images[0]) for r in records]
    if features is None or preparation.tiled or any(k not in features for k in keys):
        pictures = zip(keys, (r.images[0] for r in records), strict=True)
        options: dict[str, Any] = {"kind": "memory", "folder": run_dir / "cache", "world": world, "begin": begin}
        features = compute_features(vlm.vision, pictures, preparation.whole(), count=len(set(keys)), **options)
    seen = features.get(keys)
    begin("word alignment")
    with whole(vlm.word_embeddings):
        ids = torch.arange(shape(vlm.word_embeddings)[0], device=vlm.device)
        # What the LLM gets for a word: some scale the table's rows inside the embedding module.
        embeddings = vlm.llm.get_input_embeddings()(ids).detach()

        def align(alive: Callable[[], None]) -> None:
            options: dict[str, Any] = {"epochs": epochs, "lr": lr, "seed": seed, "alive": alive}
            loss = align_words(projector, seen, words, embeddings, **options)
            say(f"word alignment: {len(records)} captions, {epochs} epochs, loss {loss:.3f}")
            begin("sharing the projector")

        if not world.main:  # this far ahead: who looks at the heartbeats sees that rank 0 is waited for
            begin("sharing the projector")
        world.first(align)
    for tensor in projector.state_dict().values():
        world.share(tensor, source=0)


def _captions(path: str, cache: Path) -> list[Record]:
    with located("align.captions"):
        source = open_source(path, cache=cache)
    return [_caption(source[i]) for i in range(len(source))]


def _caption(record: Record) -> Record:
    if len(record.images) != 1 or record.turns[-1].role != "assistant":
        raise RecordError("is not a caption (one image, one answer)", where=record.where, remedy="check align.captions")
    return record
