"""mmit.yamlio reads and writes the same with libyaml and, where PyYAML was built without it, with PyYAML alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from mmit import yamlio
from mmit.errors import ConfigError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "mmit" / "configs").rglob("*.yaml")])
ODD = ["\ufeffa: 1", "a: \U0001f600x", "k: |\n  x\n   y\n", "a: [010, 1e-3, off, ~, .inf]", "'': ''", "a: 'it''s'", ""]
WRONG = [
    "a: &x 1\nb: *x\n",
    "a: 1\na: 2\n",
    "run:\n\tdir: a\n",
    "a: 1\n---\nb: 2\n",
    "? [1, 2]\n: x\n",
    "a: !!python/x y",
    "a: b: c",
]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is where PyYAML has no libyaml."""
    assert yamlio.__file__ is not None
    spec = importlib.util.spec_from_file_location("yamlio_without_libyaml", yamlio.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    spec.loader.exec_module(module)
    return module


def test_shipped_files_and_odd_texts_read_alike_and_come_back(plain: ModuleType) -> None:
    assert len(SHIPPED) > 50
    for text in [*(path.read_text() for path in SHIPPED), *ODD]:
        found = yamlio.parse_yaml(text, where="")
        assert found == plain.parse_yaml(text, where=""), text
        for module in (yamlio, plain):
            assert yamlio.parse_yaml(module.dump_yaml(found[0]), where="")[0] == found[0]
            line = module.inline_yaml(found[0])
            assert "\n" not in line and plain.parse_yaml(line, where="")[0] == found[0]


@pytest.mark.parametrize("text", WRONG)
def test_what_one_refuses_the_other_refuses_on_the_same_line(plain: ModuleType, text: str) -> None:
    places = []
    for module in (yamlio, plain):
        with pytest.raises(ConfigError) as refused:
            module.parse_yaml(text, where="c.yaml")
        places.append(str(refused.value).partition(": ")[0])
    assert places[0] == places[1] and places[0].startswith("c.yaml:"), places
