"""The front door for Python: training without YAML.

In: plain arguments, and dicts with the keys of the config (`mmit config` lists them). Out: a `Run`, whose folder is the
one that `mmit train` makes. What is given becomes the config that a YAML would be and is checked as that is, once, so
that both ways train the same model to the last bit and each can go on where the other stopped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.config import LORA_DEFAULTS, Config
from mmit.errors import ConfigError
from mmit.records import Record, write_jsonl
from mmit.yamlio import set_key

if TYPE_CHECKING:
    from mmit.generate import Model

Data = str | os.PathLike[str] | Mapping[str, Any] | Record
WHERE = "mmit.train"
RECORDS = "data.jsonl"  # in the run's folder: the records that were given as objects


@dataclass(frozen=True)
class Run:
    """A run that ended."""

    dir: Path
    config: Config
    finished: bool  # False after a signal: the same call with resume="auto" goes on

    @cached_property
    def model(self) -> Model:
        """The trained model, as `mmit.load` gives it."""
        from mmit.generate import load

        return load(self.dir)


def lora(r: int = LORA_DEFAULTS["r"], *, lr: float = 2e-4, **options: Any) -> dict[str, Any]:
    """The section tune.llm (or tune.vision) of LoRA with matrices of rank `r` (arXiv:2106.09685).

    `options` are those of the method: alpha, dropout, targets, dora, ... Other methods are written out as dicts:
    {"mode": "full", "lr": 2e-5}.
    """
    return {"mode": "lora", "lr": lr, "options": {"r": r, **options}}


def train(
    model: str | os.PathLike[str] | Mapping[str, Any],
    data: Data | Sequence[Data],
    *,
    dir: str | os.PathLike[str],
    tune: Mapping[str, Mapping[str, Any]] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    resume: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Train a model on records; every rank of a launcher may call it.

    Args:
        model: a run or checkpoint whose weights are the start, and whose config says all that is not given here; or
            the section `model` of a config, {"vision": {...}, "projector": {...}, "llm": {"name": ...}}.
        data: a file of any format mmit reads; a source with the keys of `data.train`, {"path", "weight", ...}; a
            Record; or a list of these.
        dir: folder of the run.
        tune: {"vision" | "projector" | "llm": {"mode", "lr", "options"}}, see `lora`.
        steps, epochs: how long; one epoch if neither is given.
        resume: "auto" goes on where a run in `dir` stopped.
        settings: any other keys of the config: {"train.rows_per_step": 4, "data.max_length": 512}.

    Raises:
        MmitError: an argument that cannot be used, before anything is written, and whatever a run is refused for.
    """
    if steps is None and epochs is None:
        epochs = 1.0
    said: dict[str, Any] = {"run": {"dir": os.fspath(dir), "resume": resume}}
    said["train"] = {"steps": steps, "epochs": epochs}
    if tune is not None:
        said["tune"] = {component: dict(plan) for component, plan in tune.items()}
    config = _config(model, data, said, settings or {})
    from mmit.train.run import run  # after the arguments were checked, so that their errors come at once

    code = run(config)
    return Run(Path(config.run.dir), config, code == 0)


def _config(
    model: str | os.PathLike[str] | Mapping[str, Any],
    data: Data | Sequence[Data],
    said: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> Config:
    """The config that the arguments of `train` stand for; its `to_yaml` is what `mmit train` would read.

    Records given as objects are written into the run's folder, once all else is known to be sound.

    Args:
        model, data, settings: as `train` takes them.
        said: what its other arguments say, by section: the sections run and train keep the other keys of a model's
            own config, tune is as it is here.

    Raises:
        ConfigError: a key, type or value that a config cannot have.
    """
    given = [data] if isinstance(data, (str, os.PathLike, Mapping, Record)) else data
    if isinstance(given, Sequence) and not given:
        raise ConfigError(
            "no data", where=f"{WHERE}: data", remedy="give a file, a source, a Record, or a list of these"
        )
    if not isinstance(given, Sequence):
        raise _wrong("data", data, "a file, a source, a Record, or a list of these")
    raw = _start(model)
    for section, keys in said.items():
        raw[section] = dict(keys) if section == "tune" else {**raw.get(section, {}), **keys}
    # Checked without the data first: nothing may be written for a call that is refused.
    folder = Path(said["run"]["dir"])
    records = [source for source in given if isinstance(source, Record)]
    sources = [_source(source) for source in given if not isinstance(source, Record)]
    if records:
        sources.append({"path": str(folder / RECORDS), "format": "mmit"})
    raw["data"] = {**raw.get("data", {}), "train": sources}
    for key, value in settings.items():
        path = tuple(int(k) if k.isdigit() else k for k in key.split("."))
        raw = set_key(raw, path, value, where=f"{WHERE}: settings")
    config = Config.from_dict(raw, where=WHERE)
    if records:
        _write(records, folder)
    return config


def _start(model: Any) -> dict[str, Any]:
    """The sections that follow from `model`."""
    if isinstance(model, Mapping):
        return {"model": dict(model)}
    if not isinstance(model, (str, os.PathLike)):
        raise _wrong("model", model, 'a folder, or a section such as {"llm": {"name": ...}}')
    from mmit.train.checkpoint.model import find, read_config

    folder = find(Path(model))
    raw = read_config(folder).model_dump()
    # The weights go on, in a run of its own: what belonged to the other run alone starts anew.
    del raw["export"], raw["align"]
    run = {key: raw["run"][key] for key in ("seed", "on_bad_record", "max_bad_fraction", "stall_seconds")}
    return {**raw, "run": {**run, "init_from": str(folder)}, "data": {**raw["data"], "eval": []}}


def _source(given: Any) -> dict[str, Any]:
    """A source with the keys of data.train; the format of a bare path is told from the file, as `mmit data import`."""
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, (str, os.PathLike)):
        raise _wrong("data", given, "a file, a source, a Record, or a list of these")
    from mmit.data.formats import detect_format
    from mmit.data.shards.reader import has_index
    from mmit.data.sources import split_subset

    path = os.fspath(given)
    file = split_subset(path)[0]
    return {"path": path, "format": "shards" if has_index(file) else detect_format(file)[0]}


def _write(records: Sequence[Record], folder: Path) -> None:
    """Keep records that were given as objects in the run's folder, from which a resumed run reads them again."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        remedy = "write them to a file first (mmit.records.write_jsonl), and give its path"
        raise ConfigError("several ranks cannot be given Record objects", where=f"{WHERE}: data", remedy=remedy)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(records, folder / RECORDS)


def _wrong(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{name} is a {type(value).__name__}", where=f"{WHERE}: {name}", remedy=f"give {wanted}")
