"""`mmit analyse`: what the data taught, as studies of arms and seeds with honest intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mmit.analysis.kinds import STUDIES
from mmit.errors import ConfigError, nearest
from mmit.text import echo

app = typer.Typer(help="Studies: arms that differ in one thing, several seeds, intervals.", no_args_is_help=True)
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the study.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder of the study.")]


def _command(kind: str) -> Callable[..., None]:
    def run(
        config: Config,
        *,
        out: Out,
        jobs: Annotated[
            int | None, typer.Option(min=1, help="Arms that train at once. (default: 2 on a CPU, 1 with a GPU)")
        ] = None,
        plan: Annotated[bool, typer.Option("--plan", help="List what is left to do, and run nothing.")] = False,
    ) -> None:
        from mmit.analysis.config import load_study
        from mmit.analysis.execution import run_study
        from mmit.analysis.study import Study, usual_jobs

        loaded = load_study(config)
        if loaded.study != kind:
            remedy = f"Run it with: mmit analyse {loaded.study} {config}"
            raise ConfigError(f"is a study of kind {loaded.study}, not {kind}", where=str(config), remedy=remedy)
        study = Study(loaded, config, out)
        jobs = jobs or usual_jobs()
        if plan:
            _plan(study, jobs)
            return
        run_study(study, jobs=jobs, say=echo)
        _report(study)

    return run


for _kind, _about in STUDIES.items():
    app.command(_kind, help=f"Run a study of {_about}, or what is left of it, and write its report.")(_command(_kind))


@app.command("arm", hidden=True)
def arm(config: Config, name: str, seed: int, *, out: Out) -> None:
    """Write the records and the training config of one arm with one seed."""
    from mmit.analysis.config import START, load_study
    from mmit.analysis.study import Study

    study = load_study(config)
    if name not in study.arms and (name != START or study.start is None):
        raise ConfigError(f"there is no arm '{name}'", where=str(config), remedy=nearest(name, study.arms))
    echo(f"{Study(study, config, out).make_arm(name, seed):,} records")


@app.command("report")
def report(config: Config, *, out: Out) -> None:
    """Write the report of what has run so far."""
    from mmit.analysis.config import load_study
    from mmit.analysis.study import Study

    _report(Study(load_study(config), config, out))


@app.command("intrinsic")
def intrinsic(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs with tune.llm.mode=soft_prompt.")],
    *,
    dim: Annotated[int, typer.Option(min=1, help="Numbers of a point of the space.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder of the space.")],
    hidden: Annotated[int, typer.Option(min=0, help="Units of the layer back; 0 for linear maps.")] = 768,
    steps: Annotated[int, typer.Option(min=1, help="Of training the maps; linear ones need none.")] = 2000,
    task_steps: Annotated[
        int, typer.Option(min=0, help="Then of training them on the loss of the runs' records too, a row each.")
    ] = 0,
) -> None:
    """Find the space that trained soft prompts lie in, of which tune.llm.mode=intrinsic tunes one point."""
    from mmit.analysis.intrinsic import make_subspace

    for run, lost in make_subspace(runs, out=out, dim=dim, hidden=hidden, steps=steps, task_steps=task_steps):
        echo(f"{run}: {100 * lost:.1f} % of its prompt's distance to the mean is lost")
    echo(f"tune in it: tune.llm.mode=intrinsic tune.llm.options='{{subspace: {out}}}'")


def _plan(study: object, jobs: int) -> None:
    left = study.left()  # type: ignore[attr-defined]
    for step in left:
        echo(step.shown)
    hours = study.hours_left(jobs=jobs)  # type: ignore[attr-defined]
    told = "its time is known once the first arm has run"
    if hours is not None:
        told = f"about {hours:.1f} hours by the steps that have run"
    echo(f"{len(left)} steps left; {told}")


def _report(study: object) -> None:
    from mmit.analysis.report import write_report

    echo(write_report(study))  # type: ignore[arg-type]
    echo(f"wrote {study.out}/report.html, report.md, report.json and plot.svg")  # type: ignore[attr-defined]
