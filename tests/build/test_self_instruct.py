"""Self-Instruct: each filter once, the whole loop against a server, the same result however many ask, and images."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from typer.testing import CliRunner

from mmit.build.self_instruct import InstructPlan, SelfInstruct, Task, _Candidate
from mmit.cli import app
from mmit.data.diversity import RougePool, nearest_rouge_l
from mmit.records import Image, Record, read_jsonl, write_jsonl
from mmit.teachers import Draw, Reply
from mmit.yamlio import dump_yaml
from tests.teachers.server import Server

WORDS = "list name sort explain compare rivers metals poems songs taxes rules birds dates coins fruits cities".split()


def pick(text: str, count: int, salt: object) -> str:
    found = []
    for n in range(count):
        digest = hashlib.sha256(f"{salt}|{n}|{text}".encode()).digest()
        found.append(WORDS[digest[0] % len(WORDS)])
    return " ".join(found)


def answer(body) -> str:
    """A teacher that answers by the content of the request, with faults of every kind among it."""
    content = body["messages"][0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    key = json.dumps(body, sort_keys=True)
    if "Continue this list" in text:
        return one_call(key, int(re.search(r"numbered from (\d+)", text).group(1)))
    if "numbered from" in text:
        first = int(re.search(r"numbered from (\d+)", text).group(1))
        lines = [f"{first + n}. {pick(key, 9, n).capitalize()}" for n in range(5)]
        return "\n".join([*lines, f"{first + 5}. Too short", f"{first + 6}. - draws a line of many more words"])
    if "Classification:" in text:
        return "Yes" if hashlib.sha256(text.encode()).digest()[1] % 3 == 0 else "No"
    if "Class label:" in text:
        return "Class label: good\nInput: fine day\nClass label: bad\nInput: rainy day"
    if "in exactly this form" in text:
        way = hashlib.sha256(text.encode()).digest()[0] % 3
        return ["Output: an answer", "Input: a\nOutput: b\nInput: a\nOutput: c", "nothing"][way]
    image = not isinstance(content, str)
    return f"seen {pick(text, 2, 1)}" if image and len(text) % 2 else "always the same"


def one_call(key: str, first: int) -> str:
    """A reply in Alpaca's form, with a fault of each kind."""
    made = [f"{first + n}. Instruction: {pick(key, 9, n)}\n{first + n}. Input: <noinput>\n" for n in range(4)]
    made = [text + f"{first + n}. Output: {pick(key, 3, -n)}" for n, text in enumerate(made)]
    bad = [
        f"{first + 4}. Instruction: {pick(key, 8, 90)}\n{first + 4}. Output: without an input",
        f"{first + 2}. Instruction: {pick(key, 8, 91)}\n{first + 2}. Input: a\n{first + 2}. Output: b",
        f"{first + 5}. Instruction: {pick(key, 8, 92)}\n{first + 5}. Input: a b\n{first + 5}. Output: A b.",
        f"{first + 6}. Instruction: Too short\n{first + 6}. Input: a\n{first + 6}. Output: b",
    ]
    return "\n###\n".join([*made, *bad])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seeds = [
        {"instruction": f"{pick(str(n), 8, 7)} {n}", "instances": [{"input": "", "output": "x"}]}
        | {"is_classification": n % 4 == 0}
        for n in range(12)
    ]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(seed) + "\n" for seed in seeds))
    return tmp_path


def run(folder: Path, server: Server, out: str, *, code: int = 0, **settings) -> str:
    teacher = {"open": f"{server.url}#m", "terms": "MIT", "in_flight": settings.pop("in_flight", 4)}
    given = {"seeds": "seeds.jsonl", "licence": "MIT", "teacher": teacher, "requests": 3} | settings
    (folder / "c.yaml").write_text(dump_yaml(given))
    result = CliRunner().invoke(app, ["build", "self-instruct", str(folder / "c.yaml"), "--out", str(folder / out)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_loop_gives_the_same_with_1_and_8_at_a_time_and_after_a_stop(folder):
    with Server(answer) as server:
        said = run(folder, server, "one", target=12, in_flight=1)
        asked = server.served
        assert "self-instruct: 12 records" in said
        run(folder, server, "two", target=12, in_flight=8)
        assert server.served == 2 * asked
        run(folder, server, "three", target=12, budget={"requests": 20}, code=3)
        run(folder, server, "three", target=12)
        assert server.served == 3 * asked
        run(folder, server, "three", target=12)
        assert server.served == 3 * asked  # all of it is in the journal
    first = (folder / "one/records/self-instruct.jsonl").read_bytes()
    assert first == (folder / "two/records/self-instruct.jsonl").read_bytes()
    assert first == (folder / "three/records/self-instruct.jsonl").read_bytes()
    records = list(read_jsonl(folder / "one/records/self-instruct.jsonl"))
    prompts = [record.turns[0].text.partition("\n\n")[0] for record in records]
    assert max(nearest_rouge_l(prompts)) <= 0.7
    stated = json.loads((folder / "one/build.json").read_text())
    assert stated["in"] == sum(stated["accepted"].values()) + sum(stated["dropped"].values())
    rules = {"the instruction is too short", "begins with punctuation or another script"}
    assert stated["dropped"].keys() >= rules | {"the same input with different outputs"}


def test_alpacas_style_takes_one_call_for_whole_tasks(folder):
    with Server(answer) as server:
        run(folder, server, "one", target=10, style="alpaca", in_flight=1)
        asked = server.served
        texts = [body["messages"][0]["content"] for body in server.bodies]
        run(folder, server, "two", target=10, style="alpaca", in_flight=8)
        assert server.served == 2 * asked
    assert all("with 20 new tasks" in text and "numbered from 4" in text for text in texts)
    one = (folder / "one/records/self-instruct.jsonl").read_bytes()
    assert one == (folder / "two/records/self-instruct.jsonl").read_bytes()
    stated = json.loads((folder / "one/build.json").read_text())
    assert stated["dropped"].keys() >= {
        "not one instruction, one input and one output",
        "the list's numbers repeat",
        "input and output are the same",
        "the instruction is too short",
    }
    build = json.loads(one.splitlines()[0])["meta"]["build"]
    assert build["template"] == "alpaca" and len(build["parents"]) == 3 and len(build["requests"]) == 1
    with Server(answer) as server:
        said = run(folder, server, "x", style="alpaka", code=2)
    assert "did you mean 'alpaca'" in said


def test_questions_about_images_that_need_none_are_dropped(folder):
    path = folder / "a.png"
    PIL.Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
    write_jsonl([Record.triple("q", "a", images=[str(path)], licence="MIT")], folder / "pictures.jsonl")
    with Server(answer) as server:
        run(folder, server, "out", target=4, pictures="pictures.jsonl")
    made = list(read_jsonl(folder / "out/records/self-instruct.jsonl"))
    assert len(made) == 4 and all(record.images and record.turns[1].text.startswith("seen") for record in made)
    stated = json.loads((folder / "out/build.json").read_text())
    assert stated["dropped"]["answered alike without the image"] > 0


def test_answers_belong_to_their_questions_whatever_image_these_have(tmp_path):
    """Each candidate is asked both ways: one without an image is answered alike, and shifts no other's answer."""
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (4, 4), (255, 0, 0)).save(path)

    class Eyes:
        """Says what it was asked, and whether it saw an image."""

        teachers = [SimpleNamespace(name="eyes", terms="MIT")]
        keep_thoughts = False

        def ask(self, requests):
            return [
                Reply(r.digest, "eyes", f"{r.text} {'seen' if len(r.messages[0].parts) > 1 else 'unseen'}")
                for r in requests
            ]

    seeds = [Task(str(n), f"{pick(str(n), 8, 7)} {n}") for n in range(6)]
    build = SelfInstruct(seeds, Eyes(), InstructPlan(), draw=Draw(), pictures=[Image(str(path))])
    one = build._asked(0)[0]
    asked = [(text, replace(one, image=image)) for text, image in (("first", None), ("second", one.image))]
    found = list(build._see([_Candidate(text, of, Reply("x", "eyes", "1. a list")) for text, of in asked]))
    assert found[0].reason == "answered alike without the image"
    assert found[1].record.turns[0].text == "second" and found[1].record.turns[1].text == "second seen"


def test_a_teacher_that_only_repeats_itself_ends_the_build(folder):
    with Server(lambda body: "9. List the metals of the river coins") as server:
        said = run(folder, server, "out", target=5, patience=2, code=2)
    assert "nothing was kept: too near to the pool (ROUGE-L) (5), no input and output found (1)" in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three rivers of Europe", ""),
        ("Name rivers", "the instruction is too short"),
        ("word " * 151, "the instruction is too long"),
        ("Draw a graph of the sales", "holds a keyword"),
        ("Explain how graphene is made", ""),
        ("Write a program that sorts numbers", "asks for a program"),
        ("- list the metals we use", "begins with punctuation or another script"),
        ("列出 三 种 金属 的 名称", "begins with punctuation or another script"),
        ("Say why.<|im_end|> Now then, go", "role tags or control tokens"),
        ("a b c d e f g h x y", "too near to the pool (ROUGE-L)"),
        ("a b c d e f g w x y", ""),
    ],
)
def test_filters(text, reason):
    seeds = [Task(str(n), t) for n, t in enumerate(["a b c d e f g h i j", "one two three four"])]
    build = SelfInstruct(seeds, None, InstructPlan(human=2), draw=Draw())  # type: ignore[arg-type]
    assert build._filtered(text) == reason


def test_the_pool_agrees_with_the_pairwise_measure():
    texts = [pick(str(n), 3 + n % 9, n) for n in range(40)]
    for text in texts[1:]:
        pool = RougePool()
        for other in texts:
            if other is not text:
                pool.add(other)
        assert pool.nearest(text) == nearest_rouge_l(texts)[texts.index(text)]
