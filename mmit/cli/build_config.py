"""The YAML file of a build: a mapping of known keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmit.errors import ConfigError, nearest


def read_config(config: Path, keys: tuple[str, ...], inner: Mapping[str, tuple[str, ...]] | None = None) -> Any:
    """Return the settings of a file whose keys are `keys`, those of its sections `inner`. Raises ConfigError."""
    from mmit.templates.bank import read_text
    from mmit.yamlio import parse_yaml

    settings, _ = parse_yaml(read_text(config), where=str(config))
    check_keys(settings, keys, str(config))
    for section, names in (inner or {}).items():
        if settings.get(section) is not None:
            check_keys(settings[section], names, f"{config}: {section}")
    seed = settings.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"is {seed!r}", where=f"{config}: seed", remedy="Give a whole number.")
    return settings


def check_keys(section: Any, keys: tuple[str, ...], where: str) -> None:
    """Refuse what is no mapping, and keys that are not known. Raises ConfigError."""
    if not isinstance(section, Mapping):
        raise ConfigError(f"is a {type(section).__name__}", where=where, remedy=f"Keys: {', '.join(keys)}.")
    for key in section:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}'", where=where, remedy=nearest(str(key), keys))
