"""Pairs and labels in the layouts of other trainers: one record each, and one error for what is no comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmit.data.formats import detect_format, import_file
from mmit.data.shards.reader import ShardSource
from mmit.data.shards.writer import build_shards
from mmit.errors import RecordError
from mmit.records import Image, Record, Text, Turn, read_jsonl, write_jsonl
from tests.cli.commands import assert_one_message, good, mmit
from tests.tiny_run import tiny_config


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def shares(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


PICTURED = [{"type": "image"}, {"type": "text", "text": "q"}]
# Layout -> (row, format that is told from it, pictures); all of them ask "q" and prefer "good" to "bad".
PAIRS: dict[str, tuple[dict[str, Any], str, int]] = {
    "TRL, texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference", 0),
    "TRL, messages": (
        {
            "prompt": [say("system", "S"), say("user", "q")],
            "chosen": [say("assistant", "good")],
            "rejected": [say("assistant", "bad")],
        },
        "preference",
        0,
    ),
    "TRL, pictures": (
        {
            "images": ["a.png"],
            "prompt": [say("user", PICTURED)],
            "chosen": [say("assistant", [{"type": "text", "text": "good"}])],
            "rejected": [say("assistant", [{"type": "text", "text": "bad"}])],
        },
        "preference",
        1,
    ),
    "TRL, whole conversations": (
        {
            "chosen": [say("user", "q"), say("assistant", "good")],
            "rejected": [say("user", "q"), say("assistant", "bad")],
        },
        "preference",
        0,
    ),
    "UltraFeedback": (
        {
            "prompt": "q",
            "prompt_id": "7",
            "chosen": [say("user", "q"), say("assistant", "good")],
            "rejected": [say("user", "q"), say("assistant", "bad")],
            "score_chosen": 8.0,
            "score_rejected": 3.0,
        },
        "preference",
        0,
    ),
    "RLHF-V": ({"question": "q", "image": "a.png", "chosen": "good", "rejected": "bad", "idx": 3}, "preference", 1),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": [shares("human", "q")],
            "chosen": shares("gpt", "good"),
            "rejected": shares("gpt", "bad"),
        },
        "sharegpt",
        0,
    ),
    "LLaMA-Factory, pictures": (
        {
            "conversations": [shares("human", "<image>q")],
            "chosen": shares("gpt", "good"),
            "rejected": shares("gpt", "bad"),
            "images": ["a.png"],
        },
        "llava",
        1,
    ),
    "LLaMA-Factory, alpaca": (
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad", "history": []},
        "preference",
        0,
    ),
    "ms-swift": (
        {
            "messages": [say("user", "<image>q"), say("assistant", "good")],
            "rejected_response": "bad",
            "images": ["a.png"],
        },
        "messages",
        1,
    ),
    "ms-swift, messages": (
        {
            "messages": [say("user", "<image>q"), say("assistant", "good")],
            "rejected_messages": [say("user", "<image>q"), say("assistant", "bad")],
            "images": ["a.png"],
        },
        "messages",
        1,
    ),
    "ms-swift, query": ({"query": "q", "response": "good", "rejected_response": "bad"}, "query_response", 0),
    "POVID": (
        {
            "image": "a.png",
            "conversations": [shares("human", "<image>\nq"), shares("gpt", "good")],
            "rejected_conversations": [shares("human", "<image>\nq"), shares("gpt", "bad")],
        },
        "llava",
        1,
    ),
    "OpenAI": (
        {
            "input": {"messages": [say("user", "q")], "tools": []},
            "preferred_output": [say("assistant", "good")],
            "non_preferred_output": [say("assistant", "bad")],
        },
        "preference_openai",
        0,
    ),
}
LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "TRL": ({"prompt": "q", "completion": "a", "label": False}, "prompt_completion"),
    "TRL, messages": (
        {"prompt": [say("user", "q")], "completion": [say("assistant", "a")], "label": False},
        "prompt_completion",
    ),
    "LLaMA-Factory": ({"messages": [say("user", "q"), say("assistant", "a")], "label": False}, "messages"),
    "LLaMA-Factory, kto_tag": ({"messages": [say("user", "q"), say("assistant", "a")], "kto_tag": False}, "messages"),
    "ms-swift": ({"query": "q", "response": "a", "label": False}, "query_response"),
}


def read(folder: Path, row: dict[str, Any]) -> tuple[Record, str]:
    PIL.Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row))
    format, _ = detect_format(path)
    return next(import_file(path, format)), format


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs(layout: str, tmp_path: Path) -> None:
    row, format, pictures = PAIRS[layout]
    record, found = read(tmp_path, row)
    assert found == format and len(record.images) == pictures
    *prompt, chosen = record.turns
    assert [turn.text for turn in prompt if turn.role == "user"] == ["q"]
    assert (chosen, record.rejected) == tuple(Turn("assistant", (Text(t),)) for t in ("good", "bad"))
    assert not {"chosen", "rejected", "rejected_response", "prompt"} & record.meta.keys()
    write_jsonl([record], tmp_path / "out.jsonl")
    assert next(read_jsonl(tmp_path / "out.jsonl")).rejected == record.rejected


@pytest.mark.parametrize("layout", [*PAIRS, *LABELS])
def test_a_table_is_read_as_the_rows_of_its_json(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    row = {**PAIRS, **LABELS}[layout][0]
    wanted, _ = read(tmp_path, row)
    # As sets are published: beside the columns of the layout others, one of which has the chosen answer's conversation.
    beside = {"messages": row["chosen"]} if layout == "UltraFeedback" else {}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, **beside}]), path)
    record = next(import_file(path, "parquet"))
    assert (record.turns, record.rejected, record.label) == (wanted.turns, wanted.rejected, wanted.label)


@pytest.mark.parametrize("layout", LABELS)
def test_labels(layout: str, tmp_path: Path) -> None:
    row, format = LABELS[layout]
    record, found = read(tmp_path, row)
    assert found == format and record.label is False and [turn.text for turn in record.turns] == ["q", "a"]
    assert read(tmp_path, {k: True if v is False else v for k, v in row.items()})[0].label is True
    write_jsonl([record], tmp_path / "out.jsonl")
    assert next(read_jsonl(tmp_path / "out.jsonl")).label is False


CHOSEN, REJECTED = {"chosen": "a"}, {"rejected": "b"}


@pytest.mark.parametrize(
    ("row", "problem", "remedy"),
    [
        ({"prompt": "q", **CHOSEN, "rejected": ""}, "'chosen' is half of a preference pair", "both"),
        ({"prompt": "q", "chosen": None, **REJECTED}, "'rejected' is half of a preference pair", "both"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and the rejected answer are equal", "nothing"),
        ({**CHOSEN, **REJECTED}, "has a chosen answer and no prompt", "'prompt'"),
        ({"prompt": "q", "chosen": 3, **REJECTED}, "'chosen' is '3', not an answer", "assistant"),
        ({"prompt": "q", **CHOSEN, "rejected": ["x"]}, "'rejected' is .*, not an answer", "list of messages"),
        ({"prompt": "q", **CHOSEN, "rejected": [say("user", "b")]}, "'rejected' ends with the user's", "assistant"),
        ({"prompt": "q", **CHOSEN, "rejected": say("critic", "b")}, "is said by 'critic'", "assistant"),
        ({"prompt": "q", **CHOSEN, "rejected": say("assistant", 3)}, "turn 1 of 'rejected' holds '3'", "Write"),
        ({"prompt": "q", **CHOSEN, **REJECTED, "rejected_response": "c"}, "both 'rejected' and", "Keep one"),
        (
            {
                "chosen": [say("user", "q"), say("assistant", "a")],
                "rejected": [say("user", "p"), say("assistant", "b")],
            },
            "the prompt in 'rejected' is not that of the other answer: turn 1 differs",
            "one prompt",
        ),
        (
            {
                "chosen": [say("user", "q"), say("assistant", "a")],
                "rejected": [say("user", "q"), say("assistant", "b"), say("user", "r"), say("assistant", "c")],
            },
            "it has 3 turns and the other 1",
            "last turn alone",
        ),
        (
            {"prompt": "p", "chosen": [say("user", "q"), say("assistant", "a")], **REJECTED},
            "'prompt' is said nowhere in the conversation",
            "Keep",
        ),
        (
            {"messages": [say("user", "q"), say("assistant", "a")], **CHOSEN, **REJECTED},
            "and another in 'chosen'",
            "one",
        ),
        ({"prompt": "q", "completion": "a", "label": True, "kto_tag": False}, "contradict each other", "Keep one"),
        (
            {"prompt": "q <bbox>", **CHOSEN, "rejected": "b <bbox>", "objects": {"bbox": [[0, 0, 1, 1]]}},
            "the rejected answer has a place for a box",
            "as text",
        ),
    ],
)
def test_what_is_no_comparison(row: dict[str, Any], problem: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=problem) as caught:
        read(tmp_path, row)
    assert remedy in caught.value.remedy and "rows.jsonl:1" in caught.value.where


def test_a_label_without_an_answer_stays_in_the_meta(tmp_path: Path) -> None:
    record, _ = read(tmp_path, {"messages": [say("user", "q")], "label": True})
    assert record.label is None and record.meta["label"] is True


def test_thoughts_of_a_rejected_answer_are_read_as_those_of_the_chosen(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "<t>why</t>a", "rejected": "<t>so</t>b"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (record,) = import_file(tmp_path / "x.jsonl", "preference", thoughts="<t>...</t>")
    assert record.rejected == Turn("assistant", (Text("b"),), thinking="so") and record.turns[-1].thinking == "why"


def test_shards_keep_pairs_and_labels(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = Turn("user", (Image(str(tmp_path / "a.png")), Text("q")))
    good, bad = (Turn("assistant", (Text(text),)) for text in ("good", "bad"))
    records = [Record((asked, good), rejected=bad, id="1"), Record((asked, bad), label=False, id="2")]
    build_shards(records, tmp_path / "shards")
    source = ShardSource(str(tmp_path / "shards"))
    assert [(source[n].rejected, source[n].label) for n in range(2)] == [(bad, None), (None, False)]


ANSWERED = (Turn("user", (Text("q"),)), Turn("assistant", (Text("a"),)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "yes"}, "'label' is 'yes'"),
        ({"label": 1}, "'label' is '1'"),
        ({"rejected": "b"}, "is a str, not an assistant turn"),
        ({"rejected": Turn("user", (Text("b"),))}, "is the user's, not an assistant turn"),
        ({"rejected": Turn("assistant", (Text("  "),))}, "is empty"),
        ({"rejected": Turn("assistant", (Text("b"), Image("a.png")))}, "the rejected answer has an image"),
        ({"rejected": Turn("assistant", (Text("b"),)), "label": True}, "both a rejected answer and a label"),
        ({"rejected": Turn("assistant", (Text("b"),), weight=-1.0)}, "the rejected answer has a negative weight"),
        ({"turns": ANSWERED[:1], "label": True}, "a label but no answer beside it"),
        ({"turns": ANSWERED[:1], "rejected": ANSWERED[1]}, "a rejected answer but no answer beside it"),
    ],
)
def test_records_that_are_no_comparison(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecordError, match=problem) as caught:
        Record(**{"turns": ANSWERED, **change}).validate(for_training=None)
    assert caught.value.remedy


def test_commands_that_look_at_data_show_both_answers(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"steps": 1, "objective": {"kind": "dpo"}})
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad"}, {"prompt": "p", "completion": "a", "label": False}]
    for name, row in zip(("pair", "label"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    pair, label = tmp_path / "pair.jsonl", tmp_path / "label.jsonl"
    (tmp_path / "dpo.yaml").write_text(config.to_yaml())
    (tmp_path / "sft.yaml").write_text(config.to_yaml().replace("kind: dpo", "kind: sft"))
    dpo, sft = ("--config", tmp_path / "dpo.yaml"), ("--config", tmp_path / "sft.yaml")
    assert "1 record with a rejected answer" in good("data", "check", pair, *dpo).stdout
    assert "1 record with an answer labelled bad" in good("data", "check", label).stdout
    for refused, remedy in ((pair, "kind=dpo"), (label, "kind=kto")):
        found = mmit("data", "check", refused, *sft)
        assert found.exit_code == 1 and "plain tuning would learn" in " ".join(found.stdout.split())
        assert "training refuses it" in good("data", "show", refused, "--text", *sft).stdout, remedy
    assert "rejected: bad" in good("data", "show", pair, "--text").stdout
    good("data", "show", pair, *dpo, "--out", tmp_path / "show.html")
    page = (tmp_path / "show.html").read_text()
    assert "chosen: " in page and "rejected: " in page and "chosen and rejected" in page
    for number, word in ((1, "chosen answer"), (2, "rejected answer")):
        assert word in good("inspect", pair, *dpo, "--pair", number).stdout
    assert_one_message(mmit("inspect", pair, *dpo, "--pair", 3), "there is no pair 3", "--pair 1 to 2")
