"""`mmit train`: a config and overrides become a run, or the forecast of one."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from mmit.text import terminal

if TYPE_CHECKING:
    from mmit.config import Config

PLANNING = "Dry run"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILE|KEY=VALUE",
        help="Overrides such as train.steps=50; `resume=auto` is short for run.resume=auto, `dry_run=true` for "
        "--dry-run.",
    ),
]
SourceOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FOLDER|HUB_ID",
        help="In place of a YAML: start from this model (llava-hf, LLaVA, TinyLLaVA, Prismatic); all else is an "
        "override.",
    ),
]
DevicesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Start this many ranks here: GPUs, or processes on a CPU. Needs DeepSpeed from 2 on."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Forecast the run without weights: steps, FLOPs, memory, time, price.")
]
GpuOption = Annotated[
    str | None,
    typer.Option(help="GPU to plan for, by name or memory (h100, 24GB).", rich_help_panel=PLANNING),
]
RanksOption = Annotated[
    int | None,
    typer.Option(min=1, help="Devices. (default: --devices, the launcher's, or 1)", rich_help_panel=PLANNING),
]
MfuOption = Annotated[
    float, typer.Option(min=0.001, max=1, help="Share of the peak that is reached.", rich_help_panel=PLANNING)
]
TflopsOption = Annotated[
    float | None, typer.Option(min=0, help="Peak of a device that has no name here.", rich_help_panel=PLANNING)
]
PriceOption = Annotated[
    float | None, typer.Option(min=0, help="Price of a device for an hour.", rich_help_panel=PLANNING)
]


def train(
    arguments: Overrides = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="The YAML of the run.")] = None,
    *,
    source: SourceOption = None,
    chat: Annotated[str | None, typer.Option(help="With --from: its chat format, if it has no template.")] = None,
    base: Annotated[str | None, typer.Option(help="With --from: the LLM that it is built on, as import-model.")] = None,
    tower: Annotated[str | None, typer.Option(help="With --from: its vision tower, as import-model.")] = None,
    devices: DevicesOption = None,
    dry_run: DryRunOption = False,
    gpu: GpuOption = None,
    ranks: RanksOption = None,
    mfu: MfuOption = 0.4,
    tflops: TflopsOption = None,
    price: PriceOption = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train as a config says. `mmit config` lists its keys.

    Tune a llava-hf model: mmit train --from FOLDER data.train.0.path=YOUR.jsonl tune.llm.mode=lora tune.llm.lr=2e-4

    Continue an interrupted run: mmit train FILE resume=auto

    On two GPUs, or two processes of a CPU: mmit train FILE --devices 2
    """
    # --local_rank comes from the deepspeed launcher, which gives the rank in the environment too.
    asked, given = _dry_run(arguments or [])
    dry_run = dry_run or asked
    options = {"chat": chat, "base": base, "tower": tower}
    with ExitStack() as stack:
        if source is not None:
            if config is not None:
                raise typer.BadParameter("give a config or a model to start from, not both", param_hint="--from")
            trial = Path(stack.enter_context(TemporaryDirectory(prefix="mmit-"))) / "start" if dry_run else None
            file, overrides = start_from(source, overrides_of(given), trial=trial, **options)
        else:
            if told := [f"--{name}" for name, value in options.items() if value is not None]:
                raise typer.BadParameter("belongs to a model to start from: give --from too", param_hint=told[0])
            file, overrides = split_arguments(config, given)

        from mmit.config import load_config

        settings = load_config(file, overrides)
        if dry_run:
            _forecast(settings, gpu=gpu, ranks=ranks or devices, share=mfu, tflops=tflops, price=price)
            return
        if devices is not None and (devices > 1 or settings.engine.kind == "deepspeed"):
            raise typer.Exit(_on_ranks(settings, file, overrides, devices))

    from mmit.train.run import run  # after the config has been read, so that its errors come at once

    measured = None
    if settings.train.eval_tasks:
        from mmit.eval.while_training import task_scores

        measured = task_scores(settings.train.eval_tasks, settings.train.eval_questions)
    code = run(settings, evaluate=measured)
    if code == 0 and int(os.environ.get("RANK", "0")) == 0:
        _write_exports(settings)
    raise typer.Exit(code)


def _on_ranks(settings: Config, file: Path, overrides: list[str], devices: int) -> int:
    """Train on ranks that are started here; the config has been read, so that its errors came once and at once."""
    from mmit.cli.launch import WHERE, check_devices, launch
    from mmit.errors import ConfigError

    if settings.engine.kind == "torch":
        remedy = f"set engine.kind=deepspeed or auto, or leave {WHERE} out"
        raise ConfigError(f"the torch engine runs on one device, not on {devices}", where="engine.kind", remedy=remedy)
    check_devices(devices, device=settings.device)
    return launch(["train", "--config", str(file), *overrides], devices=devices, device=settings.device)


def _write_exports(settings: Config) -> None:
    """Write the finished run in every format that `export` lists, unless an earlier start did."""
    from mmit.cli.export import export
    from mmit.train.checks.exporting import exports_of

    for format, folder in exports_of(settings):
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            export(Path(settings.run.dir), out=folder, format=format)


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


def start_from(
    source: str, overrides: list[str], *, trial: Path | None = None, **options: str | None
) -> tuple[Path, list[str]]:
    """Import a model into the run's folder, unless an earlier start did.

    Args:
        source: another project's folder, or a hub id.
        overrides: KEY=VALUE of the command line; run.dir=DIR among them names the run's folder.
        trial: the folder to import into in place of the run's.
        options: those of `read_foreign`.

    Returns:
        the config of the imported model, and the overrides that go with it.

    Raises:
        MmitError: it is imported by several processes, or cannot be read.
    """
    from mmit.cli.export import make_start
    from mmit.errors import ConfigError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = f"first: mmit import-model {source} START, then train with --config START/config.yaml"
        raise ConfigError("several processes cannot import one model", where="--from", remedy=remedy)
    given = [text.partition("=")[2] for text in overrides if text.startswith("run.dir=")]
    run_dir = given[-1] if given else f"runs/{Path(source).name.partition('@')[0]}"
    start = Path(run_dir) / "start"
    if not (start / "manifest.json").exists():
        start = trial or start
        make_start(source, start, **options)
    return start / "config.yaml", [f"run.dir={run_dir}", *overrides]


def _dry_run(overrides: list[str]) -> tuple[bool, list[str]]:
    """Take `dry_run=true` or `dry_run=false` out of the overrides; the last one counts."""
    from mmit.errors import ConfigError

    asked, others = False, []
    for text in overrides:
        key, _, value = text.partition("=")
        if key != "dry_run":
            others.append(text)
        elif value in ("true", "false"):
            asked = value == "true"
        else:
            raise ConfigError(f"is '{value}'", where="dry_run", remedy="write dry_run=true")
    return asked, others


def _forecast(
    config: Config,
    *,
    gpu: str | None,
    ranks: int | None,
    share: float,
    tflops: float | None,
    price: float | None,
) -> None:

    from mmit.train.memory.devices import find_device

    device = find_device(gpu, kind=config.device)

    from mmit.forecast.forecast import forecast
    from mmit.forecast.report import show

    world = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("RANK", "0")):
        return  # one rank speaks for all
    found = forecast(config, ranks=world, flash=device.cuda)
    peak = tflops * 1e12 if tflops else None
    say = terminal(highlight=False, soft_wrap=True).print
    for note in config.notes:
        say(note)
    show(found, device, share=share, peak=peak, price=price, say=say)
