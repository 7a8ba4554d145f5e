"""What records hold, in words: an importer's reading is there to be seen."""

from __future__ import annotations

from mmit.data.held import Held
from mmit.errors import RecordError
from mmit.records import Image, Record, Text, Turn


def test_what_was_read_and_what_carries_loss() -> None:
    call = {"type": "function", "function": {"name": "f"}}
    turns = (
        Turn("user", (Image("a.png"), Text("q"))),
        Turn("assistant", (), tool_calls=(call, call), thinking="t"),
        Turn("tool", (Text("r"),)),
        Turn("assistant", (Text("a "), Text("b", 0.5)), weight=0),
    )
    held = Held()
    rows = [Record(turns, tools=({"name": "f"},), weight=2.0), RecordError("x"), Record.triple("q", "a")]
    assert list(held.watch(rows)) == rows
    assert held.lines() == [
        "read: 2 user turns, 3 assistant turns, 1 tool turn, 1 image, 1 thought, 2 tool calls, 1 record with tools",
        "loss weights: 0.5 on 1 span of assistant turns, 0 on 1 assistant turn, 2 on 1 record; all other answers 1",
    ]
    assert Held().lines() == []
