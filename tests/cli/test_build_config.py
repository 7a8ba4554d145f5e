"""The YAML of a build: what is read, and each mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmit.cli.build_config import read_config
from mmit.errors import ConfigError

KEYS, INNER = ("rows", "bank", "seed"), {"rows": ("path", "licence")}


def test_settings_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("bank: b.yaml\nrows: {path: a.csv}\nseed: 0\n")
    assert read_config(path, KEYS, INNER) == {"bank": "b.yaml", "rows": {"path": "a.csv"}, "seed": 0}
    path.write_text("rows: null\n")  # a section that is left out
    assert read_config(path, KEYS, INNER) == {"rows": None}
    path.write_text("rows: [a.csv]\n")  # a section is a mapping where its keys are known
    assert read_config(path, KEYS) == {"rows": ["a.csv"]}


@pytest.mark.parametrize(
    ("text", "where", "told"),
    [
        ("bnak: b.yaml\n", "c.yaml", "unknown key 'bnak'\ndid you mean 'bank'"),
        ("rows: {pth: a.csv}\n", "c.yaml: rows", "unknown key 'pth'\ndid you mean 'path'"),
        ("rows: a.csv\n", "c.yaml: rows", "is a str\nKeys: path, licence."),
        ("rows: []\n", "c.yaml: rows", "is a list"),
        ("- a\n", "c.yaml", "is a list\nKeys: rows, bank, seed."),
        ("seed: yes please\n", "c.yaml: seed", "is 'yes please'\nGive a whole number"),
        ("seed: true\n", "c.yaml: seed", "is True"),
        ("seed: 1.5\n", "c.yaml: seed", "is 1.5"),
        ("seed: null\n", "c.yaml: seed", "is None"),
        ("5: a\n", "c.yaml", "unknown key '5'"),
    ],
)
def test_mistakes_are_named_with_their_place(tmp_path: Path, text: str, where: str, told: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config(path, KEYS, INNER)
    assert error.value.where == str(tmp_path / where) and told in str(error.value)
