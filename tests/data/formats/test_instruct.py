"""Text instruction files: three rows in each official layout, their traps, and errors that name the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmit.data.formats import FORMATS, detect_format, import_file
from mmit.errors import ConfigError, RecordError
from tests.data.formats.format_tools import bad_rows, imported, shape, texts, write

TASK: dict[str, Any] = {
    "Contributors": ["A. Person"],
    "Source": ["quoref"],
    "URL": ["https://example.org/quoref"],
    "Categories": ["Question Generation"],
    "Reasoning": ["Reasoning on Entity"],
    "Definition": ["In this task, you answer a question."],
    "Input_language": ["English"],
    "Output_language": ["English"],
    "Instruction_language": ["English"],
    "Domains": ["Wikipedia"],
    "Positive Examples": [
        {"input": "P1?", "output": "yes", "explanation": "Because."},
        {"input": "P2?", "output": "no", "explanation": "Why not."},
    ],
    "Negative Examples": [],
    "Instances": [
        {"id": "task001-1", "input": "Who?", "output": ["Ann"]},
        {"id": "task001-2", "input": "When?", "output": ["In May", "May"]},
        {"id": "task001-3", "input": "Where?", "output": ["Here"]},
    ],
    "Instance License": ["Apache 2.0"],
}


def test_natural_instructions(tmp_path: Path) -> None:
    path = write(tmp_path / "task001_quoref_question_generation.json", TASK)
    assert detect_format(path) == ("natural_instructions", "the file is one object with 'Definition' and 'Instances'")
    records = imported(path, "natural_instructions")
    assert [texts(r) for r in records] == [
        [["In this task, you answer a question.\n\nWho?"], ["Ann"]],
        [["In this task, you answer a question.\n\nWhen?"], ["In May"]],
        [["In this task, you answer a question.\n\nWhere?"], ["Here"]],
    ]
    assert [(r.id, r.row, r.licence) for r in records] == [(f"task001-{n}", n, "Apache 2.0") for n in (1, 2, 3)]
    meta = records[1].meta
    assert meta["references"] == ["In May", "May"] and "references" not in records[0].meta
    assert (meta["task"], meta["categories"], meta["domains"]) == (path.stem, ["Question Generation"], ["Wikipedia"])


def test_natural_instructions_definition_and_examples_are_options(tmp_path: Path) -> None:
    path = write(tmp_path / "task001.json", TASK)
    bare = imported(path, "natural_instructions", definition="none")
    assert texts(bare[0]) == [["Who?"], ["Ann"]]
    shots = imported(path, "natural_instructions", positive=1)[0]
    assert shots.turns[0].text == (
        "In this task, you answer a question.\n\n"
        "Positive Example 1 -\nInput: P1?\nOutput: yes\n\n"
        "Now complete the following example -\nInput: Who?\nOutput:"
    )
    # A task with fewer examples than asked for says how many it had.
    assert imported(path, "natural_instructions", positive=9)[0].meta["positive_examples"] == 2
    for options, problem in (({"definition": "ful"}, "did you mean 'full'"), ({"positive": -1}, "whole number")):
        with pytest.raises(ConfigError, match=problem):
            list(import_file(path, "natural_instructions", **options))


def test_natural_instructions_old_layout_and_errors(tmp_path: Path) -> None:
    old = {**TASK, "Definition": "Answer.", "Instance License": ["Unknown"]}
    path = write(tmp_path / "task.json", old)
    assert imported(path, "natural_instructions")[0].licence is None
    assert imported(path, "natural_instructions", licence="MIT")[0].licence == "MIT"
    broken = [{"id": "x", "input": "a", "output": []}, {"id": "y", "output": ["a"]}, 7, {"input": "a", "output": ["b"]}]
    path = write(tmp_path / "broken.json", {**TASK, "Instances": broken})
    bad = bad_rows(path, "natural_instructions")
    assert [e.where for e in bad] == [f"{path}:1 (x)", f"{path}:2 (y)", f"{path}:3"]
    assert [e.problem[:21] for e in bad] == ["output is an empty li", "input is 'None', not ", "the instance is '7', "]
    path = write(tmp_path / "none.json", {"Definition": "a"})
    with pytest.raises(RecordError, match="no 'Instances'"):
        list(import_file(path, "natural_instructions", on_bad=lambda error: None))


def test_alpaca_and_instructwild(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1+1", "output": "2"},
        {"instruction": "Give three tips.", "input": "", "output": "Eat."},
        {"instruction": "写一首诗", "output": "好"},
    ]
    path = write(tmp_path / "instinwild_ch.json", rows)
    assert detect_format(path)[0] == "alpaca"
    assert [r.turns[0].text for r in imported(path, "alpaca")] == ["Add.\n\n1+1", "Give three tips.", "写一首诗"]
    assert bad_rows(write(tmp_path / "bad.json", [{"instruction": "a"}]), "alpaca")[0].where.endswith("bad.json:1")


def test_instructions_wait_for_an_output(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Tell a joke.", "instruction_type": "generation", "special_tag": "humour"},
        {"instruction": "List movies."},
        {"instruction": "Why?", "output": ""},
    ]
    path = write(tmp_path / "user_1.jsonl", rows, lines=True)
    assert detect_format(path)[0] == "instructions"
    records = imported(path, "instructions")
    assert [shape(r) for r in records][0] == [("user", ["Tell a joke."])]
    assert records[0].meta == {"instruction_type": "generation", "special_tag": "humour"}
    for record in records:
        record.validate(for_training=False)
        with pytest.raises(RecordError, match="no answer to learn"):
            record.validate(for_training=True)


@pytest.mark.parametrize("key", ["output", "response", "targets"])
def test_answers_under_other_names_are_not_lost(key: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"Ask {n}", "context": "c", key: "b"} for n in range(3)]
    path = write(tmp_path / "dolly.jsonl", rows, lines=True)
    bad = bad_rows(path, "instructions")
    assert len(bad) == 3 and bad[0].problem == f"the row has an answer: '{key}'"
    if key == "response":
        assert detect_format(path)[0] == "dolly"
    if key == "targets":
        with pytest.raises(RecordError, match="(?s)cannot tell the format.*import as json"):
            detect_format(path)
    mapped = imported(path, "json", columns=f"input=context,output={key}")
    assert texts(mapped[1]) == [["Ask 1\n\nc"], ["b"]] and mapped[1].row == 2


def test_p3_and_flan(tmp_path: Path) -> None:
    rows = [
        {
            "inputs": [31, 7],
            "targets": [4273],
            "inputs_pretokenized": "Is it? yes or no",
            "targets_pretokenized": "yes",
            "answer_choices": ["yes", "no"],
        },
        {
            "inputs": "Q: 2+2?",
            "targets": "4",
            "task_source": "Flan2021",
            "task_name": "math",
            "template_type": "zs_opt",
        },
        {"inputs": "Say.\n", "targets": "\nSaid", "is_correct": True},
        {"id": "task1-7", "definition": "Translate.", "inputs": "oui", "targets": "yes", "task_name": "task1"},
    ]
    path = write(tmp_path / "p3.jsonl", rows, lines=True)
    assert detect_format(path)[0] == "inputs_targets"
    records = imported(path, "inputs_targets")
    assert [[turn.text for turn in r.turns] for r in records] == [
        ["Is it? yes or no", "yes"],
        ["Q: 2+2?", "4"],
        ["Say.\n", "\nSaid"],
        ["Translate.\n\noui", "yes"],  # what is asked is the definition
    ]
    assert records[0].meta == {"answer_choices": ["yes", "no"]} and records[1].meta["task_name"] == "math"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"inputs": [1], "targets": [2]}, "token ids"),
        ({"inputs": "a", "targets": "b", "is_correct": False}, "wrong answer"),
        ({"inputs": "a"}, "targets is 'None'"),
        ({"inputs_pretokenized": "a", "inputs": [1]}, "targets_pretokenized is 'None'"),
    ],
)
def test_p3_refusals(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    assert problem in bad_rows(write(tmp_path / "p3.json", [row]), "inputs_targets")[0].problem


PREAMBLE = "The conversation between human and AI assistant.\n"


def test_baize(tmp_path: Path) -> None:
    rows = [
        {"topic": "pets", "input": f"{PREAMBLE}[|Human|] Hello!\n[|AI|] Hi! How can I help you?\n[|Human|] "},
        {
            "topic": "code",
            "input": f"{PREAMBLE}[|Human|] A list\n[|AI|] 1. a\n2. [x]\n[|Human|] More\n[|AI|] No.\n[|Human|] ",
        },
        {"topic": "", "input": "[|Human|] Q\n[|AI|] A"},
    ]
    path = write(tmp_path / "quora_chat_data.json", rows)
    assert detect_format(path)[0] == "baize"
    records = imported(path, "baize")
    assert shape(records[0]) == [
        ("system", [PREAMBLE.strip()]),
        ("user", ["Hello!"]),
        ("assistant", ["Hi! How can I help you?"]),
    ]
    assert [parts[0] for parts in texts(records[1])[1:]] == ["A list", "1. a\n2. [x]", "More", "No."]
    assert shape(records[2]) == [("user", ["Q"]), ("assistant", ["A"])]
    assert records[0].meta == {"topic": "pets"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no markers", "no turn"),
        ("[|Human|] ", "no turn"),
        ("[|Human|] a [|Human|] b [|AI|] c", r"turn 2 of the transcript is [|Human|]"),
        ("[|AI|] a", "turn 1 of the transcript is [|AI|]"),
        ("[|Human|] a [|AI|] [|Human|] b [|AI|] c", "turn 2 of the transcript ([|AI|]) is empty"),
        ("[|Human|] a [|AI|] b [|Human|] c", "ends with the human's words: 'c'"),
    ],
)
def test_baize_refuses_broken_transcripts(text: str, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.json", [{"topic": "t", "input": text}])
    assert problem in bad_rows(path, "baize")[0].problem


def test_options_are_only_those_of_the_format() -> None:
    assert not FORMATS["alpaca"].options and not FORMATS["baize"].file_options
    with pytest.raises(ConfigError, match="the format alpaca has no option 'seed'\nvalid: boxes, boxes_in"):
        import_file("x.json", "alpaca", seed=1)
    with pytest.raises(ConfigError, match="the format mmit has no option 'boxes'\nIt has no options"):
        import_file("x.jsonl", "mmit", boxes="norm1")
    with pytest.raises(ConfigError, match="did you mean 'positive'"):
        import_file("x.json", "natural_instructions", postive=1)
