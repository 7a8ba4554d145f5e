"""A build that asks teachers: which settings may change while it goes on, and what it refuses to go on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmit.build.session import JOURNAL, draw_of, forecast, session, status, thought_facts
from mmit.errors import ConfigError
from mmit.records import Image, Text, Turn
from mmit.teachers import Draw, Reply, Request
from mmit.teachers.request import user

SETTINGS: dict[str, Any] = {"teacher": {"open": "https://h/v1#m", "in_flight": 2}, "seed": 1, "rows": {"path": "a"}}


def opened(out: Path, **changes: Any) -> dict[str, Any]:
    """Open the desk of a build, write one reply and return the header of its journal."""
    with session(SETTINGS | changes, out, folder=str(out.parent)) as desk:
        desk.journal.add(Request(user("q")), Reply("1", "m", "a", prompt_tokens=2, new_tokens=1))
    return json.loads((out / JOURNAL).read_text().splitlines()[0])["settings"]


def other(**changes: Any) -> dict[str, Any]:
    return {"teacher": SETTINGS["teacher"] | changes}


@pytest.mark.parametrize(
    "change",
    [
        {"budget": {"tokens": 5}},
        {"allow_licences": ["MIT"]},
        {"cap": 10},
        {"base": "base.yaml"},
        {"thoughts": "keep"},
        {"target": 4},
        {"patience": 1},
        {"draw": None},
        other(in_flight=8, price={"input": 1.0}, per_minute=10, terms="MIT"),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_no_request_may_change_between_two_runs(tmp_path: Path, change: dict[str, Any]) -> None:
    first = opened(tmp_path / "out")
    assert opened(tmp_path / "out", **change) == first
    assert first == {"teacher": [{"open": "https://h/v1#m"}], "seed": 1, "rows": {"path": "a"}}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 2}, "seed"),
        ({"draw": {"temperature": 1}}, "draw"),
        ({"rows": {"path": "b"}}, "rows"),
        (other(open="https://h/v1#n"), "teacher"),
        ({"teacher": ["https://h/v1#m", "https://h/v1#n"]}, "teacher"),
    ],
    ids=["seed", "draw", "rows", "model", "one_more"],
)
def test_what_decides_the_requests_may_not(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    opened(tmp_path / "out")
    told = f"the journal is of another config: {key} was"
    with pytest.raises(ConfigError, match=told) as error:
        opened(tmp_path / "out", **change)
    assert error.value.where == str(tmp_path / "out" / JOURNAL)
    assert opened(tmp_path / "out")  # and the build itself goes on


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="the folder is not empty and holds no journal"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("")  # left by a start that was refused
    assert opened(tmp_path / "out")


def test_two_builds_do_not_write_one_folder(tmp_path: Path) -> None:
    with (
        session(SETTINGS, tmp_path / "out", folder=""),
        pytest.raises(ConfigError, match="another build is writing here"),
        session(SETTINGS, tmp_path / "out", folder=""),
    ):
        pass
    opened(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "where", "told"),
    [
        ({"thoughts": "hide"}, "thoughts", "Write drop or keep"),
        ({"choose": [1, 2]}, "choose", r"1 weights such as"),
        ({"choose": [0]}, "choose", r"is \[0\]"),
        ({"choose": [True]}, "choose", r"is \[True\]"),
        ({"choose": [-1]}, "choose", r"is \[-1\]"),
        ({"choose": "random"}, "choose", "Write all, in_turn"),
        ({"budget": {"tokens": 0}}, "budget", "tokens: 0"),
    ],
)
def test_settings_that_cannot_be_are_told_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], where: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        opened(tmp_path / "out", **change)
    assert error.value.where == where and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("choose", "weights"), [(None, None), ("all", None), ("in_turn", None), ([2.5], [2.5])])
def test_shares_reach_the_desk(tmp_path: Path, choose: Any, weights: Any) -> None:
    with session(SETTINGS | {"choose": choose, "thoughts": "keep"}, tmp_path / "out", folder="") as desk:
        assert desk.weights == weights and desk.keep_thoughts


def test_workers_are_those_of_ray(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="counts the actors of --executor ray") as error,
        session(SETTINGS, tmp_path / "out", folder="", workers=2),
    ):
        pass
    assert error.value.where == "--workers"


def test_a_draw_is_what_the_config_says_over_the_stage_s_own() -> None:
    assert draw_of({}, max_tokens=7) == Draw(max_tokens=7)
    assert draw_of({"draw": {"top_p": 0.5, "max_tokens": 9}}, max_tokens=7) == Draw(top_p=0.5, max_tokens=9)
    for given, told in (
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"seed": 1}, "unknown key 'seed'"),  # a stage gives each request its own
        ({"top_p": "1"}, "top_p is '1'"),
        ({"top_p": True}, "top_p is True"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ([1], "is no mapping"),
    ):
        with pytest.raises(ConfigError, match=told) as error:
            draw_of({"draw": given})
        assert error.value.where == "draw"


class Priced:
    def __init__(self, **price: float) -> None:
        self.price = price


def test_a_forecast_states_the_highest_price_and_none_where_a_teacher_has_none() -> None:
    shown = Turn("user", (Image(b"1"), Image(b"2"), Text("12345678")))
    requests = [Request(user("1234" * 100), Draw(max_tokens=50)), Request((shown,), Draw(max_tokens=10))]
    teachers: list[Any] = [Priced(input=2.0, output=1.0), Priced(output=4.0)]
    found = forecast(requests, teachers)
    assert found == {"requests": 2, "prompt_tokens": 102, "new_tokens": 60, "images": 2, "cost": (204 + 240) / 1e6}
    assert forecast(requests, [*teachers, Priced()])["cost"] is None and forecast([], [])["cost"] is None


def test_thoughts_are_counted_wherever_they_stand(tmp_path: Path) -> None:
    with session(SETTINGS, tmp_path / "out", folder="") as desk:
        assert thought_facts(desk) == {}
        replies = [Reply("1", "m", "plain"), Reply("2", "m", "<think>a</think>b"), Reply("3", "m", "b", thought="a")]
        for reply in replies:
            desk.journal.add(Request(user(reply.id)), reply)
        assert thought_facts(desk) == {"thoughts": {"replies": 2, "kept": False}}


def test_a_folder_is_asked_how_far_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither build\.json nor journal\.jsonl"):
        status(tmp_path)
    opened(tmp_path)
    found = status(tmp_path)
    assert not found["finished"] and found["settings"]["seed"] == 1
    assert found["ledger"]["m"]["write"] | {"attempts": 1} == {
        "requests": 1,
        "attempts": 1,
        "prompt_tokens": 2,
        "new_tokens": 1,
        "unstated": 0,
        "cost": 0.0,
    }
    (tmp_path / "build.json").write_text(json.dumps({"in": 3, "accepted": {"a": 3}, "versions": {}}))
    found = status(tmp_path)
    assert found["finished"] and found["in"] == 3 and "versions" not in found and "dropped" not in found
