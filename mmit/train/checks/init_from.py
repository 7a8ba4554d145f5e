"""Weights of an earlier run as the start of another (`run.init_from`): do its parts fit what this config builds?

In: the `model` and `tune` sections of both. Refuses parts that cannot be meant, before anything large is loaded, and
tells every difference that may be: another name for the same weights, another resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError
from mmit.models.tuning import method_of

COMPARED = {
    "vision": ("kind", "name", "weights", "layer", "select", "image_size"),
    "projector": ("kind", "options"),
    "llm": ("name", "revision"),
}
ADAPTERS = {"llm": ("adapter", "LLM"), "vision": ("vision_adapter", "encoder")}  # folder of each, and its name
Sections = Mapping[str, Any]


def check_start(folder: Path, *, then: Sections, now: Sections, say: Callable[[str], None]) -> None:
    """Compare the config of the checkpoint `folder` with this run's.

    Args:
        then, now: {"model": {...}, "tune": {...}} with every key present.

    Raises:
        ConfigError: naming the part that does not fit.
    """
    # Another encoder or kind of projector cannot be meant: its weights would have no place. Other names and resolutions
    # may be; whether shapes fit is then seen tensor by tensor.
    for key, old, new in differences(then["model"], now["model"]):
        if key in ("vision", "projector.kind"):
            part, _, _ = key.partition(".")
            raise ConfigError(
                f"its {part} is {old}, this config's is {new}",
                where=f"run.init_from: {folder}",
                remedy=f"set model.{key} as there, or start from another checkpoint",
            )
        say(f"run.init_from: model.{key} was {old} there and is {new} here")
    for part, (name, _) in ADAPTERS.items():
        old, new = then["tune"][part], now["tune"][part]
        _check_adapter(folder, part, then=old["mode"], now=new["mode"])
        if (folder / name).exists() and "frozen" not in (old["mode"], new["mode"]) and old["options"] != new["options"]:
            say(f"run.init_from: tune.{part}.options was {old['options']} there and is {new['options']} here")


def differences(then: Sections, now: Sections) -> list[tuple[str, Any, Any]]:
    """(key, value then, value now) of what decides the shape and meaning of the weights, where it differs."""
    found = []
    if (then["vision"] is None) != (now["vision"] is None):
        old, new = ("none" if m["vision"] is None else m["vision"]["name"] for m in (then, now))
        return [("vision", old, new)]
    for part, keys in COMPARED.items():
        if now["vision"] is None and part != "llm":
            continue
        pairs = [(f"{part}.{k}", then[part][k], now[part][k]) for k in keys]
        found += [p for p in pairs if p[1] != p[2]]
    return found


def _check_adapter(folder: Path, part: str, *, then: str, now: str) -> None:
    """Raise ConfigError if a part has an adapter around it and a mode that would not train it."""
    name, told = ADAPTERS[part]
    if not (folder / name).exists() or now == "frozen":
        return
    kind = method_of(now).adapter
    # Of a method of the user's own nothing is known: its tensors are compared when they are read.
    if kind is None or method_of(then).adapter not in (None, kind):
        raise ConfigError(
            f"it holds an adapter around the {told} (tune.{part}.mode={then}), from which mode '{now}' cannot go on",
            where=f"run.init_from: {folder}",
            remedy=f"set tune.{part}.mode={then if then != 'frozen' else 'lora'}, or merge the adapter into the {told} "
            "first (mmit merge)",
        )
