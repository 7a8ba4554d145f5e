"""The model card: front matter that the hub takes, what was measured, what a picture is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from mmit.interop.card import model_card
from tests.tiny_run import tiny_config


def card(folder: Path, **options: Any) -> str:
    config = tiny_config(folder).model_dump()
    config["data"]["train"].append({**config["data"]["train"][0], "path": "owner/pictures", "name": None})
    given = {"format": "llava-hf", "step": 6, "licence": "apache-2.0", **options}
    return model_card(config, checkpoint=folder / "run" / "checkpoints" / "step-6", **given)


def report(folder: Path, task: str, model: str) -> None:
    place = folder / "run" / "eval" / task
    place.mkdir(parents=True)
    told = {"model": f"/runs/{model}", "task": task, "metric": "exact", "accuracy": 0.625, "ci95": [0.5, 0.75], "n": 80}
    (place / "report.json").write_text(json.dumps(told))


def test_the_hub_reads_what_was_measured(tmp_path: Path) -> None:
    report(tmp_path, "easy_vqa", "step-6")
    report(tmp_path, "other", "step-3")  # of another checkpoint
    found = ModelCard(card(tmp_path, image="16 x 16 pixels, resize, 4 tokens"))
    data = found.data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "image-text-to-text", "transformers")
    assert data.datasets == ["owner/pictures"]
    (result,) = data.eval_results or []
    assert (result.task_type, result.dataset_type, result.metric_type) == ("image-text-to-text", "easy_vqa", "exact")
    assert result.metric_value == 0.625
    assert "| easy_vqa | exact | 62.5% | 50.0% to 75.0% | 80 |" in found.text
    assert "a picture is 16 x 16 pixels, resize, 4 tokens" in found.text
    assert "## Limits" in found.text and "at most 128 tokens" in found.text


def test_a_model_without_reports_claims_nothing(tmp_path: Path) -> None:
    found = ModelCard(card(tmp_path, licence=None))
    assert found.data.eval_results is None and found.data.license is None
    assert "has not been evaluated" in found.text and "a picture is" not in found.text
