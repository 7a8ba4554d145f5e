"""The local teacher on a tiny random model: batches, seeds, how answers end, token counts, a plain LLM folder."""

from __future__ import annotations

import io

import PIL.Image
import torch

from mmit.models.llm import load_llm
from mmit.records import Image, Record
from mmit.teachers import Desk, Draw, Journal, Request
from mmit.teachers.local import Local, load_teacher
from mmit.teachers.request import user
from tests.test_generate import LLAMA, build
from tests.tiny_run import write_tokenizer


def png(shade: int) -> Image:
    out = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (shade, 0, 90)).save(out, "PNG")
    return Image(out.getvalue())


def test_a_reply_depends_on_its_seed_and_not_on_batch_or_order(tmp_path):
    model = build()
    asked = [
        Request(user(png(40 * n), f"ask {n}"), Draw(temperature=1.0 if n % 2 else 0.0, max_tokens=6, seed=n))
        for n in range(5)
    ]
    texts = {}
    for run, (batch, order) in enumerate([(8, 1), (1, -1)]):
        work = Desk([Local("tiny", batch_size=batch, model=model)], Journal(tmp_path / f"{run}.jsonl", {}))
        replies = work.ask(asked[::order])
        texts[run] = [reply.text for reply in replies[::order]]
        assert all(reply.new_tokens and reply.prompt_tokens for reply in replies)
    assert texts[0] == texts[1]
    record = Record(asked[0].messages)
    assert texts[0][0] == model.generate([record], max_new_tokens=6, temperature=0.0)[0]  # the same renderer


def test_answers_cut_by_length_say_so(tmp_path):
    model = build(vision=False)
    (_, done), *_ = model.complete([Record(user("hello"))], seeds=[0], max_new_tokens=3)
    assert done.cut == (done.new_tokens == 3 and done.cut) and done.new_tokens <= 3
    long = [Draw(max_tokens=2), Draw(max_tokens=300)]
    replies = Desk([Local("t", model=model)], Journal(tmp_path / "j", {})).ask([Request(user("a"), d) for d in long])
    assert replies[0].finish == "length" and replies[0].new_tokens == 2


def test_a_plain_llm_folder_is_a_teacher(tmp_path):
    torch.manual_seed(0)
    tokenizer = write_tokenizer(tmp_path)
    load_llm("tiny", random_init=LLAMA | {"vocab_size": len(tokenizer)}, dtype=torch.float32).save_pretrained(tmp_path)
    model = load_teacher(str(tmp_path), device="cpu")
    (_, done), *_ = model.complete([Record(user("hello"))], seeds=[0], max_new_tokens=4)
    assert 1 <= done.new_tokens <= 4 and done.prompt_tokens > 5


def test_another_model_at_the_same_path_is_another_teacher(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    names = set()
    for content in (bytes(200_000), bytes(199_999) + b"x", bytes(199_999), b"x" + bytes(199_998)):
        weights.write_bytes(content)
        names |= {Local(str(tmp_path)).identity, Local(str(tmp_path)).identity}
    assert len(names) == 4
    assert Local("package:no/such.gguf").identity == "local:package:no/such.gguf"
