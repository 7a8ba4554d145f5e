"""After the first start, none measures again: not a run, a resume or a dry run, which leaves no trace of itself."""

from __future__ import annotations

import json
import shutil

from mmit.data import measure
from mmit.forecast.forecast import forecast
from mmit.train.run import run
from tests.tiny_run import tiny_config


def test_later_starts_map_what_the_first_one_found(tmp_path, monkeypatch):
    data = {"cache_dir": str(tmp_path / "cache")}
    talk = [{"from": "human", "value": "Say a number."}, {"from": "gpt", "value": "7"}]
    rows = [{"id": str(i), "conversations": talk if i != 3 else []} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = {"path": str(tmp_path / "rows.json"), "format": "sharegpt"}
    skip = {"on_bad_record": "skip", "max_bad_fraction": 0.1}

    step = {"rows_per_step": 1, "save_every": 1, "keep_last": 10}

    def config(name: str, **more):
        base = tiny_config(tmp_path, run={"dir": str(tmp_path / name), **skip, **more.get("run", {})})
        settings = {**base.data.model_dump(), **data, "train": [source]}
        return base.model_copy(
            update={
                "data": type(base.data).model_validate(settings),
                "train": base.train.model_copy(update={"steps": None, "epochs": 1.0, **step}),
            }
        )

    expected = forecast(config("dry"))
    assert run(config("first")) == 0
    monkeypatch.setattr(measure, "_measure", None)
    assert run(config("second")) == 0
    for late in sorted((tmp_path / "first" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(late)  # as if it had been killed after its first checkpoint
    (tmp_path / "first" / "finished.json").unlink()
    assert run(config("first", run={"resume": "auto"})) == 0
    bad = [(tmp_path / name / "bad_records.jsonl").read_text() for name in ("first", "second")]
    assert bad[0] == bad[1] and bad[0].count("rows.json:4") == 1  # counted at every start
    found = forecast(config("dry"))
    assert found.records == found.measured == 20 and found.steps == expected.steps
    assert not (tmp_path / "dry").exists()
