"""The sets that come with packages: what their rows state is what their images show; every shipped build runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mmit.build.packages import PACKAGES, measured, package_rows
from mmit.cli import app
from mmit.configs import shipped_banks
from mmit.errors import ConfigError
from mmit.records import read_jsonl
from mmit.templates import load
from mmit.yamlio import parse_yaml
from tests.build.packaged import needs, opened, some

CONFIGS = Path(__file__).parents[2] / "configs"


def packaged() -> dict[str, str]:
    """{config: its set} of the shipped builds over sets of packages."""
    found = {}
    for path in sorted([*CONFIGS.glob("build/*.yaml"), *CONFIGS.glob("packs/*/train.yaml")]):
        settings = parse_yaml(path.read_text("utf-8"), where=str(path))[0]
        if "bank" in settings and "package" in settings["rows"]:
            found[path.relative_to(CONFIGS).as_posix()] = settings["rows"]["package"]
    return found


def test_every_set_has_a_shipped_build():
    assert set(packaged().values()) == set(PACKAGES)


@pytest.mark.parametrize(
    ("config", "name"), [item for item in packaged().items() if item[0].startswith("build/")]
)  # of the packs: test_packs.py
def test_shipped_builds_run_and_account_for_every_row(tmp_path, config, name):
    needs(name)
    out = tmp_path / "out"
    # Images that are set aside need others beside them to draw examples from.
    limit = "60" if "holdout" in (CONFIGS / config).read_text() else "8"
    arguments = ["build", "annotated", str(CONFIGS / config), "--out", str(out), "--limit", limit]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "build.json").read_text())
    assert facts["in"] == sum(facts["accepted"].values()) and not facts["dropped"]
    for path in [*out.glob("records/*.jsonl"), *out.glob("held_out/*.jsonl")]:
        for record in read_jsonl(path):
            assert record.meta["task"] == path.stem and record.meta["cluster"]
            assert bool(record.images) == (name != "vega-tables")
            for image in record.images:
                opened(image)


@pytest.mark.parametrize("name", [name for name in shipped_banks() if name != "wordings"])  # of a study of wordings
def test_shipped_tasks_have_several_wordings_in_both_splits(name):
    banks = [load(str(path)) for path in shipped_banks()[name]]
    assert any(template.inverted for bank in banks for template in bank.templates)
    for bank in banks:
        plain = [t for t in bank.of_split("train") if not t.inverted]
        assert len(plain) >= 2 and bank.of_split("held_out") and bank.cluster and bank.licence


def test_composites_show_what_their_fields_state():
    for row in some("easy-vqa-composites", 12):
        picture = opened(row["image"])
        columns = 2 if row["number"] == 4 else row["number"]
        side = picture.width // columns
        cells = [(at % columns * side, at // columns * side) for at in range(row["number"])]
        seen = [measured(np.asarray(picture.crop((x, y, x + side, y + side))), where="") for x, y in cells]
        assert [(cell["colour"], cell["shape"]) for cell in seen] == list(
            zip(row["colours"], row["shapes"], strict=True)
        )
        assert all(f"a {cell['colour']} {cell['shape']}" in row["described"] for cell in seen)


def test_pairs_are_balanced_and_share_no_image():
    rows = some("easy-vqa-pairs", 150)
    images = [image.source for row in rows for image in row["images"]]
    assert len(set(images)) == len(images)
    for field, attribute in (("same_shape", "shapes"), ("same_colour", "colours")):
        yes = [row for row in rows if row[field] == "yes"]
        assert 0.35 < len(yes) / len(rows) < 0.65
        assert all((len(set(row[attribute])) == 1) == (row[field] == "yes") for row in rows)


def test_the_bars_of_a_chart_are_as_long_as_its_values():
    seen = 0
    for row in some("vega-charts", 8):
        if row["kind"] == "line":
            continue
        pixels = np.asarray(opened(row["image"])).astype(int)
        bars = (np.abs(pixels - (31, 119, 180)).sum(2) < 12).astype(int)  # matplotlib's first colour
        lengths = bars.sum(0 if row["kind"] == "bar" else 1)
        # One run of columns (or rows) is one bar; horizontal bars are drawn from the bottom up.
        runs = [list(run) for filled, run in itertools.groupby(lengths, lambda n: n > 1) if filled]
        longest = [max(run) for run in runs] if row["kind"] == "bar" else [max(run) for run in runs][::-1]
        if len(longest) < row["number"]:
            continue  # a value of nothing draws no bar
        values = [float(value) for value in row["values"]]
        scale = max(longest) / max(values)
        assert all(abs(length - value * scale) <= 2 for length, value in zip(longest, values, strict=True)), row
        assert row["names"][int(np.argmax(longest))] == row["highest"]
        seen += 1
    assert seen


def test_the_ends_of_a_table_stand_out():
    for row in some("vega-tables", 60) + some("vega-tables", 60, "test"):
        values = [float(value) for value in row["values"]]
        assert len(set(values)) == len(values) == row["number"] == len(row["table"].splitlines()) - 1
        assert values[row["names"].index(row["highest"])] == max(values)
        assert values[row["names"].index(row["lowest"])] == min(values)


def test_unknown_sets_and_splits_name_the_nearest():
    with pytest.raises(ConfigError, match="'mnist-5k'"):
        package_rows("mnist-5", "train")
    with pytest.raises(ConfigError, match=r"no such split 'validation'"):
        package_rows("mnist-5k", "validation")
