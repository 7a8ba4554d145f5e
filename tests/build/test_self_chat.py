"""Self-chat: every malformed transcript has a reason; the alternating loop, its end, and images in the first turn."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
from typer.testing import CliRunner

from mmit.cli import app
from mmit.records import read_jsonl
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server


def build(folder: Path, server: Server, topics, **settings) -> str:
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in topics))
    teacher = {"open": f"{server.url}#m", "terms": "MIT"}
    described = {"path": "topics.jsonl", "licence": "MIT"} | settings.pop("rows", {})
    (folder / "c.yaml").write_text(dump_yaml({"rows": described, "teacher": teacher} | settings))
    result = CliRunner().invoke(app, ["build", "self-chat", str(folder / "c.yaml"), "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return result.output


def said(body) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_both_sides_alternate_until_the_user_ends_or_the_rounds_are_over(tmp_path):
    def answer(body):
        text = said(body)
        if "You are a person" not in text:
            return f"Answer {len(body['messages'])}."
        if "refuse" in text:
            return "I'm sorry, but I can't."
        return "[END]" if "stop early" in text and "Answer" in text else "Question?"

    PIL.Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    rows = [{"topic": topic, "image": "a.png"} for topic in ("rivers", "stop early", "refuse")] + [{"topic": 3}]
    rows[3]["image"] = "a.png"
    with Server(answer) as server:
        build(tmp_path, server, rows, rounds=2, rows={"images": ["image"]})
        before = server.served
        assert before == 4 + 3 + 1
        build(tmp_path, server, rows, rounds=2, rows={"images": ["image"]})
        assert server.served == before
    long, short = read_jsonl(tmp_path / "out/records/self-chat.jsonl")
    assert [turn.text for turn in long.turns] == ["Question?", "Answer 1.", "Question?", "Answer 3."]
    assert [turn.text for turn in short.turns] == ["Question?", "Answer 1."]
    assert len(long.images) == 1 and long.images[0] in long.turns[0].parts
    dropped = [json.loads(line)["reason"] for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert dropped == ["the topic is no text", "a refusal"]


def test_a_transcript_takes_one_request(tmp_path):
    with Server(lambda body: "[Human] Hi.\n[AI] Hello.\n[Human] Why?\n[AI] So.") as server:
        build(tmp_path, server, [{"topic": "a"}, {"topic": "b"}], style="transcript")
        assert server.served == 2
    first, _ = read_jsonl(tmp_path / "out/records/self-chat.jsonl")
    assert [turn.text for turn in first.turns] == ["Hi.", "Hello.", "Why?", "So."]
