"""`mmit train`: a config and overrides become a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE|KEY=VALUE",
            help="Overrides such as train.steps=50; `resume=auto` is short for run.resume=auto.",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="The YAML of the run.")] = None,
    *,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train as a config says. `mmit config` lists its keys.

    Continue an interrupted run: mmit train FILE resume=auto
    """
    # --local_rank comes from the deepspeed launcher, which gives the rank in the environment too.
    file, overrides = split_arguments(config, arguments or [])

    from mmit.config import load_config

    settings = load_config(file, overrides)

    from mmit.train.run import run  # after the config has been read, so that its errors come at once

    raise typer.Exit(run(settings))


def split_arguments(config: Path | None, arguments: list[str]) -> tuple[Path, list[str]]:
    """Return the config file, given as an option or as the first argument, and the overrides."""
    overrides = list(arguments)
    if config is None:
        if not overrides or ("=" in overrides[0] and not Path(overrides[0]).exists()):
            raise typer.BadParameter("give the YAML of the run: mmit train --config FILE", param_hint="--config")
        config = Path(overrides.pop(0))
    return config, [f"run.{text}" if text.startswith("resume=") else text for text in overrides]
