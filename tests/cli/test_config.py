"""`mmit config`: every key, and a config as it resolves."""

from __future__ import annotations

from mmit.yamlio import parse_yaml
from tests.cli.commands import good, mmit


def test_config_lists_every_key_and_resolves(made):
    from mmit.config import describe

    text = good("config").stdout
    assert all(entry.key in text for entry in describe())
    text = good("config", "--resolve", made / "config.yaml", "train.steps=7").stdout
    resolved, _ = parse_yaml(text, where="")
    assert resolved["train"]["steps"] == 7 and resolved["train"]["schedule"] == "cosine"
    assert mmit("config", "train.steps=7").exit_code == 2
