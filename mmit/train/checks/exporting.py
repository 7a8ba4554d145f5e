"""The formats that a run is to be written in after it: asked for before it starts.

In: a config. Out: nothing, or the ModelError of `models.interop.holds` that says what a format cannot hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmit.interop.gguf import check_gguf
from mmit.models.assemble import assemble
from mmit.models.interop.holds import TextFacts, check_export, text_facts
from mmit.models.interop.llava_hf_write import check_writable
from mmit.train.checkpoint.model import image_preparation

if TYPE_CHECKING:
    from mmit.config import Config

NEED_FACTS = ("llava-hf", "llava")
NEED_PARTS = (
    "llava-hf",
    "gguf",
)  # what their towers, projectors and tokenizers can be is asked of the parts themselves


def text_facts_of(config: Config, format: str) -> TextFacts | None:
    """The facts of a config's LLM that decide a format; None where none do, or where its base is not there."""
    return text_facts(config.model.llm.model_dump()) if format in NEED_FACTS and _here(config) else None


def _here(config: Config) -> bool:
    """Whether the base of the LLM can be asked."""
    llm = config.model.llm
    # A hub id counts as there: what the check reads of it is in the cache, or is fetched for the run anyway.
    return llm.random_init is not None or not Path(llm.name).is_absolute() or Path(llm.name).exists()


def check_format(config: Config, format: str, *, llm_only: bool = False) -> None:
    """Refuse a model that a format cannot hold, before any weight is read. Raises ModelError.

    `llm_only` leaves pictures out (gguf).
    """
    check_export(
        format, config.model.model_dump(), config.tune.model_dump(), text_facts_of(config, format), llm_only=llm_only
    )
    if format in NEED_PARTS and _here(config):
        _check_parts(config, format, llm_only=llm_only)


def _check_parts(config: Config, format: str, *, llm_only: bool) -> None:
    """Ask the parts themselves, assembled without weights."""
    model = config.model.model_dump()
    if llm_only:
        model["vision"] = None
    vlm, tokenizer = assemble(model, dtype=torch.float32, empty=True)
    image = image_preparation(vlm.vision, config.model.vision)
    if format == "gguf":
        check_gguf(vlm, tokenizer, image, llm_only=llm_only)
    else:
        check_writable(vlm, image)


def check_exports(config: Config) -> None:
    """Refuse a run whose `export` lists a format that cannot hold its model. Raises ModelError."""
    for format in config.export:
        check_format(config, format)


def exports_of(config: Config) -> list[tuple[str, Path]]:
    """Formats and folders that are written when the run has finished."""
    return [(format, Path(config.run.dir) / "export" / format) for format in config.export]
