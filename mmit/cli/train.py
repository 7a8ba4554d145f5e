"""`mmit train`: a config and overrides become a run."""

from __future__ import annotations

import os
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
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FOLDER|HUB_ID",
            help="In place of a YAML: start from this llava-hf (or LLaVA) model; everything else is an override.",
        ),
    ] = None,
    chat: Annotated[str | None, typer.Option(help="With --from: its chat format, if it has no template.")] = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train as a config says. `mmit config` lists its keys.

    Tune a llava-hf model: mmit train --from FOLDER data.train.0.path=YOUR.jsonl tune.llm.mode=lora tune.llm.lr=2e-4

    Continue an interrupted run: mmit train FILE resume=auto
    """
    # --local_rank comes from the deepspeed launcher, which gives the rank in the environment too.
    if source is not None:
        if config is not None:
            raise typer.BadParameter("give a config or a model to start from, not both", param_hint="--from")
        file, overrides = start_from(source, overrides_of(arguments or []), chat=chat)
    else:
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
    return config, overrides_of(overrides)


def overrides_of(arguments: list[str]) -> list[str]:
    """Write out the short form `resume=`."""
    return [f"run.{text}" if text.startswith("resume=") else text for text in arguments]


def start_from(source: str, overrides: list[str], *, chat: str | None) -> tuple[Path, list[str]]:
    """Import a model into the run's folder, unless an earlier start did, and return its config with the overrides."""
    from mmit.cli.export import make_start
    from mmit.errors import ConfigError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = f"first: mmit import-model {source} START, then train with --config START/config.yaml"
        raise ConfigError("several processes cannot import one model", where="--from", remedy=remedy)
    given = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    run_dir = given[-1] if given else f"runs/{Path(source).name.partition('@')[0]}"
    start = Path(run_dir) / "start"
    if not (start / "manifest.json").exists():
        make_start(source, start, chat=chat)
    return start / "config.yaml", [f"run.dir={run_dir}", *overrides]
