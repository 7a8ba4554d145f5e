"""Answers scored by the public scorers' own code; ours must agree exactly."""

import json
from pathlib import Path

import pytest

from mmit.eval.metrics import choice, mmmu, similarity, vqa, yesno

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())
# The vectors' names of the VQA profiles.
VQA = {
    "evalai_m4c": "evalai",
    "official_punct_digit": "official",
    "official": "official",
    "vlmeval": "vlmeval",
}


def rows(key):
    return [pytest.param(row, id=f"{key}-{i}") for i, row in enumerate(VECTORS[key])]


@pytest.mark.parametrize("row", rows("vqa_normalise"))
def test_vqa_normalise(row):
    for column, profile in VQA.items():
        if column in row:
            assert vqa.normalise(row["input"], profile=profile) == row[column], profile


@pytest.mark.parametrize("row", rows("vqa_score"))
def test_vqa_score(row):
    for column, profile in VQA.items():
        if column in row:
            assert vqa.vqa_accuracy([row["pred"]], [row["gt"]], profile=profile).value == row[column], profile


@pytest.mark.parametrize("row", rows("anls_0.5"))
def test_anls(row):
    assert similarity.anls_one(row["pred"], row["gt"]) == row["score"]


@pytest.mark.parametrize("row", rows("relaxed_0.05"))
def test_relaxed(row):
    assert similarity.relaxed_one(row["pred"], row["gt"]) == row["ok"]


@pytest.mark.parametrize("row", rows("mme_parse"))
def test_mme(row):
    assert yesno.MME["lmms"](row["pred"]) == row["out"]


@pytest.mark.parametrize("row", rows("pope_official"))
def test_pope(row):
    assert yesno.pope([row["pred"]], ["yes"], profile="official").details["parsed"] == [row["out"]]


@pytest.mark.parametrize("row", rows("mcq_extract"))
def test_mcq(row):
    assert choice.extract_letter(row["pred"]) == row["out"]


@pytest.mark.parametrize("row", rows("mmmu_mc"))
def test_mmmu_choice(row):
    assert mmmu.parse_choice(row["pred"], ["cat", "dog", "bird", "fish"]) == row["out"]


@pytest.mark.parametrize("row", rows("mmmu_open"))
def test_mmmu_open(row):
    assert mmmu.open_correct(row["pred"], row["gt"]) == row["ok"]
