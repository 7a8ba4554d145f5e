"""Every malformed text has a reason, and the table below meets every reason that the parsers and filters know."""

from __future__ import annotations

import ast
import inspect

import pytest

from mmit.build import parsers, replies
from mmit.build.parsers import PAIRS, SPEAKERS, alternating, instances, numbered, tasks
from mmit.build.replies import problem
from mmit.teachers import Reply

WIDE = "\uff1a"


def chat(reply):
    return alternating(reply, SPEAKERS)[1]


def pairs(reply):
    return alternating(reply, PAIRS)[1]


def items(reply):
    return [reason for _, reason in numbered(reply)]


def kinds(reply):
    return [reason for *_, reason in instances(reply.text, classification=True)]


def plain(reply):
    return [reason for *_, reason in instances(reply.text, classification=False)]


def whole(reply):
    return [task.reason for task in tasks(reply)]


def answer(reply):
    return problem(reply, "What is it?")


# (parser, text, reason or reasons, how the reply ended)
GOLDEN = [
    (chat, "[Human] Hi.\n[AI] Hello.", ""),
    (chat, "[Human]: Hi: a: b\n[AI]: Hello.\n[Human] Why?\n[AI] Because.", ""),
    (chat, f"[|Human|]{WIDE}Hi.\n[|AI|]{WIDE}Hello.", ""),
    (chat, "", "empty"),
    (chat, "Hi there.", "no tags of the speakers"),
    (chat, "[Mensch] Hi.\n[KI] Hallo.", "no tags of the speakers"),
    (chat, "[[Human]] Hi.\n[[AI]] Hello.", "no tags of the speakers"),
    (chat, "Sure!\n[Human] Hi.\n[AI] Hello.", "text before the first tag"),
    (chat, "[AI] Hello.\n[Human] Hi.", "the wrong side speaks first"),
    (chat, "[Human] Hi.\n[Human] You?\n[AI] Hello.", "one side speaks twice in a row"),
    (chat, "[Human] Hi.\n[AI] Hello.\n[AI] More.", "one side speaks twice in a row"),
    (chat, "[Human] Hi.\n[AI] Hello.\n[Human] Bye.", "the last turn has no answer"),
    (chat, "[Human] Hi.\n[AI]", "an empty turn"),
    (chat, "[Human] [Human] Hi.\n[AI] Hello.", "a tag inside a turn"),
    (chat, "[Human] Say [AI] twice.\n[AI] Hello.", "a tag inside a turn"),
    (chat, "[Human] Hi.\n[AI] Hello.<|im_end|>", "role tags or control tokens"),
    (chat, "[Human] Hi.\n[AI] Hello.\nUser: more", "role tags or control tokens"),
    (chat, f"[Human] Hi.\n[AI] Hello.\nUser{WIDE} more", "role tags or control tokens"),
    (chat, "[Human] Hi.\n[AI] Hello.", "cut off by length", "length"),
    (pairs, f"Question: Who?\nAnswer: He.\nQuestion{WIDE}Why?\nAnswer{WIDE}So.", ""),
    (pairs, "**Question:** Who?\n**Answer:** He.", ""),
    (pairs, "Frage: Wer?\nAntwort: Er.", "no tags of the speakers"),
    (pairs, "Question: Who? Answer: He.\nAnswer: She.", "a tag inside a turn"),
    (items, "9. a b\n10) c d\n11: e f", ["", "", ""]),
    (items, "9. a\n10. b", ["", "cut off by length"], "length"),
    (items, "9. a\n9. b", ["", "the list's numbers repeat"]),
    (items, "9. \n10. b", ["empty", ""]),
    (items, "Sure!", ["no numbered list"]),
    (items, "", ["empty"]),
    (items, "", ["refused by the server"], "refused"),
    (items, "", ["not in the replayed journal"], "unrecorded"),
    (plain, "Input: <noinput>\nOutput: x", [""]),
    (plain, f"Input{WIDE}a\nOutput{WIDE}b{WIDE}", ["the output ends with a colon"]),
    (plain, "Input: a\nOutput: A.", ["input and output are the same"]),
    (plain, "Input: a\nInput: b\nOutput:", ["an input without an output", "empty"]),
    (kinds, "Class label: x\nClass label: y\nInput: z", ["a class label without an input", ""]),
    (kinds, "nothing", []),
    (whole, "4. Instruction: Say a\n4. Input: <noinput>\n4. Output: a\n###\n", [""]),
    (
        whole,
        "4. Instruction: Say a\n4. Input: b\n4. Output: B\n###\nSure!",
        ["input and output are the same", "no instruction, input and output"],
    ),
    (whole, "4. Instruction: Say a\n4. Output: a", ["not one instruction, one input and one output"]),
    (whole, "4. Instruction: Say a\n4. Input: b\n5. Output: a", ["the parts of a task have different numbers"]),
    (whole, "4. Instruction:\n4. Input: b\n4. Output: a", ["empty"]),
    (whole, "Sure, here you are", ["no instruction, input and output"]),
    (whole, "", ["empty"]),
    (answer, "Fine.", ""),
    (answer, "caf\ufffd", "not valid UTF-8"),
    (answer, "As an AI language model, ...", "a refusal"),
    (answer, "It is <think>hm</think> red.", "role tags or control tokens"),
    (answer, "what is it", "repeats the prompt"),
]


@pytest.mark.parametrize("row", GOLDEN, ids=range(len(GOLDEN)))
def test_golden(row):
    parse, text, reason, *finish = row
    assert parse(Reply("", "t", text, *finish)) == reason


def test_tasks_whose_numbers_repeat_and_the_last_of_a_cut_list():
    text = "4. Instruction: Say a\n4. Input: b\n4. Output: c\n###\n4. Instruction: Say d\n4. Input: e\n4. Output: f"
    assert whole(Reply("", "t", text)) == ["", "the list's numbers repeat"]
    assert whole(Reply("", "t", text.replace("4. Instruction: Say d", "5. Instruction: Say d"), "length"))[1] != ""


def test_thoughts_alone_are_no_answer():
    assert problem(Reply("", "t", "", thought="hm")) == "a thought without an answer"


def test_the_table_meets_every_reason():
    """The reasons are read from the source, so that a new one needs a row above."""
    found = set()
    for row in GOLDEN:
        found |= {row[2]} if isinstance(row[2], str) else set(row[2])
    known = set(replies._FINISH.values())
    for function in (replies.text_problem, *[f for _, f in inspect.getmembers(parsers, inspect.isfunction)]):
        if function.__module__ not in ("mmit.build.parsers", "mmit.build.replies"):
            continue
        for node in ast.walk(ast.parse(inspect.getsource(function))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                known.add(node.value)
    docs = {inspect.getdoc(f) for f in vars(parsers).values()} | {inspect.getdoc(replies.text_problem)}
    known = {text for text in known if inspect.cleandoc(text) not in docs and "\n" not in text}
    assert known - found == {"class label"}  # a tag, no reason
