"""Self-Instruct as a whole: 500 accepted from 175 seeds, the same however many ask, replayed, and after 20 kill -9.

The teacher is a generator of texts: it stands for the loop's invariants, not for a language model. A third of what it
writes has a fault, of every kind the filters know.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmit.records import read_jsonl
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server

SEEDS = Path(__file__).parents[3] / "shared" / "data" / "seed_tasks.jsonl"
VERBS = "List Name Sort Explain Compare Write Find Count Describe Translate Rewrite Summarise".split()
WORDS = [
    f"{a}{b}{c}" for a in "blmnprst" for b in ("a", "ei", "o", "u") for c in ("bel", "dor", "kin", "mas", "ton", "rix")
]


def sentence(rng: random.Random, count: int = 9) -> str:
    return " ".join([rng.choice(VERBS), *(rng.choice(WORDS) for _ in range(count))])


def faulty(rng: random.Random) -> str:
    """An instruction that one filter drops."""
    plain = sentence(rng)
    ways = [
        "",
        "Too short",
        " ".join([plain] * 20),
        plain + " graph",
        "Write a program that " + plain,
        "- " + plain,
        "\u5217\u51fa " + plain,
        plain + " <|im_end|>",
        plain + "\nHuman: and then?",
        "I'm sorry, but I can't do that here",
        plain + " caf\ufffd",
        "Name a word that ends with a vowel and begins with one",  # the same one again and again
    ]
    return rng.choice(ways)


def teacher(body):
    """Answer by the content of the request alone."""
    text = body["messages"][0]["content"]
    rng = random.Random(f"{text}|{body['seed']}")
    if "numbered from" in text:
        first = int(re.search(r"numbered from (\d+)", text).group(1))
        items = [faulty(rng) if rng.random() < 0.33 else sentence(rng) for _ in range(8)]
        listed = "\n".join(f"{first + n}. {item}" for n, item in enumerate(items))
        way = rng.random()
        if way < 0.04:
            return rng.choice(["", "Sure, here they are!", "I'm sorry, but I can't."])
        if way < 0.08:
            return listed[: len(listed) // 2], "length"
        if way < 0.10:
            return "", "content_filter"
        return listed.replace(f"{first + 3}.", f"{first}.") if way < 0.16 else listed
    if "Classification:" in text:
        return rng.choice(["Yes", "No", "No", ""])
    if "Class label:" in text:
        answers = ["Class label: good\nInput: a fine day\nClass label: bad\nInput: rain", "Class label: good", "none"]
        return rng.choices(answers, [6, 1, 1])[0]
    answers = ["Input: <noinput>\nOutput: an answer", "Output:", "Input: a\nOutput: b\nInput: a\nOutput: c"]
    answers += ["Input: a b\nOutput: A b.", "Input: a\nOutput: As follows:", "nothing", "Output: <think>x"]
    return rng.choices(answers, [20, 1, 1, 1, 1, 1, 1])[0]


def config(folder: Path, source: str, **teacher_options) -> Path:
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    described = {"open": source, "name": "m", "terms": "MIT"} | teacher_options
    path.write_text(dump_yaml({"seeds": "seeds.jsonl", "licence": "MIT", "target": 500, "teacher": described}))
    return path


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mmit", "build", "self-instruct", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)


def finished(path: Path, out: Path) -> bytes:
    process = start(path, out)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    return (out / "records/self-instruct.jsonl").read_bytes() + (out / "dropped.jsonl").read_bytes()


def lines(out: Path) -> int:
    path = out / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def asked(journal: Path) -> set[tuple[str, int]]:
    rows = [json.loads(line) for line in journal.read_bytes().splitlines()[1:] if line.endswith(b"}")]
    return {(row["messages"][0]["parts"][0]["text"], row["draw"]["seed"]) for row in rows}


@pytest.mark.slow
def test_the_same_500_from_175_seeds_with_1_4_and_16_at_a_time_replayed_and_after_20_kills(tmp_path):
    if SEEDS.is_file():
        (tmp_path / "seeds.jsonl").write_bytes(SEEDS.read_bytes())
    else:
        rng = random.Random(0)
        seeds = [{"instruction": sentence(rng), "is_classification": n < 26} for n in range(175)]
        (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    with Server(teacher) as server:
        url = f"{server.url}#m"
        first = finished(config(tmp_path, url, in_flight=1), tmp_path / "1")
        whole, total = server.served, lines(tmp_path / "1")
        assert whole == total - 1
        assert len(list(read_jsonl(tmp_path / "1/records/self-instruct.jsonl"))) == 500
        for count in (4, 16):
            assert finished(config(tmp_path, url, in_flight=count), tmp_path / str(count)) == first
        assert server.served == 3 * whole
        killed(tmp_path, server, config(tmp_path, url, in_flight=4), first, total)
    again = finished(config(tmp_path, "replay:1/journal.jsonl"), tmp_path / "replayed")  # without a server
    assert bare(again) == bare(first)
    stated = json.loads((tmp_path / "1/build.json").read_text())
    assert stated["in"] == sum(stated["accepted"].values()) + sum(stated["dropped"].values())
    assert stated["dropped"].keys() == RULES


def bare(content: bytes) -> bytes:
    """Without the ids of replies, which name the teacher that gave them."""
    return re.sub(rb'"[0-9a-f]{32}"', b"ID", content)


def killed(folder: Path, server: Server, path: Path, expected: bytes, total: int) -> None:
    """Kill the build 20 times at random places; no request whose reply was written is asked again."""
    out = folder / "killed"
    rng = random.Random(5)
    server.pause = 0.004
    for mark in sorted(rng.sample(range(2, total - 20), 20)):
        before = len(server.bodies)
        known = asked(out / "journal.jsonl") if out.exists() else set()
        process = start(path, out)
        while lines(out) < mark:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(0.1)  # those in flight are still served
        new = {(body["messages"][0]["content"], body["seed"]) for body in server.bodies[before:]}
        assert not new & known
    server.pause = 0.0
    known, before = asked(out / "journal.jsonl"), len(server.bodies)
    assert finished(path, out) == expected
    assert not {(body["messages"][0]["content"], body["seed"]) for body in server.bodies[before:]} & known
    assert lines(out) == total


RULES = {
    "empty",
    "the instruction is too short",
    "the instruction is too long",
    "holds a keyword",
    "asks for a program",
    "begins with punctuation or another script",
    "role tags or control tokens",
    "a refusal",
    "not valid UTF-8",
    "too near to the pool (ROUGE-L)",
    "no numbered list",
    "cut off by length",
    "refused by the server",
    "the list's numbers repeat",
    "a class label without an input",
    "input and output are the same",
    "the output ends with a colon",
    "the same input with different outputs",
    "no input and output found",
}
