"""The records of a run from its config to rows, on measurements of a few numbers; no file is read, no model is run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmit.config import Config
from mmit.errors import RecordError
from mmit.train import records
from mmit.train.engines.world import World
from mmit.train.parts import Start
from mmit.train.records import Feeds, Records, feed, is_cached, read_records, train_data

ALONE = World(0, 1, torch.device("cpu"), deepspeed=False)


def config_of(folder: Path, **sections: dict[str, Any]) -> Config:
    raw: dict[str, Any] = {
        "model": {"vision": None, "llm": {"name": "llm"}},
        "tune": {"llm": {"mode": "lora", "lr": 1e-3}},
        "data": {"train": [{"path": "a.jsonl"}], "packing": False, "group": False, "workers": 3},
        "train": {"epochs": 2.0, "rows_per_step": 4, "micro_rows": 2},
        "run": {"dir": str(folder / "run")},
    }
    return Config.from_dict({key: {**raw.get(key, {}), **sections.get(key, {})} for key in raw}, where="a test")


def measured(units: int = 10, bad: int = 0) -> Any:
    numbers = np.arange(units)
    return SimpleNamespace(
        source=numbers * 0,
        length=numbers + 5,
        seen=numbers * 0,
        shared=0,
        records=units + bad,
        bad=[RecordError(f"bad {n}") for n in range(bad)],
        kept=[{}],
        thoughts=0,
    )


def opened() -> Any:
    return SimpleNamespace(sources=[SimpleNamespace(origin="a.jsonl")])


def model_of(config: Config) -> Any:
    llm = torch.nn.Linear(1, 1)
    llm.config = SimpleNamespace(_commit_hash=None, max_position_embeddings=4096)  # type: ignore[assignment]
    chat = SimpleNamespace(thinks=False, to_json=lambda: {"name": "qa", "thinks": False})
    loaded = SimpleNamespace(config=config, vlm=SimpleNamespace(llm=llm), chat=chat, tokenizer=None)
    return SimpleNamespace(config=config, vlm=loaded.vlm, loaded=loaded, preparation=None, tower="eye")


def start_of(config: Config, said: list[Any]) -> Start:
    heart: Any = SimpleNamespace(phase=lambda name, step: said.append(name), work=lambda: None)
    return Start(config, None, ALONE, said.append, heart)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands in for opening and measuring: its results, and which lists were opened."""
    held: dict[str, Any] = {"train": measured(), "eval": measured(4), "opened": []}

    def open_records(config: Any, part: str, chat: Any, tokenizer: Any, **given: Any) -> Any:
        held["opened"].append(part)
        held["part"] = part
        for error in held.get("unreadable", ()):
            given["on_bad"](error)
        return opened()

    monkeypatch.setattr(records, "open_records", open_records)
    monkeypatch.setattr(records, "measure", lambda data, **given: held[held["part"]])
    monkeypatch.setattr(records, "context_length", lambda llm: None)
    monkeypatch.setattr(records, "virtual_tokens", lambda llm: 0)
    monkeypatch.setattr(records.identity, "contents", lambda data, scan: "contents")
    monkeypatch.setattr(records.identity, "base_content", lambda name, **given: None if given["unused"] else name)
    return held


def test_held_out_records_are_opened_where_there_are_any(tmp_path: Path, reading: dict[str, Any]) -> None:
    config = config_of(tmp_path)
    assert read_records(start_of(config, []), model_of(config)).eval is None and reading["opened"] == ["train"]
    config = config_of(tmp_path, data={"eval": [{"path": "b.jsonl"}]})
    found = read_records(start_of(config, []), model_of(config))
    assert found.eval is not None and found.eval[1] is reading["eval"] and reading["opened"][1:] == ["train", "eval"]
    assert found.row_order.steps == 5 and found.order["content"]["sources"] == "contents"


def test_thoughts_in_the_data_are_told_to_the_chat_format(tmp_path: Path, reading: dict[str, Any]) -> None:
    config = config_of(tmp_path)
    model = model_of(config)
    read_records(start_of(config, []), model)
    assert not model.loaded.chat.thinks
    reading["train"].thoughts = 2
    read_records(start_of(config, []), model)
    assert model.loaded.chat.thinks


def test_rows_that_are_no_records_count_among_the_bad(tmp_path: Path, reading: dict[str, Any]) -> None:
    reading["train"], reading["unreadable"] = measured(bad=1), [RecordError("no JSON")]
    config = config_of(tmp_path, run={"on_bad_record": "skip", "max_bad_fraction": 0.2})
    said: list[Any] = []
    (tmp_path / "run").mkdir()
    read_records(start_of(config, said), model_of(config))
    assert any("2 bad records are left out" in str(line) for line in said)
    reading["train"] = measured(bad=2)
    with pytest.raises(RecordError, match="3 of 12 records are bad"):
        read_records(start_of(config, []), model_of(config))


@pytest.mark.parametrize(("mode", "unused"), [("lora", False), ("full", True)])
def test_what_a_run_builds_on_leaves_out_a_base_that_is_in_every_checkpoint(
    tmp_path: Path, reading: dict[str, Any], mode: str, unused: bool
) -> None:
    config = config_of(tmp_path, tune={"llm": {"mode": mode, "lr": 1e-3}})
    content = read_records(start_of(config, []), model_of(config)).order["content"]
    assert content["llm"] == (None if unused else "llm")
    assert content["vision"] == "eye" and content["chat"] == {"name": "qa"} and content["deepspeed"] is None


def test_the_loop_gets_rows_of_training_and_each_held_out_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "row_planner", lambda vlm: "planner")
    config = config_of(tmp_path)
    ordered: Any = SimpleNamespace(name="order")
    given = Records(opened(), measured(), ordered, {}, (opened(), measured(7)))
    features: Any = object()
    feeds = feed(start_of(config, []), model_of(config), given, engine=None, features=features)  # type: ignore[arg-type]
    assert feeds.train.row_order is ordered and feeds.train.features is features and feeds.references is None
    assert feeds.train.plan_row == "planner"
    assert feeds.eval is not None and feeds.eval.features is None  # its images go through the tower each time
    held = feeds.eval.row_order
    units = [unit for place in range(held.total_rows) for unit in held.row(place) or []]
    assert sorted(units) == list(range(7)) and held.rows_per_step == 2
    assert feeds.preference("train") is None
    at_work: Any = SimpleNamespace(at_work=lambda part: f"at work on {part}")
    assert Feeds(feeds.train, None, at_work).preference("eval") == "at work on eval"


def test_what_is_said_beside_the_config_goes_before_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, run={"on_bad_record": "skip", "max_bad_fraction": 0.5})
    rows: Any = None
    own = train_data(config, opened(), measured(), rows, world=ALONE, load_image=None)
    assert (own.micro_rows, own.skip_bad, own.max_bad, own.workers, own.rank, own.world) == (2, True, 5, 3, 0, 1)
    other = train_data(config, opened(), measured(), rows, world=ALONE, load_image=None, workers=0, max_bad=9)
    assert (other.workers, other.max_bad, other.skip_bad) == (0, 9, True)


def test_features_are_cached_where_there_is_an_encoder_and_a_cache(tmp_path: Path) -> None:
    assert not is_cached(config_of(tmp_path))
    for cache in ("off", "memory", "disk"):
        vision = {"kind": "hf", "name": "eye", "cache": cache}
        assert is_cached(config_of(tmp_path, model={"vision": vision})) is (cache != "off")
