"""LLaVA-NEXT: tiles, unpadding and the vector that ends a line, as transformers has them, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

import mmit
from mmit.data.chat import encode
from mmit.data.preparation import prepare_images
from mmit.errors import ModelError
from mmit.generate import Model
from mmit.interop.export import Companions, Talk, export_llava_hf, logits_of, processed
from mmit.models.interop.llava_hf_write import check_writable
from mmit.records import Image, Text, Turn
from tests.interop.llava_models import make_llava_hf
from tests.interop.test_portable import command
from tests.tiny_run import write_records

SIZES = {"wide": (45, 13), "tall": (14, 50), "square": (30, 30), "small": (9, 7), "nearly square": (33, 31)}


def picture(name: str) -> PIL.Image.Image:
    return PIL.Image.effect_mandelbrot(SIZES[name], (-2, -1, 1, 1), 20).convert("RGB")


def talk(*names: str) -> Talk:
    return (Turn("user", (*(Image(picture(n)) for n in names), Text("What is it, and which one is blue?"))),)


TALKS = {"text only": talk(), **{name: talk(name) for name in SIZES}, "several": talk("wide", "tall", "small")}


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request: Any, tmp_path_factory: Any) -> tuple[Any, Model, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_llava_hf(folder, tower=request.param, tokens="llama", tiled=True)
    return theirs, mmit.load(folder, device="cpu"), AutoProcessor.from_pretrained(folder, backend="pil"), folder


def ours(model: Model, asked: Talk) -> torch.Tensor:
    preparation = prepare_images(model.image, tokens=model.vlm.image_tokens, grid=model.vlm.image_grid)
    ids = encode(asked, model.chat_format, model.tokenizer, generate=True).ids
    return logits_of(model.vlm, ids, asked, preparation=preparation)


@pytest.mark.parametrize("case", TALKS)
def test_tokens_and_logits_are_those_of_transformers(pair: Any, case: str) -> None:
    theirs, model, processor, _ = pair
    batch = processed(processor, TALKS[case])
    with torch.no_grad():
        expected = theirs(**batch).logits[0]
    found = ours(model, TALKS[case])
    assert len(found) == batch["input_ids"].shape[1]  # tokens of each picture, unpadded, line ends included
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_batch_of_uneven_lengths(pair: Any) -> None:
    theirs, model, processor, _ = pair
    texts, images = [], []
    for asked in TALKS.values():
        parts = asked[0].parts
        content = [{"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in parts]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images += [p.source for p in parts if isinstance(p, Image)]
    processor.tokenizer.padding_side = "right"
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**batch).logits
    for number, asked in enumerate(TALKS.values()):
        kept = batch["attention_mask"][number].bool()
        torch.testing.assert_close(ours(model, asked), expected[number][kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["text only", "wide", "several"])
def test_greedy_answers_are_those_of_transformers(pair: Any, case: str) -> None:
    theirs, model, processor, _ = pair
    batch = processed(processor, TALKS[case])
    new = theirs.generate(**batch, max_new_tokens=64, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    while new and new[-1] == model.tokenizer.eos_token_id:
        new.pop()
    shown = [p.source for p in TALKS[case][0].parts if isinstance(p, Image)]
    answer = model.chat(shown, "What is it, and which one is blue?", max_new_tokens=64)
    assert answer == processor.decode(new, skip_special_tokens=True).strip()


def test_it_goes_back_as_it_came(pair: Any, tmp_path: Path) -> None:
    _, _, _, folder = pair
    model = mmit.load(folder, device="cpu")
    beside = Companions(model.tokenizer, model.chat_format, model.image, model.end_ids)
    found = export_llava_hf(tmp_path, model.vlm, beside)
    assert found.logits <= 1e-5 and found.pixels <= 1e-6
    _, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    again = mmit.load(tmp_path, device="cpu")
    assert again.image == model.image
    torch.testing.assert_close(ours(again, TALKS["wide"]), ours(model, TALKS["wide"]), atol=1e-5, rtol=0)


def test_it_is_tuned_and_written_back(pair: Any, tmp_path: Path) -> None:
    _, model, _, folder = pair
    data = write_records(tmp_path / "data", count=3, text_only=1)
    told = (f"data.train.0.path={data}", f"run.dir={tmp_path / 'run'}", "train.epochs=null", "train.steps=2")
    rates = ("tune.llm.mode=lora", "tune.llm.lr=1e-3", "tune.projector.lr=1e-3", "data.workers=0")
    command("train", "--from", folder, *told, *rates)
    start = mmit.load(tmp_path / "run" / "start", device="cpu")
    torch.testing.assert_close(ours(start, TALKS["tall"]), ours(model, TALKS["tall"]), atol=1e-5, rtol=0)
    tuned = mmit.load(tmp_path / "run", device="cpu").vlm.projector
    assert tuned is not None and start.vlm.projector is not None
    assert not torch.equal(tuned.line_end, start.vlm.projector.line_end)  # type: ignore[arg-type]
    assert "ids of the processor: the same" in command("export", tmp_path / "run", "--out", tmp_path / "out")
    LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["image_newline", "model.image_newline"])
def test_the_end_of_a_line_is_needed_and_found_under_either_name(tmp_path: Path, name: str) -> None:
    make_llava_hf(tmp_path, tiled=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    newline = tensors.pop(next(key for key in tensors if key.endswith("image_newline")))
    save_file({**tensors, name: newline}, file, {"format": "pt"})
    projector = mmit.load(tmp_path, device="cpu").vlm.projector
    assert projector is not None and projector.line_end is not None
    assert torch.equal(projector.line_end, newline)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match="1 missing: line_end"):
        mmit.load(tmp_path, device="cpu")


def test_tiles_that_are_not_llava_nexts_are_refused(tmp_path: Path) -> None:
    make_llava_hf(tmp_path, tiled=True)
    model = mmit.load(tmp_path, device="cpu")
    for image in (
        {**model.image, "mode": "dynamic", "tiles": {}},
        {**model.image, "tiles": {"unpad": False}},
    ):
        with pytest.raises(ModelError, match="are not LLaVA-NEXT's"):
            check_writable(model.vlm, image)
