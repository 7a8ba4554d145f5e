"""Text is text: what comes from data, paths and models is shown as it stands, wherever a user can put it."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text as RichText
from typer.testing import CliRunner

from mmit.analysis.kinds import STUDIES
from mmit.cli import app
from mmit.cli.errors import show_error
from mmit.data.show import SampledRow, to_page
from mmit.errors import MmitError
from mmit.pages import page
from mmit.records import Image, Record, write_jsonl
from mmit.text import echo, escape, plain, terminal
from mmit.train.engines.world import speaker
from mmit.train.monitor.metrics_log import RunLog
from mmit.train.monitor.report import write_report
from mmit.train.monitor.run_files import note_event
from tests.tiny_run import tiny_config
from tests.trees import dotted, nodes_of

ROOT = Path(__file__).parents[1]
# A cursor moved, a title set, a bell, markup that does not close, reading turned round, and an 8-bit escape.
EVIL = "a\x1b[2J\x1b]0;t\x07[/x][bold]b\u202ec\x9b31m\u2066d"
SEEN = r"a\x1b[2J\x1b]0;t\x07[/x][bold]b\u202ec\x9b31m\u2066d"
# A name of a file or folder, which has no slash.
EVIL_NAME, SEEN_NAME = EVIL.replace("[/x]", "[x]"), SEEN.replace("[/x]", "[x]")
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def squeezed(text: str) -> str:
    """Without the breaks and frames of a table, and without the bell, which rich takes out of its own Text."""
    return re.sub(r"[\s│┃]", "", text).replace(r"\x07", "")


def test_plain() -> None:
    assert plain(EVIL) == SEEN
    for kept in ("naïve\tline\nline", "日本語　全角", "\u0915\u094d\u200d\u0937", "👩\u200d💻", "\xa0", "مرحبا"):
        assert plain(kept) == kept
    assert plain("\ud800\u2028\ufeff\r") == r"\ud800\u2028\ufeff\r"
    assert plain(Path("x")) == "x"


@given(st.text())
def test_nothing_acting_comes_through_and_twice_is_once(text: str) -> None:
    assert not ACTING.search(plain(text)) and plain(plain(text)) == plain(text)
    assert not {"<", '"', "'"} & set(escape(text))


@pytest.mark.parametrize("width", [60, 200])
def test_whatever_a_console_prints(width: int) -> None:
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    table.add_row(RichText(EVIL, "red"))
    for value in (EVIL, RichText(EVIL), table):
        out = io.StringIO()
        terminal(file=out, width=width).print(value)
        assert not ACTING.search(out.getvalue())
        assert squeezed(SEEN) in squeezed(out.getvalue())
    out = io.StringIO()
    with Progress(TextColumn("{task.description}", markup=False), console=terminal(file=out, width=200)) as bar:
        bar.add_task(EVIL)
    # Its columns are as wide as the text would be if nothing in it had to be shown.
    assert not ACTING.search(out.getvalue()) and r"a\x1b[2J\x1b]0;t[/x][bol" in out.getvalue()


def test_colours_still_work() -> None:
    out = io.StringIO()
    terminal(file=out, force_terminal=True, color_system="standard").print(RichText(EVIL, "red"))
    assert out.getvalue() == "\x1b[31m{}\x1b[0m\n".format(SEEN.replace(r"\x07", ""))


def test_messages_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, active=True)
    for say in (log.say, speaker(True), echo):
        say(EVIL)
        captured = capsys.readouterr()
        assert (captured.err + captured.out).strip() == SEEN
    show_error(MmitError(EVIL, where=EVIL, remedy=EVIL))
    assert capsys.readouterr().err.split("\n") == [f"error: {SEEN}: {SEEN}", f"  {SEEN}", ""]


def test_trackers_get_names_that_do_nothing(tmp_path: Path) -> None:
    class Tracker:
        seen: dict[str, float] = {}

        def begin(self, step: int) -> None: ...

        def close(self) -> None: ...

        def log(self, step: int, values: dict[str, float]) -> None:
            self.seen.update(values)

    log = RunLog(tmp_path, active=True, trackers=[Tracker()])  # type: ignore[list-item]
    log.begin(total=1, start=0)
    log.evaluation(1, {EVIL: 1.0}, seconds=0.0)
    log.close()
    assert f"eval/{SEEN}" in Tracker.seen


def test_pages_show_it_too(tmp_path: Path) -> None:
    record = Record.triple(EVIL, f"{EVIL}</pre><script>", id=EVIL, source=EVIL)
    rows = {"step": 1, "kind": "skipped", "records": f"{EVIL}<script>"}
    note_event(tmp_path, rows)
    (tmp_path / "bad_records.jsonl").write_text(json.dumps({"where": EVIL, "problem": f"{EVIL}<b>", "remedy": ""}))
    report = write_report(tmp_path).read_text()
    shown = to_page([SampledRow(1, record)], title=f"{EVIL}<script>", notes=[EVIL])
    for text in (report, shown, page(f"{EVIL}<script>", "", kind="evaluation")):
        assert not ACTING.search(text.replace("\r", "")) and SEEN in text
        assert text.count("<script") == text.count("<script>\nconst") + text.count("<script>\n//"), "only its own"


def evil_data(folder: Path) -> Path:
    """Records whose ids, sources, texts, picture's name and folder all are evil; one has a picture that is missing."""
    place = folder / EVIL_NAME
    place.mkdir()
    PIL.Image.new("RGB", (20, 20)).save(place / f"{EVIL_NAME}.png")
    good = Record.triple(EVIL, EVIL, images=[Image(str(place / f"{EVIL_NAME}.png"))], id=EVIL, source=EVIL)
    lost = Record.triple(EVIL, EVIL, images=[Image(str(place / f"{EVIL_NAME}2.png"))], id=EVIL + "2", source=EVIL)
    write_jsonl([good, good, lost, Record.triple("q", EVIL, id="3")], place / "rows[y].jsonl")
    return place / "rows[y].jsonl"


def evil_name(folder: Path) -> str:
    """Make the records; their path from `folder`."""
    return str(evil_data(folder).relative_to(folder))


def evil_yaml(folder: Path, **settings: Any) -> str:
    path = folder / f"{EVIL_NAME}.yaml"
    path.write_text(json.dumps(settings))
    return str(path)


def evil_bank(folder: Path) -> tuple[str, str]:
    """A table and a bank of templates: names, fields and wordings are evil, and one of them does not suit a row."""
    (folder / "rows.jsonl").write_text(json.dumps({"a": EVIL}) + "\n" + json.dumps({"a": None}) + "\n")
    templates = [{"id": EVIL, "input": f"{EVIL}{{{{ a }}}}", "target": "{{ a }}"}]
    bank = evil_yaml(folder, task=EVIL, cluster=EVIL, licence=EVIL, fields=["a"], templates=templates)
    return str(folder / "rows.jsonl"), bank


def annotated(folder: Path, *more: str) -> list[str]:
    _, bank = evil_bank(folder)
    (folder / "c").mkdir()
    rows = {"path": "../rows.jsonl", "licence": EVIL}
    config = evil_yaml(folder / "c", rows=rows, bank=f"../{Path(bank).name}")
    return [config, "--out", str(folder / EVIL_NAME), *more]


def replayed(folder: Path, **settings: Any) -> list[str]:
    """A build whose teacher, a journal of another, is asked for what the journal does not hold."""
    draw = {"messages": [{"role": "user", "parts": [{"text": EVIL}]}], "draw": {}}
    reply = {"id": EVIL, "teacher": EVIL, "text": EVIL}
    lines = [{"journal": 1, "settings": {"x": EVIL}}, {"digest": "0", "purpose": "outputs", **draw, "reply": reply}]
    journal = folder / f"{EVIL_NAME}.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evil_bank(folder)
    teacher = {"open": f"replay:{journal.name}", "name": EVIL, "terms": EVIL}
    return [evil_yaml(folder, teacher=teacher, **settings), "--out", str(folder / f"out{EVIL_NAME}")]


def built(folder: Path) -> list[str]:
    replayed(folder)
    out = folder / f"out{EVIL_NAME}"
    out.mkdir()
    (folder / f"{EVIL_NAME}.jsonl").rename(out / "journal.jsonl")
    (out / "build.json").write_text(json.dumps({"in": 2, "accepted": {EVIL: 1}, "dropped": {EVIL: 1}}))
    return [str(out)]


def evil_run(folder: Path) -> list[str]:
    run = folder / EVIL_NAME
    (run / "heartbeats").mkdir(parents=True)
    columns = "loss tokens_per_s seconds lr tokens memory_gib grad_norm skipped_steps bad_records eval_seconds"
    row = dict.fromkeys(columns.split(), 1.0) | {"step": 1}
    (run / "metrics.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"step": 1, "eval": {EVIL: 1.0}, "eval_seconds": 1.0}) + "\n"
    )
    (run / "run.json").write_text(json.dumps({"steps": 2, EVIL: EVIL}))
    beat = {"rank": 0, "step": 1, "phase": EVIL, "since": 0.0, "moves": 1, "time": 0.0, "host": EVIL, "pid": 1}
    (run / "heartbeats" / "rank-00000.json").write_text(json.dumps(beat))
    best = {"metric": EVIL, "value": 1.0, "step": 1, "checkpoint": EVIL}
    (run / "best.json").write_text(json.dumps(best))
    return [str(run)]


def evil_answers(folder: Path) -> list[str]:
    """Two evaluations of one task, of which one lacks a question."""
    found = []
    for name, count in (("a", 3), ("b", 2)):
        place = folder / f"{name}{EVIL_NAME}"
        place.mkdir()
        rows = [
            {"id": f"{EVIL}{n}", "prompt": EVIL, "answer": EVIL, "reference": EVIL, "group": EVIL, "correct": n % 2}
            for n in range(count)
        ]
        settings = {"task": EVIL, "settings": True}
        lines = [json.dumps(row) for row in (settings, *rows)]
        (place / "answers-tuned.jsonl").write_text("\n".join(lines) + "\n")
        (place / "report.json").write_text(json.dumps({"task": EVIL, "model": EVIL}))
        found.append(str(place))
    return found


def inspected(folder: Path) -> list[str]:
    data = evil_data(folder)
    train = [{"path": str(data), "name": EVIL}]
    config = tiny_config(folder, run={"dir": EVIL}, data={"train": train, "max_length": 400, "pack_tokens": 400})
    (folder / "c.yaml").write_text(config.to_yaml())
    return [str(data), "--config", str(folder / "c.yaml")]


def missing(*more: str) -> Callable[[Path], list[str]]:
    """A folder that is not there, under an evil name."""
    return lambda folder: [str(folder / EVIL_NAME), *more]


def few_rows(folder: Path, *, labelled: bool) -> list[str]:
    """A task of `mmit pet` whose labels, patterns and paths are evil, and whose rows are not there."""
    patterns = {"task": EVIL, "labels": [EVIL, "a"], "patterns": [{"id": EVIL, "input": "{{ image }}" + EVIL}]}
    path = {"path": f"{EVIL_NAME}.csv"}
    rows = {"labelled": path, "unlabelled": path} if labelled else {"labelled": {"path": "a.csv"}, "unlabelled": path}
    return [evil_yaml(folder, model=EVIL, patterns=patterns, **rows), "--out", str(folder / EVIL_NAME)]


# Arguments of every command, made in a folder, in which whatever a user can put there is evil.
CALLS: dict[str, Callable[[Path], list[str]]] = {
    "train": lambda folder: ["--config", evil_yaml(folder, run={EVIL: EVIL}, **{EVIL: EVIL})],
    "init": lambda folder: [*("--data", str(evil_data(folder)), "--llm", "a/b", "--encoder", EVIL_NAME)],
    "eval": missing("--task", EVIL),
    "compare": evil_answers,
    "chat": missing("--prompt", EVIL),
    "serve": missing("--port", "0"),
    "data pack": lambda folder: [str(evil_data(folder)), "--out", str(folder / "b" / EVIL_NAME)],
    "data build": lambda folder: [str(evil_data(folder)), "--out", str(folder / "b" / EVIL_NAME)],
    "data index": lambda folder: [str(evil_data(folder)), "--out", str(folder / EVIL_NAME / "b")],
    "data check": lambda folder: [str(evil_data(folder))],
    "data show": lambda folder: [str(evil_data(folder)), "--text"],
    "data stats": lambda folder: [str(evil_data(folder))],
    "data card": lambda folder: [str(evil_data(folder))],
    "data import": lambda folder: ["auto", str(evil_data(folder)), "--out", str(folder / EVIL_NAME / "out.jsonl")],
    "build annotated": annotated,
    "build outputs": lambda folder: replayed(folder, rows={"path": "rows.jsonl"}, fields={"instruction": "a"}),
    "build self-instruct": lambda folder: replayed(folder, seeds=f"{EVIL_NAME}.jsonl"),
    "build self-chat": lambda folder: replayed(folder, rows={"path": "rows.jsonl"}, topic="a"),
    "build conversations": lambda folder: replayed(folder, records=evil_name(folder)),
    "build select": lambda folder: replayed(
        folder, records=f"{evil_data(folder).relative_to(folder)}", select={EVIL: 1}
    ),
    "build holdout": lambda folder: [
        *(
            evil_yaml(folder, records=str(evil_data(folder)), holdout={"clusters": [EVIL]}),
            "--out",
            str(folder / EVIL_NAME),
        ),
    ],
    "build status": built,
    "pet fit": lambda folder: few_rows(folder, labelled=True),
    "pet label": lambda folder: few_rows(folder, labelled=False),
    "pet distil": lambda folder: few_rows(folder, labelled=False),
    "build templates check": lambda folder: [evil_bank(folder)[1]],
    "build templates show": lambda folder: [evil_bank(folder)[1], "--row", f"{evil_bank(folder)[0]}#1"],
    "harness overlay": lambda folder: ["--tasks", EVIL, "--out", str(folder / EVIL_NAME)],
    "export": missing("--out", EVIL_NAME),
    "merge": missing(EVIL_NAME),
    "import-model": missing(EVIL_NAME),
    **{
        f"analyse {name}": lambda folder, name=name: [evil_yaml(folder, study=name, **{EVIL: EVIL}), "--out", EVIL_NAME]
        for name in STUDIES
    },
    "analyse arm": lambda folder: [evil_yaml(folder, **{EVIL: EVIL}), EVIL, "0", "--out", EVIL_NAME],
    "analyse intrinsic": missing("--dim", "2", "--out", EVIL_NAME),
    "analyse report": lambda folder: [evil_yaml(folder, **{EVIL: EVIL}), "--out", EVIL_NAME],
    "inspect": inspected,
    "run-status": evil_run,
    "report": evil_run,
    "config": lambda folder: ["--resolve", evil_yaml(folder, run={"dir": EVIL}), f"x.{EVIL}=1"],
}
# Their output holds nothing that a user has put anywhere, or is another program's.
ELSEWHERE = {"env", "harness lm-eval"}


def commands(group: Any, *before: str) -> Iterator[str]:
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, *before, name)
        else:
            yield " ".join((*before, name))


def test_every_command_is_tried() -> None:
    assert set(commands(typer.main.get_command(app))) == CALLS.keys() | ELSEWHERE


@pytest.mark.parametrize("command", [*CALLS, "data nosuch"])
def test_what_a_command_says_about_evil_text(tmp_path: Path, command: str) -> None:
    arguments = CALLS.get(command, lambda folder: [EVIL])(tmp_path)
    done = CliRunner().invoke(app, [*command.split(), *arguments])
    assert not ACTING.search(done.output), ascii(done.output)
    assert isinstance(done.exception, (SystemExit, type(None))), done.exception
    if command != "data nosuch":
        assert squeezed(SEEN_NAME) in squeezed(done.output) or squeezed(SEEN) in squeezed(done.output), done.output
    for path in tmp_path.rglob("*.md"):
        assert not ACTING.search(path.read_text()), path


def test_records_that_a_build_would_make_are_shown(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["build", "annotated", *annotated(tmp_path, "--dry-run")])
    assert done.exit_code == 0 and not ACTING.search(done.output), ascii(done.output)
    assert not list(tmp_path.rglob("card.md"))


def test_a_run_in_an_evil_folder_on_evil_data(tmp_path: Path) -> None:
    data = evil_data(tmp_path)
    run = {"dir": str(tmp_path / f"run{EVIL_NAME}"), "on_bad_record": "skip", "max_bad_fraction": 0.5}
    sources: dict[str, Any] = {"train": [{"path": str(data), "name": EVIL}], "max_length": 400, "pack_tokens": 400}
    config = tiny_config(tmp_path, run=run, data={**sources, "workers": 0}, train={"steps": 2, "eval_every": None})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    done = CliRunner().invoke(app, ["train", "--config", str(tmp_path / "c.yaml")])
    assert done.exit_code == 0, done.output
    assert not ACTING.search(done.output) and SEEN_NAME in done.output


def test_config_values_and_overrides_in_errors(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps({"run": {"dir": "x"}, "train": {"schedule": EVIL}, EVIL: 1}))
    for arguments in ([str(tmp_path / "c.yaml")], [str(tmp_path / f"{EVIL_NAME}.yaml")], [f"x.{EVIL}=1"]):
        done = CliRunner().invoke(app, ["train", "--config", *arguments, f"run.{EVIL}=1"])
        assert done.exit_code == 2 and not ACTING.search(done.output), ascii(done.output)


# --- nothing goes past it -------------------------------------------------------------------------------------------

WAYS_OUT = {"typer.echo", "typer.secho", "click.echo", "sys.stdout.write", "sys.stderr.write", "print", "rich.print"}
# Where another process or a library reads what is printed.
ALLOWED = {("data/template_child.py", "sys.stdout.write")}


def past_the_helper(source: str | Path) -> list[str]:
    """Ways to a terminal or page in Python source, or in its file, that do not go through mmit.text."""
    found = []
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += [
                f"{node.module}.{n}" for n in names if (node.module, n) in {("html", "escape"), ("rich", "print")}
            ]
            found += [f"{node.module}.{n}" for n in names if node.module == "rich.markup"]
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keys = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ("markup", "console")}
        if called in WAYS_OUT or called in ("Console", "rich.console.Console", "html.escape", "track"):
            found.append(called)
        if called.endswith(("from_markup", "traceback.print_exception", "get_console")) or keys.get("markup") == "True":
            found.append(called)
        if called == "write_atomic" and re.search(r"\.(md|tex)'$", ast.unparse(node.args[0])):
            if not ast.unparse(node.args[1]).startswith("plain("):
                found.append("a page of text that is not plain")
        if called == "Progress" and "*columns" in map(ast.unparse, node.args) and "console" not in keys:
            found.append("Progress without console")
        if called == "TextColumn" and keys.get("markup") != "False" and "{" in ast.unparse(node.args[0]):
            found.append("TextColumn with markup")
    return found


def test_nothing_goes_past_it() -> None:
    found = []
    for path in sorted((ROOT / "mmit").rglob("*.py")):
        name = path.relative_to(ROOT / "mmit").as_posix()
        if name != "text.py":
            found += [(name, way) for way in past_the_helper(path) if (name, way) not in ALLOWED]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "typer.echo(x)",
        "print(x)",
        "sys.stderr.write(x)",
        "Console(stderr=True).print(x)",
        "from html import escape",
        "from rich import print",
        "from rich.markup import escape",
        "Text.from_markup(x)",
        "c.print(x, markup=True)",
        "Progress(*columns)",
        "write_atomic(folder / 'report.md', markdown(x))",
        "TextColumn('{task.description}')",
    ],
)
def test_the_gate_closes(source: str) -> None:
    assert len(past_the_helper(source)) == 1
