"""`mmit build outputs` against a real server: every row answered or dropped with a reason; stopped builds go on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmit.build.replies import problem
from mmit.cli import app
from mmit.records import read_jsonl
from mmit.teachers import Reply
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server
from tests.tiny_run import tiny_config


def write(folder: Path, count: int = 12, **settings) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"instruction": f"Say {n}."}) + "\n" for n in range(count)))
    path = folder / "outputs.yaml"
    path.write_text(dump_yaml({"rows": {"path": "rows.jsonl", "licence": "MIT"}} | settings))
    return path


def teacher(server: Server, **options):
    return {"open": f"{server.url}#m", "terms": "MIT", "pause": 0.01} | options


def run(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["build", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_several_teachers_answer_every_row_and_are_kept_apart(tmp_path):
    def second(body):
        text = body["messages"][-1]["content"]
        return {"Say 1.": "I'm sorry, but I can't.", "Say 2.": "", "Say 3.": "say 3"}.get(text, f"B {text}")

    with Server(lambda body: "A " + body["messages"][-1]["content"]) as one, Server(second) as two:
        both = [teacher(one, name="a"), teacher(two, name="b")]
        (tmp_path / "base.yaml").write_text(tiny_config(tmp_path / "base").to_yaml())
        config = write(tmp_path, teacher=both, base=str(tmp_path / "base.yaml"))
        assert "24 requests" in run("outputs", config, "--out", tmp_path / "out", "--dry-run")
        assert not one.bodies
        said = run("outputs", config, "--out", tmp_path / "out")
        assert one.served == two.served == 12
    assert "outputs-a: 12 records" in said and "outputs-b: 9 records" in said
    records = list(read_jsonl(tmp_path / "out/records/outputs-b.jsonl"))
    assert records[0].turns[-1].text == "B Say 0." and records[0].licence == "MIT"
    build = records[0].meta["build"]
    assert build["teacher"] == "b" and build["parents"] == ["1"] and build["request"]
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines()]
    assert sorted(row["reason"] for row in dropped) == ["a refusal", "empty", "repeats the prompt"]
    stated = json.loads((tmp_path / "out/build.json").read_text())
    assert stated["in"] == 24 == sum(stated["accepted"].values()) + sum(stated["dropped"].values())
    assert stated["ledger"]["a"]["outputs"]["requests"] == 12
    assert "12 requests in 12 attempts" in run("status", tmp_path / "out")
    checked = CliRunner().invoke(app, ["data", "check", str(tmp_path / "out/mixture.yaml")])
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize("thoughts", ["drop", "keep"])
def test_thoughts_are_told_from_answers_and_kept_on_request(tmp_path, thoughts):
    def answer(body):
        text = body["messages"][-1]["content"]
        return {"Say 0.": "<think>\nhm\n</think>\n\nzero", "Say 1.": "only </think> one", "Say 2.": "<think>lost"}[text]

    with Server(answer) as server:
        said = run("outputs", write(tmp_path, 3, teacher=teacher(server), thoughts=thoughts), "--out", tmp_path / "out")
    turns = [record.turns[-1] for record in read_jsonl(tmp_path / "out/records/outputs-m.jsonl")]
    assert [turn.text for turn in turns] == ["zero", "one"]
    assert [turn.thinking for turn in turns] == (["hm", "only"] if thoughts == "keep" else [None, None])
    stated = json.loads((tmp_path / "out/build.json").read_text())
    assert stated["thoughts"] == {"replies": 3, "kept": thoughts == "keep"}
    assert stated["dropped"] == {"a thought without an answer": 1} and "3 replies held thoughts" in said


def test_kill_9_loses_at_most_what_is_in_flight_and_a_second_process_is_refused(tmp_path):
    with Server(lambda body: "A " + body["messages"][-1]["content"]) as server:
        server.pause = 0.15
        config = write(tmp_path, 40, teacher=teacher(server, in_flight=2))
        command = [sys.executable, "-m", "mmit", "build", "outputs", str(config), "--out", str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        while server.served < 4:
            time.sleep(0.01)
            assert process.poll() is None
        assert "another build is writing here" in run("outputs", config, "--out", tmp_path / "out", code=2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.05)
        while server.at_once:  # those in flight are still served
            time.sleep(0.01)
        assert server.served < 40
        server.pause = 0
        run("outputs", config, "--out", tmp_path / "out")
        assert 40 <= server.served <= 42
        assert len(list(read_jsonl(tmp_path / "out/records/outputs-m.jsonl"))) == 40


def test_a_full_disk_is_one_error_and_the_build_goes_on_once_there_is_room(tmp_path):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    with Server(lambda body: "A " + body["messages"][-1]["content"]) as server:
        config = write(tmp_path, 30, teacher=teacher(server, in_flight=1))
        command = [sys.executable, "-m", "mmit", "build", "outputs", str(config), "--out", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, check=False)
        assert done.returncode not in (0, 3) and "Traceback" not in done.stderr
        assert "The disk is full" in done.stderr and "journal.jsonl" in done.stderr
        journal = (tmp_path / "out/journal.jsonl").read_bytes()
        kept = journal.count(b"\n") - 1
        assert journal.endswith(b"\n") and 3 <= kept < 30
        before = server.served
        assert before - kept <= 1
        run("outputs", config, "--out", tmp_path / "out")
        assert server.served == before + 30 - kept
    assert len(list(read_jsonl(tmp_path / "out/records/outputs-m.jsonl"))) == 30


def test_the_terms_of_the_teacher_are_held_against_the_list(tmp_path):
    with Server(lambda body: "A " + body["messages"][-1]["content"]) as server:
        for terms, said in (("CC-BY-NC-4.0", r"CC-BY-NC-4.0 \(3 rows\)"), (None, r"LicenseRef-unknown \(3 rows\)")):
            config = write(tmp_path, 3, teacher=teacher(server, terms=terms), allow_licences=["MIT"])
            assert re.search(said, run("outputs", config, "--out", tmp_path / f"{terms}", code=2))
        allowed = ["MIT", "CC-BY-NC-4.0"]
        config = write(tmp_path, 3, teacher=teacher(server, terms="CC-BY-NC-4.0"), allow_licences=allowed)
        run("outputs", config, "--out", tmp_path / "CC-BY-NC-4.0")  # the replies of the refused build are there
        assert server.served == 6
    (record, *_) = read_jsonl(tmp_path / "CC-BY-NC-4.0/records/outputs-m.jsonl")
    assert record.licence == "CC-BY-NC-4.0 AND MIT"
    stated = {"how", "template", "teacher", "request", "requests", "prompt", "parents", "seed", "score"}
    assert record.meta["build"].keys() == stated and record.meta["task"] == "outputs-m"


def test_pictures_of_records_are_shown_and_their_own_answers_are_not(tmp_path):
    from mmit.records import Record, write_jsonl

    PIL.Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    record = Record.triple("Which colour?", "secret", images=[str(tmp_path / "a.png")], id="r", licence="MIT")
    write_jsonl([record], tmp_path / "in.jsonl")
    with Server(lambda body: "Red.") as server:
        config = tmp_path / "c.yaml"
        config.write_text(dump_yaml({"records": "in.jsonl", "teacher": teacher(server)}))
        run("outputs", config, "--out", tmp_path / "out")
        assert "secret" not in json.dumps(server.bodies) and "image_url" in json.dumps(server.bodies)
    (made,) = read_jsonl(tmp_path / "out/records/outputs-m.jsonl")
    assert made.turns[-1].text == "Red." and len(made.images) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Fine.", ""),
        ("  ", "empty"),
        ("caf\ufffd", "not valid UTF-8"),
        ("I'm sorry, I cannot do that.", "a refusal"),
        ("As an AI language model, ...", "a refusal"),
        ("I am sorry to hear that you are ill. Rest.", ""),
        ("Yes.\nHuman: and then?", "role tags or control tokens"),
        ("Yes.<|im_end|>", "role tags or control tokens"),
        ("In short: human: a person", ""),
        ("what is it", "repeats the prompt"),
    ],
)
def test_reasons(text, reason):
    assert problem(Reply("", "t", text), "What is it?") == reason


def test_replies_that_were_cut_or_refused():
    assert problem(Reply("", "t", "long", "length")) == "cut off by length"
    assert problem(Reply("", "t", "no", "refused")) == "refused by the server"
