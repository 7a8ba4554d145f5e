"""Selection: scores of a judge and of a loss, bounds, order, likeness, and the control beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmit.build.select import Keep, Scored, control, judge_request, loss_requests, losses, score_in, select
from mmit.cli import app
from mmit.records import Image, Record, Text, Turn, write_jsonl
from mmit.teachers import Desk, Draw, Journal, Reply
from mmit.teachers.local import Local
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server
from tests.test_generate import build as tiny

WORDS = "list name sort explain compare rivers metals poems songs taxes rules birds dates coins fruits cities".split()


def record(n: int, *, image: str = "", text: str = "") -> Record:
    prompt = text or " ".join(WORDS[(n * k + k * k) % 16] for k in (1, 3, 5, 7, 11))
    images = [image] if image else []
    return Record.triple(prompt, f"answer {n}", images=images, id=str(n), source="s", row=n, licence="MIT")


def kept(scored, **options) -> list[str]:
    return [made.record.id for made in select(scored, Keep(**options)) if hasattr(made, "record")]


def test_bounds_order_share_and_number_with_a_reason_for_all_that_goes():
    scored = [Scored(record(n), float(n % 6)) for n in range(12)] + [Scored(record(12), None, "no score")]
    assert kept(scored, least=4) == ["4", "5", "10", "11"]
    assert kept(scored, most=1, highest=False) == ["0", "1", "6", "7"]
    assert kept(scored, number=3) == ["4", "5", "11"]  # ties go to the earlier one
    assert kept(scored, share=0.25) == ["4", "5", "11"]  # of the 12 that have a score
    found = list(select(scored, Keep(least=1, number=3)))
    reasons = [item.reason for item in found if hasattr(item, "reason")]
    assert len(found) == 13 and {*reasons} == {"the score is too low", "not among the best", "no score"}


def test_like_records_stay_out_unless_their_images_differ():
    same = [record(n, text="Which colour has the shape in the middle?") for n in range(3)]
    assert kept([Scored(one, float(n)) for n, one in enumerate(same)], rouge_l=0.7) == ["2"]
    shown = [record(n, image=f"{n // 2}.png", text="Which colour has the shape?") for n in range(4)]
    assert kept([Scored(one, float(n)) for n, one in enumerate(shown)], rouge_l=0.7) == ["1", "3"]
    long = " ".join(WORDS * 2)
    near = [record(0, text=long), record(1, text=long), record(2)]
    assert kept([Scored(one, 1.0) for one in near], near_duplicates=True) == ["0", "2"]


def test_the_control_has_the_same_size_and_is_drawn_from_all_that_have_a_score():
    scored = [Scored(record(n), float(n)) for n in range(50)] + [Scored(record(50), None, "no score")]
    first = [made.record.id for made in control(scored, 10, seed=0)]
    assert len(first) == 10 and first != [made.record.id for made in control(scored, 10, seed=1)]
    assert all(made.record.id != "50" for made in control(scored, 50, seed=0))


@pytest.mark.parametrize(
    ("text", "score", "reason", "finish"),
    [
        ("Score: 4", 4.0, "", "stop"),
        ("**Score:** 4.5, since it", 4.5, "", "length"),
        ("Score\uff1a3", 3.0, "", "stop"),
        ("5", 5.0, "", "stop"),
        ("4 of 5", 4.0, "", "stop"),
        ("It is good.", None, "no score in the judge's reply", "stop"),
        ("", None, "no score in the judge's reply", "length"),
        ("Score: 4. No, score: 2", None, "several scores in the judge's reply", "stop"),
        ("Score: 9", None, "a score off the scale", "stop"),
        ("Score: -1", None, "a score off the scale", "stop"),
        ("", None, "refused by the server", "refused"),
    ],
)
def test_a_judges_reply(text, score, reason, finish):
    assert score_in(Reply("", "t", text, finish), (1, 5)) == (score, reason)


def test_a_judge_sees_the_images_and_every_turn():
    turns = (
        Turn("user", (Image("a.png"), Text("Which?"))),
        Turn("assistant", (Text("Red."),)),
        Turn("user", (Text("Sure?"),)),
        Turn("assistant", (Text("Yes."),)),
    )
    asked = judge_request(Record(turns), Draw(), (1, 5)).messages[0]
    assert asked.parts[0] == Image("a.png") and all(word in asked.text for word in ("Which?", "Red.", "Sure?", "Yes."))


def test_the_loss_is_the_models_own_mean_over_all_answers(tmp_path):
    model = tiny(vision=False)
    both = Record(
        (
            Turn("user", (Text("one"),)),
            Turn("assistant", (Text("a b"),)),
            Turn("user", (Text("two"),)),
            Turn("assistant", (Text("c d e f"),)),
        ),
        id="x",
    )
    records = [both, record(1), Record((Turn("user", (Text("no answer"),)), Turn("assistant", (Text("  "),))), id="y")]
    teacher = Local("tiny", model=model, batch_size=2)
    found = losses(records, Desk([teacher], Journal(tmp_path / "j.jsonl", {})))
    whole = sum(
        model.score([Record(request.messages)], [[request.messages[-1].text]], with_end=True)[0][0]
        for request in loss_requests(both)
    )
    replies = [json.loads(line) for line in (tmp_path / "j.jsonl").read_text().splitlines()[1:]]
    tokens = sum(json.loads(row["reply"]["text"])["tokens"] for row in replies[:2])
    assert found[0].score == pytest.approx(-whole / tokens, abs=1e-4) and found[1].score > 0
    assert found[2].reason == "no answer to score"
    with Server() as server:
        described = {"records": "in.jsonl", "score": {"by": "loss"}, "teacher": f"{server.url}#m"}
        write_jsonl([record(1)], tmp_path / "in.jsonl")
        assert "an endpoint does not tell the likelihood" in run(tmp_path, code=2, **described)


def test_a_prompt_without_room_is_one_drop_and_the_others_are_answered(tmp_path):
    from mmit.teachers import Request
    from mmit.teachers.request import user

    model = tiny(vision=False)
    long = "word " * 3000
    work = Desk([Local("tiny", model=model)], Journal(tmp_path / "j", {}))
    replies = work.ask([Request(user(long), Draw(max_tokens=2)), Request(user("hi"), Draw(max_tokens=2))])
    assert replies[0].finish == "length" and not replies[0].text and replies[1].new_tokens
    scored = losses([Record.triple(long, "a"), Record.triple("hi", "a")], work)
    assert scored[0].reason == "cut off by length" and scored[1].score is not None


def run(folder: Path, *options: object, code: int = 0, **settings) -> str:
    (folder / "c.yaml").write_text(dump_yaml(settings))
    command = ["build", "select", str(folder / "c.yaml"), "--out", str(folder / "out"), *map(str, options)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == code, result.output
    return result.output
