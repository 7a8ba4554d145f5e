"""Chat formats as Jinja: a processor's text is the text of training, for random conversations and not for a few."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmit.data.chat import ChatFormat, chat_format
from mmit.data.chat_builtin import BUILT_IN
from mmit.errors import ConfigError, RecordError
from mmit.interop.gguf import MARK
from mmit.interop.templates import TEMPLATES, processor_template
from mmit.records import Text, Turn
from tests.data.small_chats import IMG, VLM_LIST, VLM_WRAPPED, turns
from tests.data.small_tokenizers import byte_level
from tests.tiny_run import CHATML

IMAGE = "<image>"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEXTS = (
    "What is it?",
    "\nOn a line of its own",
    "a {{ b }} {% c %}",
    " two ",
    'say "x"\\n',
    "__> or <__med",
    "<__media is no mark",
    "你好 😀",
)


@functools.cache
def compiled(template: str) -> Any:
    """As transformers compiles templates."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


def rendered(template: str, messages: list[dict[str, Any]], *, generate: bool) -> str:
    return compiled(template).render(messages=messages, add_generation_prompt=generate)


def as_parts(talk: list[Turn]) -> list[dict[str, Any]]:
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in talk
    ]


def as_strings(talk: list[Turn]) -> list[dict[str, Any]]:
    """As llama.cpp gives them."""
    said = ["".join(part.text if isinstance(part, Text) else MARK for part in turn.parts) for turn in talk]
    return [{"role": turn.role, "content": text} for turn, text in zip(talk, said, strict=True)]


def written(chat: ChatFormat, talk: list[Turn], *, generate: bool, image: str = IMAGE) -> str:
    pieces = chat.pieces(talk, generate=generate)
    return "".join(image if piece.kind == "image" else piece.text for piece in pieces)


def random_talk(draw: random.Random, *, generate: bool) -> list[Turn]:
    talk: list[tuple[str, Any]] = [("system", draw.choice(TEXTS))] if draw.random() < 0.4 else []
    for _ in range(draw.randrange(1, 4)):
        # Between two texts an image: neighbouring texts are one in a string.
        images = [[IMG] * draw.randrange(3) for _ in range(2)]
        talk.append(("user", [*images[0], draw.choice(TEXTS), *images[1]]))
        talk.append(("assistant", draw.choice(TEXTS)))
    return turns(*(talk[:-1] if generate else talk))


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "plain"])
def test_a_built_in_format_is_written_as_in_training(name: str, generate: bool) -> None:
    chat, draw = chat_format(name, byte_level()), random.Random(0)
    lists, token = processor_template(chat, bos="", image_token=IMAGE)
    strings, mark = processor_template(chat, bos="", image_token=MARK, marked=True)
    assert (token, mark) == (IMAGE, MARK)
    for _ in range(60):
        talk = random_talk(draw, generate=generate)
        assert rendered(lists, as_parts(talk), generate=generate) == written(chat, talk, generate=generate)
        expected = written(chat, talk, generate=generate, image=MARK)
        assert rendered(strings, as_strings(talk), generate=generate) == expected


def test_pre_training_s_format_is_written_as_in_training() -> None:
    chat = chat_format("plain", byte_level())
    template, _ = processor_template(chat, bos="", image_token=IMAGE)
    for talk, generate in (
        (turns(("user", [IMG, IMG])), True),
        (turns(("user", [IMG]), ("assistant", "A cat.")), False),
    ):
        assert rendered(template, as_parts(talk), generate=generate) == written(chat, talk, generate=generate)
    with pytest.raises(RecordError, match="writes no prompt"):
        chat.pieces(turns(("user", "What?")), generate=True)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize(
    ("source", "own"), [(CHATML, ""), (VLM_LIST, IMAGE), (VLM_WRAPPED + PROMPT, IMAGE)], ids=["strings", "list", "both"]
)
def test_a_jinja_template_is_given_the_contents_it_takes(source: str, own: str, generate: bool, tmp_path: Path) -> None:
    """One that takes strings gets images as the token for one; one that writes images keeps its own token."""
    path = tmp_path / "chat.jinja"
    path.write_text(source)
    tokenizer = byte_level()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    chat, draw = chat_format(str(path), tokenizer), random.Random(1)
    template, token = processor_template(chat, bos="", image_token="<given>")
    assert token == (own or "<given>")
    for _ in range(30):
        talk = random_talk(draw, generate=generate)
        expected = written(chat, talk, generate=generate, image=token)
        assert rendered(template, as_parts(talk), generate=generate).rstrip() == expected.rstrip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_that_the_tokenizer_puts_in_front_stands_there_once(name: str) -> None:
    talk = turns(("user", [IMG])) if name == "plain" else turns(("user", "What?"))
    plain, _ = processor_template(chat_format(name, byte_level()), bos="", image_token=IMAGE)
    begun, _ = processor_template(chat_format(name, byte_level()), bos='<s "1">', image_token=IMAGE)
    text = rendered(plain, as_parts(talk), generate=True)
    assert rendered(begun, as_parts(talk), generate=True) == '<s "1">' + text


def test_every_built_in_format_has_a_template_and_one_of_one_s_own_has_none() -> None:
    assert TEMPLATES.keys() == BUILT_IN.keys()
    chat = chat_format("qa", byte_level())
    chat.name = "vicuna"
    with pytest.raises(ConfigError, match="no Jinja template for chat format 'vicuna'\ndid you mean 'vicuna_v1'"):
        processor_template(chat, bos="", image_token=IMAGE)
