"""`mmit pet`: a few labelled rows and many without a label become a labelled set and a tuned model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmit.cli.build_config import read_config
from mmit.errors import ConfigError
from mmit.text import echo

if TYPE_CHECKING:
    from mmit.pet import Example, Patterns

app = typer.Typer(help="Pattern-exploiting training: a few labelled rows, many without a label.", no_args_is_help=True)
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the task.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="The folder of the task, the same for all three.")
]

KEYS = ("model", "patterns", "labelled", "unlabelled", "fit", "generations", "label", "distil", "seed")
_TRAINING = ("steps", "tune", "settings")
INNER = {
    "fit": (*_TRAINING, "repetitions", "lm"),
    "generations": ("count", "factor", "share"),
    "label": ("weights", "temperature", "calibrate", "pattern"),
    "distil": (*_TRAINING, "over"),
}


@app.command("fit")
def fit(config: Config, *, out: Out) -> None:
    """Fit a model to the labelled rows for every pattern."""
    from mmit.pet import fit as fitted
    from mmit.pet.settings import Fitting, Generations

    settings = _settings(config)
    patterns = _patterns(settings, config)
    labelled = _rows(settings, patterns, config, "labelled")
    generations = Generations(**settings.get("generations") or {})
    unlabelled = _rows(settings, patterns, config, "unlabelled") if generations.count > 1 else []
    how = Fitting(**settings.get("fit") or {}, seed=settings.get("seed", 0))
    given: dict[str, Any] = {"dir": out, "unlabelled": unlabelled, "how": how, "generations": generations}
    models = fitted(settings["model"], patterns, labelled, **given, say=echo)
    echo(f"{len(models)} models of {len(patterns.patterns)} patterns in {out}")
    echo(f"label with them: mmit pet label {config} --out {out}")


@app.command("label")
def label(config: Config, *, out: Out) -> None:
    """Label the other rows with all fitted models together."""
    from mmit.pet import label as labelled
    from mmit.pet.settings import Labelling
    from mmit.pet.task import LABELLED

    settings = _settings(config)
    patterns = _patterns(settings, config)
    unlabelled = _rows(settings, patterns, config, "unlabelled")
    how = Labelling(**settings.get("label") or {})
    counts = labelled(out, patterns, unlabelled, how=how, settings=settings)
    echo(f"{counts.summary} in {out / LABELLED}; look at them with: mmit data show {out / LABELLED / 'mixture.yaml'}")
    echo(f"train on them: mmit pet distil {config} --out {out}")


@app.command("distil")
def distil(config: Config, *, out: Out) -> None:
    """Train one model on what the others say together."""
    from mmit.pet import distil as distilled
    from mmit.pet.settings import Fitting, Labelling

    settings = _settings(config)
    given = dict(settings.get("distil") or {})
    over = given.pop("over", "labels")
    how = Fitting(**given, lm=0.0, seed=settings.get("seed", 0))
    temperature = Labelling(**settings.get("label") or {}).temperature
    student = distilled(settings["model"], out, how=how, over=over, temperature=temperature)
    echo(f"a model in {student}; ask it with: mmit chat {student}")


def _settings(config: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_config(config, KEYS, INNER)
    for key in ("model", "patterns", "labelled"):
        if not settings.get(key):
            raise ConfigError(f"'{key}' is missing", where=str(config), remedy=f"Write {key}: ...")
    if not isinstance(settings["model"], str):
        problem, remedy = "is no path", "Name the folder of a run or of a checkpoint."
        raise ConfigError(problem, where=f"{config}: model", remedy=remedy)
    return settings


def _patterns(settings: Mapping[str, Any], config: Path) -> Patterns:
    from mmit.pet import patterns_of, read_patterns

    given = settings["patterns"]
    if isinstance(given, str):
        return read_patterns(config.parent / given)
    return patterns_of(given, where=f"{config}: patterns")


def _rows(settings: Mapping[str, Any], patterns: Patterns, config: Path, key: str) -> list[Example]:
    from mmit.pet import read_rows

    if not settings.get(key):
        raise ConfigError(f"'{key}' is missing", where=str(config), remedy=f"Write {key}: {{path: ...}}.")
    return read_rows(settings[key], patterns, labelled=key == "labelled", folder=str(config.parent), key=key)
