"""The formats that a run is to be written in after it: asked for before it starts.

In: a config. Out: nothing, or the ModelError of `models.interop.holds` that says what a format cannot hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mmit.models.interop.holds import TextFacts, check_export, text_facts

if TYPE_CHECKING:
    from mmit.config import Config

NEED_FACTS = ("llava-hf", "llava")


def text_facts_of(config: Config, format: str) -> TextFacts | None:
    """The facts of a config's LLM that decide a format; None where none do, or where its base is not there."""
    llm = config.model.llm
    here = llm.random_init is not None or not Path(llm.name).is_absolute() or Path(llm.name).exists()
    return text_facts(llm.model_dump()) if format in NEED_FACTS and here else None


def check_exports(config: Config) -> None:
    """Refuse a run whose `export` lists a format that cannot hold its model. Raises ModelError."""
    for format in config.export:
        check_export(format, config.model.model_dump(), config.tune.model_dump(), text_facts_of(config, format))


def exports_of(config: Config) -> list[tuple[str, Path]]:
    """Formats and folders that are written when the run has finished."""
    return [(format, Path(config.run.dir) / "export" / format) for format in config.export]
