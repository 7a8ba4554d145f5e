"""Export of a model to llava-hf, and the proof that what was written is the same model.

Owns the fixed batch (text and pictures made here, the same for every model), the comparison of ids, pixels and logits
between mmit and transformers' own classes, and the limits beyond which an export fails.

T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from mmit.data.chat import ChatFormat, encode
from mmit.data.chat_writer import IMAGE_SLOT
from mmit.data.content import piece_tokenizer
from mmit.data.preparation import ImagePreparation, Spread, grids_of, prepare_images, splice_index
from mmit.errors import ModelError
from mmit.interop.templates import processor_template
from mmit.models.interop.llava_hf_write import TextSide, check_writable, reload, write_llava_hf
from mmit.models.tuning.merge import merge
from mmit.models.vision_encoder import explained
from mmit.records import Image, Text, Turn

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

# Largest difference of a logit, as a share of the largest logit: rounding of the weights to the written format, and in
# float32 the order of sums alone.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# The same for the sum of a weight and its adapter in float32: one rounding of every weight. Layers with a running state
# carry it from token to token; of 93 small random models Qwen3-Next had the most, 3e-5.
MERGED = 1e-4
Talk = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """What a comparison found: largest differences of logits and pixels, and the limit for logits."""

    logits: float
    limit: float
    pixels: float


def fixed_pictures() -> list[PIL.Image.Image]:
    """Two pictures with edges and slopes in every channel, of unequal sides."""
    y, x = np.mgrid[0:96, 0:128].astype(np.float64)
    waves = [128 + 127 * np.sin(x / (5 + 3 * c) + y / (11 - 2 * c)) for c in range(3)]
    first = np.stack(waves, axis=-1).astype(np.uint8)
    second = first[::-1, ::-1].copy()
    second[20:60, 30:90] = (220, 30, 60)
    return [PIL.Image.fromarray(first), PIL.Image.fromarray(second).resize((64, 96))]


def fixed_talks(chat: ChatFormat, *, sees: bool = True) -> list[Talk]:
    """Conversations that end where an answer begins: text alone, a picture, two pictures, a second question.

    For a model that `sees` nothing the second question follows a text.
    """
    if not sees:
        asked = Turn("user", (Text("How many colours are there?"),))
        return [(asked,), (asked, Turn("assistant", (Text("Seven."),)), Turn("user", (Text("Which?"),)))]
    first, second = (Image(picture) for picture in fixed_pictures())
    if chat.name == "plain":
        return [(Turn("user", (first,)),), (Turn("user", (first, second)),)]
    asked = Turn("user", (first, Text("What is in the picture?")))
    return [
        (Turn("user", (Text("How many colours are there?"),)),),
        (asked,),
        (Turn("user", (first, second, Text("Are they alike?"))),),
        (asked, Turn("assistant", (Text("Waves."),)), Turn("user", (Text("Which colour?"),))),
    ]


def pictures_of(talk: Talk) -> list[PIL.Image.Image]:
    """Return the pictures of a fixed conversation, in order."""
    return [p.source for turn in talk for p in turn.parts if isinstance(p, Image)]  # type: ignore[misc]


def pixels_of(talk: Talk, preparation: ImagePreparation | None) -> list[torch.Tensor]:
    """(C, 3, H, W) uint8 of each of a conversation's pictures; none for a model that sees nothing."""
    return [preparation.pixels(Image(picture)) for picture in pictures_of(talk)] if preparation else []


@torch.no_grad()
def logits_of(vlm: VLM, ids: Sequence[int], talk: Talk, *, preparation: ImagePreparation | None) -> torch.Tensor:
    """Logits (T, V) in float32 of a prompt alone, image tokens included in T.

    Args:
        ids: of the text, with a slot where an image stands.
        talk: whose images fill the slots, in order.
        preparation: of these; None for a model of text.
    """
    pictures = [Image(picture) for picture in pictures_of(talk)] if preparation else []
    spreads: dict[Hashable, Spread] = {n: preparation.spread(p) for n, p in enumerate(pictures)} if preparation else {}
    long: list[int] = []
    places: list[int] = []
    waiting = iter(spreads.values())
    for i in ids:
        width = next(waiting).tokens if i == IMAGE_SLOT else 0
        places += range(len(long), len(long) + width)
        long += [0] * width if i == IMAGE_SLOT else [i]
    device, pixels = vlm.device, pixels_of(talk, preparation)
    embeddings = vlm.embed(
        torch.tensor(long, device=device),
        image_positions=torch.tensor(places, dtype=torch.int64, device=device),
        image_index=splice_index(spreads, spreads, vlm.image_tokens).to(device),
        image_tokens=vlm.image_tokens,
        features=vlm.encode_images(torch.cat(pixels).to(device), grids_of(spreads.values())) if pixels else None,
    )
    at = torch.arange(len(long), device=device)
    nodes = torch.tensor([[0, len(long), -1]])
    return vlm.row_logits(embeddings, positions=at, nodes=nodes, at=at).float().cpu()


def source_logits(vlm: VLM, tokenizer: Any, chat: ChatFormat, image: dict[str, Any]) -> list[torch.Tensor]:
    """Logits of the fixed batch, (T, V) each, to be taken before a model is changed or written.

    Args:
        tokenizer, chat, image: as in `Companions`; the batch is of this chat format.
    """
    preparation = prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    return [
        logits_of(vlm, encode(talk, chat, tokenizer, generate=True).ids, talk, preparation=preparation)
        for talk in fixed_talks(chat, sees=preparation is not None)
    ]


def merged_logits(vlm: VLM, tokenizer: Any, chat: ChatFormat, image: dict[str, Any]) -> list[torch.Tensor]:
    """Merge adapters into the weights, in place, and return the logits of the fixed batch.

    Args:
        vlm: the model with its adapters. tokenizer, chat, image: as of `source_logits`.

    Returns:
        (T, V) logits of each record of the batch, of the merged model.

    Raises:
        ModelError: the method cannot be merged, or the logits are others then.
    """
    expected = source_logits(vlm, tokenizer, chat, image)
    with explained("adapter", remedy="export with --format mmit or --format peft, which keep it as it is"):
        merge(vlm)
    merged = source_logits(vlm, tokenizer, chat, image)
    for before, after in zip(expected, merged, strict=True):
        compare_logits(before, after, tolerance=MERGED, what="the model with its adapter merged into the weights")
    return merged


@dataclass(frozen=True)
class Companions:
    """What goes with a model into a folder of another project; see `generate.Model`."""

    tokenizer: Any
    chat: ChatFormat
    image: dict[str, Any]  # how pictures are prepared, {} for a model of text
    end_ids: Sequence[int]


def export_llava_hf(
    folder: Path,
    vlm: VLM,
    beside: Companions,
    *,
    dtype: torch.dtype = torch.float32,
    image_token: str = "<image>",
) -> Difference:
    """Write a llava-hf folder, load it with transformers' classes and compare.

    Args:
        folder: exists and is empty.
        vlm: on the CPU, in float32; its adapters are merged and its vocabulary may grow.
        dtype: number format of the weights written.
        image_token: text of the image token, where the chat format does not bring its own.

    Raises:
        ModelError: llava-hf cannot hold the model, or what was written differs from it.
    """
    tokenizer, chat, image = beside.tokenizer, beside.chat, beside.image
    bos = "" if chat.as_processor else piece_tokenizer(tokenizer).bos
    template, token = processor_template(chat, bos=bos, image_token=image_token)
    begins = chat.pieces(fixed_talks(chat)[0], generate=True)[0].text
    merged = merged_logits(vlm, tokenizer, chat, image)
    check_writable(vlm, image)
    write_llava_hf(
        folder,
        vlm,
        TextSide(tokenizer, template, token, beside.end_ids, drop_bos=bool(bos) and not begins.startswith(bos)),
        image=image,
        dtype=dtype,
    )
    model, processor = reload(folder)
    preparation = prepare_images(image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    pixels, asked = 0.0, []
    for talk in fixed_talks(chat):
        own = encode(talk, chat, tokenizer, generate=True).ids
        theirs = processed(processor, talk)
        slots = iter([preparation.spread(Image(p)).tokens for p in pictures_of(talk)] if preparation else [])
        ids = [t for i in own for t in ([model.config.image_token_id] * next(slots) if i == IMAGE_SLOT else [i])]
        _compare_ids(ids, theirs["input_ids"][0].tolist(), processor.tokenizer)
        shown, apart = _shown(vlm, talk, preparation, theirs)
        pixels = max(pixels, apart)
        asked.append({"input_ids": torch.tensor([ids]), **shown})
    found = _answers(model, asked)
    try:
        seen = _compared(merged, found, dtype)
    except ModelError:
        if dtype != torch.float32:
            raise
        # A model can magnify float32's rounding beyond the limit. In float64 nothing of it is left, and a mistake stays
        # what it is. Not from the start: it takes twice the memory.
        found = _answers(model.double(), asked)
        del model
        merged = source_logits(vlm.double(), tokenizer, chat, image)
        vlm.float()  # exact, for these were the values
        seen = _compared(merged, found, dtype)
    worst = max(seen, key=lambda difference: difference.logits / difference.limit)
    return Difference(worst.logits, worst.limit, pixels)


def _compared(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], dtype: torch.dtype) -> list[Difference]:
    return [compare_logits(a, b, tolerance=TOLERANCE[dtype]) for a, b in zip(expected, found, strict=True)]


@torch.no_grad()
def _answers(model: Any, asked: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Logits (T, V) of the exported model, by its number format, for each of the inputs."""
    answers = []
    for inputs in asked:
        given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        answers.append(model(**given).logits[0])
    return answers


def _shown(
    vlm: VLM, talk: Talk, preparation: ImagePreparation | None, theirs: Any
) -> tuple[dict[str, torch.Tensor], float]:
    """What the exported model is shown: mmit's own pixels, and how far the processor's are from them at most."""
    raw = pixels_of(talk, preparation)
    if not raw:
        return {}, 0.0
    assert vlm.vision is not None
    shown = {"pixel_values": vlm.vision._normalise(torch.cat(raw).to(vlm.device)).float().cpu()}
    other = theirs["pixel_values"].float()
    if "image_sizes" in theirs:  # crops of all images, those with fewer filled up
        other = torch.cat([crops[: len(mine)] for crops, mine in zip(other, raw, strict=True)])
        shown["image_sizes"] = theirs["image_sizes"]
    return shown, float((shown["pixel_values"] - other).abs().max())


def compare_logits(
    expected: torch.Tensor, found: torch.Tensor, *, tolerance: float, what: str = "the exported model"
) -> Difference:
    """Compare logits over the vocabulary both have.

    Args:
        expected: (T, V). found: (T, V or more), for a head may be padded.
        tolerance: a share of the largest logit. what: the second model, for the error.

    Raises:
        ModelError: a difference beyond the tolerance, or one that is not finite.
    """
    scale = max(1.0, float(expected.abs().max()))
    largest = float((expected - found[:, : expected.shape[1]].float()).abs().max())
    limit = tolerance * scale
    if not largest <= limit or math.isnan(largest):
        raise ModelError(
            f"{what} differs: a logit is off by {largest:.3g}, more than {limit:.3g}",
            where="comparison after the export",
            remedy="do not use the folder; please report this with the config of the run",
        )
    return Difference(largest, limit, 0.0)


def processed(processor: Any, talk: Talk) -> Any:
    """What a transformers processor makes of a conversation."""
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in talk
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    # As the processor's own apply_chat_template(tokenize=True): BOS is not put in twice.
    special = not (bos and text.startswith(bos))
    pictures = pictures_of(talk)
    return processor(images=pictures or None, text=text, add_special_tokens=special, return_tensors="pt")


def _compare_ids(ours: list[int], theirs: list[int], tokenizer: Any) -> None:
    if ours == theirs:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    around = tokenizer.decode(ours[max(0, at - 3) : at + 3])
    raise ModelError(
        f"the processor gives other ids than training did: at token {at}, near {around!r}, "
        f"{theirs[at : at + 3]} instead of {ours[at : at + 3]}",
        where="chat template of the export",
        remedy="this chat format cannot be written as a template for this tokenizer; export with --format mmit",
    )
