"""From the `model` section of a config, as plain data, to the parts of a model.

Owns the order in which parts are built and the checks between them. Takes a mapping (never a config object).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from mmit.errors import located
from mmit.models.deepstack import deep_layers
from mmit.models.llm import DTYPES, load_llm, load_tokenizer
from mmit.models.partition import shape
from mmit.models.projectors import build_projector
from mmit.models.vision import FUSED, VisionTower, build_vision
from mmit.models.vlm import VLM

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mmit.models.projector_base import Projector


def assemble_vision(vision: Mapping[str, Any], *, dtype: torch.dtype) -> VisionTower:
    """Build the tower that a `model.vision` section describes; `dtype` where the section does not say."""
    size = vision["image_size"]
    number_format = DTYPES[vision["dtype"]] if vision["dtype"] else dtype
    if vision["kind"] == FUSED:
        with located("model.vision"):
            towers = [{**t, "key_order": t["key_order"] or None} for t in vision["towers"]]
            # Contract of a fused tower: what its section says of all encoders at once must be unset, and `build_vision`
            # refuses what is not.
            alone = {k: vision[k] for k in ("weights", "layer", "select", "image_size", "native")}
            return build_vision(FUSED, "", towers=towers, dtype=number_format, **alone)
    with located("model.vision"):
        return build_vision(
            vision["kind"],
            vision["name"],
            weights=vision["weights"],
            layer=vision["layer"],
            native=vision.get("native"),
            select=vision["select"],
            image_size=tuple(size) if isinstance(size, (list, tuple)) else size,
            key_order=vision["key_order"],
            towers=vision.get("towers", ()),
            dtype=number_format,
        )


def without_weights(vision: Mapping[str, Any]) -> dict[str, Any]:
    """A `model.vision` section whose encoders are built with random weights, to be measured or filled later."""
    towers = [{**tower, "weights": False, "key_order": False} for tower in vision.get("towers", ())]
    # Of a fused tower `weights` belong to each of the encoders, and must stay unset on the whole.
    alone = None if vision["kind"] == FUSED else False
    return {**vision, "weights": alone, "key_order": False, "towers": towers}


def with_own_towers(vision: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A `model.vision` section whose encoders are those that a checkpoint keeps in vision/, where it keeps any."""
    if not folder.joinpath("vision").exists():
        return dict(vision)
    if vision["kind"] != FUSED:
        return {**vision, "name": str(folder / "vision"), "weights": None}
    # A checkpoint keeps only the encoders that were trained; the others come from where the config names them.
    places = [folder / "vision" / str(number) for number in range(len(vision["towers"]))]
    kept = [{"name": str(place), "weights": None} if place.exists() else {} for place in places]
    return {**vision, "towers": [{**tower, **own} for tower, own in zip(vision["towers"], kept, strict=True)]}


def has_line_end(vision: Mapping[str, Any]) -> bool:
    """Whether a `model.vision` section ends the lines of its tiled pictures with a vector of their own."""
    return vision["fit"] == "any_resolution" and vision["tiles"].get("line_ends", True)


def assemble(
    model: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    seed: int = 0,
    packed: bool = True,
    tokenizer: str | None = None,
    **place: Any,
) -> tuple[VLM, PreTrainedTokenizerBase]:
    """Build the composite and its tokenizer from a `model` section.

    Args:
        model: {"vision": {...} | None, "projector": {...}, "llm": {...}, "chat": {...}} with every key present.
        dtype: number format of frozen weights where a section does not say.
        seed: of the weights that start random (the projector).
        packed: see `load_llm`; off, records of a row run as a padded batch.
        tokenizer: folder of the tokenizer where it is not the LLM's own (a checkpoint's copy).
        place: fields of `llm.Placement`, of the LLM. With `empty` all parts are shapes alone; with `partition` the
            other parts stay whole on each rank.

    Raises:
        ModelError: a part cannot be built or parts do not fit.
    """
    empty = bool(place.get("empty"))
    options = model["llm"]
    with located("model.llm") if tokenizer is None else nullcontext():
        # The tokenizer before the weights: a wrong name fails in a second, not after minutes of loading.
        tokens = load_tokenizer(tokenizer or options["name"], revision=None if tokenizer else options["revision"])
    torch.manual_seed(seed)
    with located("model.llm"):
        llm = load_llm(
            options["name"],
            revision=options["revision"],
            dtype=DTYPES[options["dtype"]] if options["dtype"] else dtype,
            random_init=options["random_init"],
            packed=packed,
            attention_dropout=options.get("attention_dropout"),
            **place,
        )
    if model["vision"] is None:
        return VLM(llm, vision=None, projector=None, padded=not packed), tokens
    # Shapes alone need no file, so that a forecast runs on a machine that has none of the weights.
    section = without_weights(model["vision"]) if empty else model["vision"]
    with torch.device("meta") if empty else nullcontext():
        vision = assemble_vision(section, dtype=dtype)
        # Seeded again: how many numbers the LLM and the tower drew must not decide where the projector starts.
        torch.manual_seed(seed)
        projector = _projector(model, vision, llm)
    return VLM(llm, vision=vision, projector=projector, padded=not packed), tokens


def projector_for(vision: VisionTower, *, llm_dim: int, model: Mapping[str, Any]) -> Projector:
    """Build the projector that the section `model` of a config asks for, behind this tower. Raises ModelError."""
    return build_projector(
        model["projector"]["kind"],
        vision_dim=vision.dim,
        llm_dim=llm_dim,
        grid=vision.grid,
        prefix=vision.prefix,
        line_end=has_line_end(model["vision"]),
        **model["projector"]["options"],
    )


def _projector(model: Mapping[str, Any], vision: VisionTower, llm: PreTrainedModel) -> Projector:
    """The projector between this tower and this LLM, in the number format of the word embeddings."""
    words = VLM(llm, vision=None, projector=None).word_embeddings
    with located("model.projector"):
        # ZeRO-3 leaves (0,) for the shape of a divided weight.
        projector = projector_for(vision, llm_dim=shape(words)[1], model=model).to(words.dtype)
    if projector.deep:
        deep_layers(llm, projector.deep)
    return projector
