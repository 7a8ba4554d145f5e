"""Every build has its folder for itself, ends on a full disk or Ctrl-C with nothing left beside, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import typer
from typer.testing import CliRunner

from mmit.cli import app
from mmit.cli.build import app as build_app
from mmit.processes import only_one
from mmit.records import Record, write_jsonl
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server
from tests.test_io import full_disk


def answer(body) -> str:
    """Enough for every build: a numbered list where one is asked for, one word else."""
    content = json.dumps(body["messages"])
    if "numbered from" not in content:
        return "Class label: a\nInput: b" if "Class label" in content else f"Output: {hash(content)}"
    words = "list name sort explain compare rivers metals poems songs taxes rules birds".split()
    return "\n".join(f"{n}. {' '.join(words[(n * 5 + k) % 12] for k in range(5))} {hash(content)}" for n in range(20))


def rows(folder: Path, **field: str) -> dict[str, object]:
    lines = [json.dumps({key: f"{text} {n}." for key, text in field.items()}) + "\n" for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return {"path": "rows.jsonl", "licence": "MIT"}


def annotated(folder: Path) -> dict[str, object]:
    bank = {
        "task": "t",
        "licence": "MIT",
        "fields": ["text"],
        "templates": [{"id": "a", "input": "{{ text }}", "target": "yes"}],
    }
    (folder / "bank.yaml").write_text(dump_yaml(bank))
    return {"rows": rows(folder, text="A text of several words"), "bank": "bank.yaml"}


def self_instruct(folder: Path) -> dict[str, object]:
    seeds = [{"instruction": f"Say the number {n} in words.", "instances": []} for n in range(9)]
    (folder / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    return {"seeds": "seeds.jsonl", "licence": "MIT", "target": 6}


def conversations(folder: Path) -> dict[str, object]:
    PIL.Image.new("RGB", (4, 4)).save(folder / "a.png")
    row = {"image": "a.png", "captions": ["A cup."]}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 30)
    return {"rows": {"path": "rows.jsonl", "licence": "MIT"}, "kinds": ["detail"]}


def select(folder: Path) -> dict[str, object]:
    write_jsonl([Record.triple(f"Say {n}.", f"It is {n}.", id=str(n)) for n in range(30)], folder / "rows.jsonl")
    return {"records": "rows.jsonl", "licence": "MIT", "score": {"by": "none"}, "keep": {"number": 20}}


def holdout(folder: Path) -> dict[str, object]:
    told = [{"task": task, "cluster": task} for task in ("a", "b")]
    records = [Record.triple(f"Say {n}.", f"It is {n}.", id=str(n), licence="MIT", meta=told[n % 2]) for n in range(30)]
    write_jsonl(records, folder / "rows.jsonl")
    return {"records": "rows.jsonl", "holdout": {"clusters": ["a"]}, "check": ["image", "source"]}


# command -> the settings of a build whose files are in a folder, without its teacher
BUILDS: dict[str, Callable[[Path], dict[str, object]]] = {
    "annotated": annotated,
    "outputs": lambda folder: {"rows": rows(folder, instruction="Say")},
    "self-instruct": self_instruct,
    "conversations": conversations,
    "select": select,
    "holdout": holdout,
    "self-chat": lambda folder: {"rows": rows(folder, topic="About"), "rounds": 2},
}


ALONE = ("annotated", "select", "holdout")  # they ask no teacher, so they have no journal to go on from


def test_every_command_that_builds_is_tried() -> None:
    commands = typer.main.get_command(build_app).commands  # type: ignore[attr-defined]
    assert {name for name, one in commands.items() if "out" in {p.name for p in one.params}} == BUILDS.keys()


@pytest.fixture(params=BUILDS)
def build(request, tmp_path):
    """The words of a command of each kind, and the server that its teacher is."""
    command = request.param
    (tmp_path / "in").mkdir()
    settings = BUILDS[command](tmp_path / "in")
    with Server(answer) as server:
        if command not in ALONE:
            settings["teacher"] = {"open": f"{server.url}#m", "terms": "MIT", "in_flight": 2}
        (tmp_path / "in" / "c.yaml").write_text(dump_yaml(settings))
        yield ["build", command, str(tmp_path / "in" / "c.yaml"), "--out", str(tmp_path / "out")], server


def beside(folder: Path) -> list[str]:
    """What is neither input nor output."""
    return sorted(p.name for p in folder.iterdir() if p.name not in ("in", "out"))


def test_a_second_build_is_refused_at_once_and_drafts_of_killed_ones_go(build, tmp_path):
    command, server = build
    lock = tmp_path / ".out.lock" if command[1] in ALONE else tmp_path / "out" / ".lock"
    (tmp_path / ".out.draft").mkdir()
    (tmp_path / ".out.x.draft").mkdir()  # of a build into out.x
    with only_one(lock, "build", folder=tmp_path / "out"):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2 and f"another build is writing here: process {os.getpid()} on " in done.output
        assert not server.bodies and len(beside(tmp_path)) == 2 + (command[1] in ALONE)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "build.json").exists() and beside(tmp_path) == [".out.x.draft"]


def test_the_working_directory_may_be_the_folder(tmp_path, monkeypatch):
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "c.yaml").write_text(dump_yaml(annotated(tmp_path / "in")))
    monkeypatch.chdir(tmp_path / "out")
    done = CliRunner().invoke(app, ["build", "annotated", "../in/c.yaml", "--out", "."])
    assert done.exit_code == 0, done.output
    assert Path("records/t.jsonl").exists() and not beside(tmp_path)


@pytest.mark.parametrize("limit", [150, 2500])
def test_a_full_disk_ends_with_one_message_and_the_build_goes_on(build, tmp_path, limit):
    command, server = build
    with full_disk(limit):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and done.output.count("error: ") == 1, done.output
    assert "cannot write" in done.output and "free space" in done.output and "Traceback" not in done.output
    assert not beside(tmp_path)
    asked = server.served
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    if command[1] == "outputs":  # what had been answered is not asked again, but for those in flight
        assert server.served - asked <= 30 - (asked - 2)


def test_ctrl_c_ends_it_and_the_build_goes_on(build, tmp_path, heard):
    command, server = build
    seen: list[int] = []
    if command[1] in ALONE:
        pytest.skip("takes a moment: there is nothing to go on with")

    def interrupted(body) -> str:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return answer(body)

    server.answer = interrupted
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 130 and "Traceback" not in done.output
    assert not beside(tmp_path) and not (tmp_path / "out" / ".lock").exists()
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_sigterm_and_ctrl_c_of_a_process_leave_nothing_that_the_next_build_does_not_clear(tmp_path, heard):
    (tmp_path / "in").mkdir()
    with Server(answer) as server:
        server.pause = 0.2
        teacher = {"open": f"{server.url}#m", "terms": "MIT", "in_flight": 2}
        settings = {"rows": rows(tmp_path / "in", instruction="Say"), "teacher": teacher}
        (tmp_path / "in" / "c.yaml").write_text(dump_yaml(settings))
        words = ["build", "outputs", str(tmp_path / "in" / "c.yaml"), "--out", str(tmp_path / "out")]
        for number, code in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
            before = server.served
            process = subprocess.Popen([sys.executable, "-m", "mmit", *words], stderr=subprocess.PIPE, text=True)
            while server.served < before + 3:
                assert process.poll() is None
            process.send_signal(number)
            _, told = process.communicate(timeout=20)
            assert process.returncode == code and "Traceback" not in told
        server.pause = 0
        assert CliRunner().invoke(app, words).exit_code == 0
    assert not beside(tmp_path)
