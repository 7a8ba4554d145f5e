"""Text is text: what comes from data, paths and models is shown as it stands, wherever a user can put it."""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text as RichText
from typer.testing import CliRunner

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


@pytest.mark.parametrize(
    "command",
    [
        ["data", "check"],
        ["data", "stats"],
        ["data", "show", "--text"],
        ["data", "import"],
        ["data", "build"],
        ["data", "nosuch"],
    ],
    ids=lambda words: words[1],
)
def test_commands_on_evil_data(tmp_path: Path, command: list[str]) -> None:
    data = evil_data(tmp_path)
    more = {
        "import": ["--out", str(tmp_path / EVIL_NAME / "out.jsonl")],
        "build": ["--out", str(tmp_path / "b" / EVIL_NAME)],
    }
    done = CliRunner().invoke(app, [*command, str(data), *more.get(command[1], [])])
    assert not ACTING.search(done.output), ascii(done.output)
    assert isinstance(done.exception, (SystemExit, type(None))), done.exception
    if command[1] != "nosuch":
        assert squeezed(SEEN_NAME) in squeezed(done.output) or squeezed(SEEN) in squeezed(done.output)


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


def past_the_helper(source: str) -> list[str]:
    """Ways to a terminal or page in Python source that do not go through mmit.text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += [
                f"{node.module}.{n}" for n in names if (node.module, n) in {("html", "escape"), ("rich", "print")}
            ]
            found += [f"{node.module}.{n}" for n in names if node.module == "rich.markup"]
        if not isinstance(node, ast.Call):
            continue
        called, keys = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in WAYS_OUT or called in ("Console", "rich.console.Console", "html.escape", "track"):
            found.append(called)
        if called.endswith(("from_markup", "traceback.print_exception", "get_console")) or keys.get("markup") == "True":
            found.append(called)
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
            found += [(name, way) for way in past_the_helper(path.read_text()) if (name, way) not in ALLOWED]
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
        "TextColumn('{task.description}')",
    ],
)
def test_the_gate_closes(source: str) -> None:
    assert len(past_the_helper(source)) == 1
