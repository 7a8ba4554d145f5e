"""Export of a model to GGUF for llama.cpp, and the proof that the files hold it.

Goes in: a model, its tokenizer, chat format and preparation of pictures. Comes out: one file for the LLM and, where it
sees pictures, one `mmproj` file for tower and projector. Refuses first what llama.cpp computes otherwise. What was
written is read back number by number; the ids of the chat template are compared with those of training; the LLM is
loaded again by transformers and its logits compared, where transformers reads its architecture from GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmit.data.chat import ChatFormat, encode
from mmit.data.chat_writer import IMAGE_SLOT
from mmit.data.content import piece_tokenizer
from mmit.data.template_process import Failed, Refused, render
from mmit.errors import ModelError
from mmit.interop.export import Companions, Difference, Talk, compare_logits, fixed_talks, logits_of, merged_logits
from mmit.interop.templates import processor_template
from mmit.models.interop.gguf_file import check_written, library, write_gguf
from mmit.models.interop.gguf_llm import llm_keys, llm_tensors, read_by_transformers, why_not
from mmit.models.interop.gguf_tokens import Vocabulary, llama_cpp_ids, vocabulary
from mmit.models.interop.gguf_tower import check_tower, tower_keys, tower_tensors
from mmit.models.llm import load_llm
from mmit.models.vision_encoder import explained
from mmit.records import Text

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

MARK = "<__media__>"  # llama.cpp's for a picture in a prompt
# Largest difference of a logit, as a share of the largest, from weights rounded to these formats.
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}


@dataclass(frozen=True, slots=True)
class Written:
    """What an export wrote: its files, and how the LLM's logits compare; None where transformers cannot read it."""

    files: tuple[Path, ...]
    logits: Difference | None


def check_gguf(vlm: VLM, tokenizer: Any, image: Mapping[str, Any], *, llm_only: bool) -> Vocabulary:
    """Raise ModelError for a model that the files cannot hold; shapes, configurations and the tokenizer decide.

    Args:
        vlm: of plain weights, or empty. image: how pictures are prepared; see `ImagePreparation`.
        llm_only: pictures are left out.
    """
    library()
    reason = why_not(vlm.llm)
    if reason is not None:
        remedy = "export with --format llava-hf or --format mmit"
        raise ModelError(f"gguf cannot hold this model: {reason}", where="model.llm", remedy=remedy)
    if vlm.vision is not None and not llm_only:
        check_tower(vlm, image)
    return vocabulary(tokenizer, vlm.word_embeddings.shape[0])


def export_gguf(
    folder: Path,
    vlm: VLM,
    beside: Companions,
    *,
    dtype: str = "fp16",
    name: str = "model",
    llm_only: bool = False,
) -> Written:
    """Write the files and compare.

    Args:
        folder: exists and is empty. vlm: on the CPU, in float32; its adapters are merged.
        dtype: a key of `gguf_file.TYPES`; the `mmproj` file has fp16 in place of q8_0. name: of the model.
        llm_only: leave tower and projector out.

    Raises:
        ModelError: the files cannot hold the model, or what was written differs from it.
    """
    tokenizer, chat, image = beside.tokenizer, beside.chat, beside.image
    bos = "" if chat.as_processor else piece_tokenizer(tokenizer).bos
    template, _ = processor_template(chat, bos=bos, image_token=MARK, marked=True)
    talks = fixed_talks(chat, sees=bool(image))
    begins = chat.pieces(talks[0], generate=True)[0].text
    told = {"name": name, "template": template, "add_bos": bool(bos) and begins.startswith(bos)}
    told |= {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "pad", "unk")}
    merged = merged_logits(vlm, tokenizer, chat, image)
    words = check_gguf(vlm, tokenizer, image, llm_only=llm_only)
    _check_ids(talks, chat, tokenizer, words=words, template=template, bos=bos if told["add_bos"] else "")

    llm = vlm.llm
    tensors, path = llm_tensors(llm), folder / f"{name}-{dtype}.gguf"
    arch = library().MODEL_ARCH_NAMES[_arch(llm)]
    keys = partial(llm_keys, llm=llm, words=words, ends=tuple(beside.end_ids), told=told)
    write_gguf(path, arch, keys, tensors, dtype=dtype)
    check_written(path, tensors)
    files = [path]
    if vlm.vision is not None and not llm_only:
        small = "fp16" if dtype == "q8_0" else dtype
        path, tensors = folder / f"mmproj-{name}-{small}.gguf", tower_tensors(vlm)
        write_gguf(path, "clip", partial(tower_keys, vlm=vlm, name=name), tensors, dtype=small)
        check_written(path, tensors)
        files.append(path)
    ids = list(encode(talks[0], chat, tokenizer, generate=True).ids)
    return Written(tuple(files), _read_again(files[0], vlm, ids, expected=merged[0], dtype=dtype))


def _arch(llm: Any) -> Any:
    from mmit.models.interop.gguf_llm import FAMILIES

    return library().MODEL_ARCH[FAMILIES[llm.config.model_type].arch]


def _read_again(path: Path, vlm: VLM, ids: list[int], *, expected: torch.Tensor, dtype: str) -> Difference | None:
    """Load the LLM from its file with transformers and compare logits of a text; None where that cannot be done."""
    if not read_by_transformers(vlm.llm) or IMAGE_SLOT in ids:  # slots: captions alone
        return None
    with explained(path.name, remedy="this is a defect of the export"):
        again = load_llm(str(path.resolve()), dtype=torch.float32)
    found = logits_of(type(vlm)(again, vision=None, projector=None), ids, (), preparation=None)
    return compare_logits(expected, found, tolerance=TOLERANCE[dtype])


def _messages(talk: Talk) -> list[dict[str, str]]:
    """A conversation as llama.cpp gives it to a template: contents are strings, pictures marks in them."""
    return [
        {"role": turn.role, "content": "".join(p.text if isinstance(p, Text) else MARK for p in turn.parts)}
        for turn in talk
    ]


def _check_ids(
    talks: Sequence[Talk], chat: ChatFormat, tokenizer: Any, *, words: Vocabulary, template: str, bos: str
) -> None:
    """Compare the ids that llama.cpp makes of the template with those of training. Raises ModelError."""
    ids_of = llama_cpp_ids(tokenizer, words)
    for talk in talks:
        ours = list(encode(talk, chat, tokenizer, generate=True).ids)
        given = {**tokenizer.special_tokens_map, "messages": _messages(talk), "add_generation_prompt": True}
        try:
            text = render(template, given)
        except (Refused, Failed) as problem:
            told = f"the template fails on messages as llama.cpp gives them: {problem}"
            remedy = "export with --format llava-hf or --format mmit"
            raise ModelError(told, where="chat template", remedy=remedy) from None
        theirs = [tokenizer.bos_token_id] if bos else []
        for number, part in enumerate(text.removeprefix(bos).split(MARK)):
            theirs += [IMAGE_SLOT] * (number > 0) + ids_of(part)
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
            raise ModelError(
                f"llama.cpp makes other tokens of a prompt than training did: at token {at}, {theirs[at : at + 3]} "
                f"instead of {ours[at : at + 3]}",
                where="chat format of the export",
                remedy="this chat format cannot be written for this tokenizer; export with --format mmit",
            )
