"""Families of templates x kinds of conversations: the text is apply_chat_template's, or a refusal by name."""

from __future__ import annotations

import datetime
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers as tk

from mmit.data.answers import AnswerText
from mmit.data.chat import ChatFormat, TemplateFormat, chat_format, encode
from mmit.data.chat_builtin import Piece
from mmit.data.chat_check import difference
from mmit.data.chat_turns import has_thought
from mmit.data.loss import Loss
from mmit.data.thoughts import split_thought
from mmit.errors import ConfigError, RecordError
from mmit.records import Image, Record, Text, Turn
from tests.data.small_chats import IMG, turns
from tests.data.small_tokenizers import byte_level
from tests.data.template_families import FAMILIES

TOKENS = [
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
]
TOKENS += [
    "<|call|>",
    "<|assistant|>",
    "<|user|>",
    "<|system|>",
    "<|observation|>",
    "<|User|>",
    "<|Assistant|>",
    "<sop>",
]
TOKENS += ["[gMASK]", "<|im_sep|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "[IMG]", "[TOOL_CALLS]"]
WHERE = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": WHERE}}
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "look", "arguments": {"at": "the 'sky' <b>", "n": 2}},
}
PLAIN = turns(("user", "  Hi \n"), ("assistant", "\nHo <b>' ü "), ("user", "And?"), ("assistant", "Yes."))
THOUGHT = [
    *turns(("user", "Q?")),
    Turn("assistant", (Text("Yes."),), thinking="hmm\n1"),
    *turns(("user", "Q2?")),
    Turn("assistant", (Text("No."),), thinking="hmm 2"),
]
CALLED = [
    *turns(("user", "Look!")),
    Turn("assistant", (), tool_calls=(CALL,)),
    Turn("tool", (Text("blue"),), name="look", tool_call_id="call00001"),
    *turns(("assistant", "It is blue."), ("user", "Sure?"), ("assistant", "Sure.")),
]
HM = "<think>\nhm\n</think>\n\n"
TALKS: dict[str, Record] = {
    "plain": Record(tuple(PLAIN)),
    "system": Record(tuple(turns(("system", "Be brief."), *[("user", "Hi"), ("assistant", "Ho")] * 2))),
    "think": Record(tuple(THOUGHT)),
    "think in text": Record(
        tuple(turns(("user", "Q?"), ("assistant", f"{HM}Yes."), ("user", "Q2?"), ("assistant", f"{HM}No.")))
    ),
    "empty think": Record(tuple(turns(("user", "Q?"), ("assistant", "<think>\n\n</think>\n\nYes.")))),
    "tool": Record(tuple(CALLED), tools=(TOOL,)),
    "tool picture": Record(
        (*CALLED[:2], Turn("tool", (Image("a.png"), Text("this")), name="look", tool_call_id="call00001"), *CALLED[3:]),
        tools=(),
    ),
    "picture": Record(tuple(turns(("user", [IMG, "What is it?"]), ("assistant", "A cat.")))),
}


@functools.cache
def pieces_of(name: str) -> tuple[Any, TemplateFormat, dict[str, list[Piece] | RecordError]]:
    """A family's tokenizer, its format, and what that makes of every kind of conversation."""
    tokenizer = tokenizer_with(FAMILIES[name])
    chat = chat_format("hf", tokenizer)
    assert isinstance(chat, TemplateFormat)
    found: dict[str, list[Piece] | RecordError] = {}
    for kind, record in TALKS.items():
        try:
            found[kind] = chat.pieces(record)
        except RecordError as error:
            found[kind] = error
    return tokenizer, chat, found


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_level()
    new = [t for t in TOKENS if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens([tk.AddedToken(t, normalized=False, special=True) for t in new], special_tokens=True)
    marks = ["</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([tk.AddedToken(t, normalized=False, special=False) for t in marks])
    tokenizer.chat_template = template
    return tokenizer


def messages_of(record: Record, chat: TemplateFormat) -> list[dict[str, Any]]:
    """Messages as a user of transformers writes them, contents in the form that the template takes."""
    out = []
    shape, _, _ = chat.outline(record)
    for turn, outline in zip(record.turns, shape, strict=True):
        content: Any = turn.text
        if chat.template.in_list(outline):
            content = [
                {"type": "image"} if isinstance(p, Image) else {"type": "text", "text": p.text} for p in turn.parts
            ]
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.thinking is not None:
            way = chat.template._renderer.thought
            if way == "part":
                message["content"] = [
                    {"type": "thinking", "thinking": turn.thinking},
                    {"type": "text", "text": turn.text},
                ]
            elif way == "inline":
                said = f"<think>\n{turn.thinking}\n</think>\n\n{turn.text}"
                message["content"] = [{"type": "text", "text": said}] if isinstance(content, list) else said
            else:
                # transformers writes each of these names for the others from 5.24 on
                message |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), turn.thinking)
        if turn.tool_calls:
            message["tool_calls"] = [dict(call) for call in turn.tool_calls]
        out.append(message | {key: value for key in ("name", "tool_call_id") if (value := getattr(turn, key))})
    return out


REASONS = ("drops or alters", "refuses", "cuts the thought", "fails", "does not write", "moves", "writes")


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_the_templates_or_the_refusal_names_it(name: str) -> None:
    tokenizer, chat, found = pieces_of(name)
    written = 0
    for kind, record in TALKS.items():
        pieces = found[kind]
        if isinstance(pieces, RecordError):
            assert pieces.remedy and any(reason in pieces.problem for reason in REASONS), f"{kind}: {pieces}"
            continue
        mark = chat.template.image_token or "[image]"
        ours = "".join(mark if p.kind == "image" else p.text for p in pieces if p.part != "added")
        if not (record.images and chat.template.image_token is None):
            given, tools = messages_of(record, chat), list(map(dict, record.tools)) or None
            try:
                theirs = tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
            except TypeError:  # a template that joins arguments to text
                for call in (call for message in given for call in message.get("tool_calls", ())):
                    call["function"] = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
                theirs = tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
            assert ours == theirs, kind
        assert difference(record, chat) == "", kind
        written += 1
        encoded = encode(record, chat, tokenizer)
        answers = [t for t in record.turns if t.role == "assistant"]
        learnt = tokenizer.decode([i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s])
        assert all(t.text.strip() in learnt or t.thinking or "<think>" in t.text for t in answers), kind
        assert not any(t.text.strip() in learnt for t in record.turns if t.role == "user"), kind
    assert written >= 4  # plain, empty thought, a picture, and most of the others


def test_few_kinds_are_refused() -> None:
    refused = {kind: 0 for kind in TALKS}
    for name in FAMILIES:
        for kind, pieces in pieces_of(name)[2].items():
            refused[kind] += isinstance(pieces, RecordError)
    assert len(FAMILIES) >= 65
    assert refused["plain"] == refused["empty think"] == refused["picture"] == 0
    assert refused["system"] <= 5 and refused["think"] <= 3 and refused["think in text"] <= 3


@pytest.mark.parametrize("name", ["llama 3.2", "granite", "gpt-oss"])
def test_the_date_is_frozen(name: str) -> None:
    tokenizer = tokenizer_with(FAMILIES[name])
    chat = chat_format("hf", tokenizer, date="2026-05-01")
    text = "".join(p.text for p in chat.pieces(TALKS["plain"]))
    assert any(day in text for day in ("01 May 2026", "May 01, 2026", "2026-05-01"))
    again = ChatFormat.from_json(chat.to_json(), tokenizer)
    assert again.pieces(TALKS["plain"]) == chat.pieces(TALKS["plain"])
    today = chat_format("hf", tokenizer)
    assert today.to_json()["date"] == datetime.date.today().isoformat()
    assert difference(TALKS["plain"], chat) == ""


def test_thoughts_are_learnt_and_cut_as_the_template_cuts_them() -> None:
    tokenizer = tokenizer_with(FAMILIES["qwen3"])
    encoded = encode(TALKS["think"], chat_format("hf", tokenizer), tokenizer)
    learnt = tokenizer.decode([i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s])
    assert learnt == "Yes.<|im_end|><think>\nhmm 2\n</think>\n\nNo.<|im_end|>"
    assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1  # as a token, and no empty block
    half = encode(TALKS["think"], chat_format("hf", tokenizer), tokenizer, loss=Loss(think=0.5))
    weights = [w for w in half.weights if w]
    assert half.ids == encoded.ids and set(weights) == {0.5, 1.0}
    assert weights.count(1.0) == 6  # both answers and their ends
    without = encode(TALKS["think"], chat_format("hf", tokenizer), tokenizer, loss=Loss(think=0))
    kept = tokenizer.decode([i for i, s in zip(without.ids, without.supervised, strict=True) if s])
    assert kept == "Yes.<|im_end|>No.<|im_end|>"


def test_prompts_with_thinking_on_and_off() -> None:
    tokenizer = tokenizer_with(FAMILIES["qwen3"])
    question = Record(tuple(turns(("user", "Q?"))))
    ends = {}
    for value in (True, False):
        chat = chat_format("hf", tokenizer, template_args={"enable_thinking": value})
        ends[value] = tokenizer.decode(encode(question, chat, tokenizer, generate=True).ids)
        theirs = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Q?"}], tokenize=False, add_generation_prompt=True, enable_thinking=value
        )
        assert ends[value] == theirs
    assert ends[False].endswith("<think>\n\n</think>\n\n") and ends[True].endswith("assistant\n")
    later = chat_format("hf", tokenizer).with_template_args({"enable_thinking": True})
    assert tokenizer.decode(encode(question, later, tokenizer, generate=True).ids) == ends[True]


def test_a_thought_between_special_tokens_stays_a_thought_in_the_decoded_answer() -> None:
    tokenizer = tokenizer_with(FAMILIES["gpt-oss"])
    chat = chat_format("hf", tokenizer)
    encoded = encode(TALKS["think"], chat, tokenizer)
    last = max(i for i, s in enumerate(encoded.supervised) if not s) + 1
    ids = list(encoded.ids[last:-1])  # what a model generates, its end left out
    assert tokenizer.decode(ids, skip_special_tokens=True) == "analysishmm 2assistantfinalNo."
    reader = AnswerText(tokenizer, thought=chat.thought_marks)
    assert reader.whole(ids) == "<think>\nhmm 2\n</think>\n\nNo."
    assert split_thought(reader.whole(ids)) == ("hmm 2", "No.")
    shown = [reader.settled(ids[:n]) for n in range(len(ids) + 1)]
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:], strict=False))
    assert len(set(shown)) > 3
    cut = ids[: len(ids) // 2]
    assert split_thought(reader.whole(cut))[1] == ""  # ended inside the thought: nothing to score
    plain = tokenizer("No.", add_special_tokens=False)["input_ids"]
    assert reader.whole(plain) == "No."


def test_only_marks_that_decoding_drops_are_looked_for() -> None:
    for name in ("gpt-oss", "qwen3", "glm 4.5", "gemma"):
        found = chat_format("hf", tokenizer_with(FAMILIES[name])).thought_marks
        assert (found is not None) == (name == "gpt-oss")


def test_thoughts_are_told_from_answers_without() -> None:
    told = {kind: has_thought(record) for kind, record in TALKS.items()}
    assert {kind for kind, has in told.items() if has} == {"think", "think in text"}


@pytest.mark.parametrize("name", ["gpt-oss", "magistral", "qwen3"])
def test_a_thought_in_a_text_between_the_templates_own_marks_is_one(name: str) -> None:
    """What the template itself writes around a thought marks one in the data too, be it a control token or letters."""
    tokenizer = tokenizer_with(FAMILIES[name])
    chat = chat_format("hf", tokenizer)
    marks = chat.own_thought()
    assert (marks == ()) == (name == "qwen3")
    opening, closing = marks[0] if marks else ("<think>\n", "\n</think>\n\n")
    ask = Turn("user", (Text("Is it?"),))
    field = Record((ask, Turn("assistant", (Text("No."),), thinking="hmm")))
    written = Record((ask, Turn("assistant", (Text(f"{opening}hmm{closing}No."),))))
    assert encode(written, chat, tokenizer) == encode(field, chat, tokenizer)
    assert has_thought(written, chat.own_thought) and has_thought(written) == (name == "qwen3")
    for said in (f"{opening}hmm, no end", f"No. {opening}hmm{closing}"):  # no thought, or not at the beginning
        open_ended = Record((ask, Turn("assistant", (Text(said),))))
        assert not has_thought(open_ended, chat.own_thought)
        assert any(said.strip() in piece.text for piece in chat.pieces(open_ended) if piece.kind == "content")


@pytest.mark.parametrize("name", ["magistral", "qwen3", "chatml"])
def test_a_thought_between_named_marks_is_written_with_the_formats(name: str) -> None:
    tokenizer = tokenizer_with(FAMILIES.get(name, FAMILIES["qwen3"]))
    chat = chat_format("chatml" if name == "chatml" else "hf", tokenizer, thoughts="<thinking>...</thinking>")
    ask = Turn("user", (Text("Is it?"),))
    field = Record((ask, Turn("assistant", (Text("No."),), thinking="hmm")))
    written = Record((ask, Turn("assistant", (Text("<thinking> hmm </thinking> No."),))))
    kept = ChatFormat.from_json(json.loads(json.dumps(chat.to_json())), tokenizer)
    for one in (chat, kept):
        assert encode(written, one, tokenizer) == encode(field, one, tokenizer)
        assert has_thought(written, one.own_thought)
    plain = chat_format("chatml" if name == "chatml" else "hf", tokenizer)
    assert encode(written, plain, tokenizer) != encode(field, plain, tokenizer) and "thoughts" not in plain.to_json()
    with pytest.raises(ConfigError, match="thoughts is '<thinking>'") as caught:
        chat_format("hf", tokenizer, thoughts="<thinking>")
    assert caught.value.where == "model.chat.thoughts"


def test_calls_are_learnt_and_weighed() -> None:
    tokenizer = tokenizer_with(FAMILIES["qwen3"])
    chat = chat_format("hf", tokenizer)
    encoded = encode(TALKS["tool"], chat, tokenizer)
    learnt = tokenizer.decode([i for i, s in zip(encoded.ids, encoded.supervised, strict=True) if s])
    said = '{"name": "look", "arguments": {"at": "the \'sky\' <b>", "n": 2}}'
    assert learnt.startswith(f"<tool_call>\n{said}\n</tool_call><|im_end|>")
    assert "blue<" not in learnt and learnt.endswith("Sure.<|im_end|>")
    halved = encode(TALKS["tool"], chat, tokenizer, loss=Loss(tool_calls=0.5))
    assert {w for w in halved.weights if w} == {0.5, 1.0}
    evil = {**CALL, "function": {"name": "look", "arguments": {"at": "<|im_end|>"}}}
    bad = Record((TALKS["tool"].turns[0], Turn("assistant", (), tool_calls=(evil,))))
    with pytest.raises(RecordError, match="hold the control token '<|im_end|>'"):
        chat.pieces(bad)


def test_named_tokens_are_themselves_in_answers_only() -> None:
    tokenizer = tokenizer_with(FAMILIES["chatml"])
    talk = Record(tuple(turns(("user", "a <tool> b"), ("assistant", "c <tool> d <|im_end|> e"))))
    name = tokenizer.convert_tokens_to_ids("<tool>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = encode(talk, chat_format("hf", tokenizer), tokenizer)
    assert plain.ids.count(name) == 0
    allowed = encode(talk, chat_format("hf", tokenizer, content_tokens=["<tool>"]), tokenizer)
    assert allowed.ids.count(name) == 1 and allowed.ids.count(end) == plain.ids.count(end) == 2
    with pytest.raises(ConfigError, match="no added token"):
        chat_format("hf", tokenizer, content_tokens=["<nope>"])


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama 3", "smolvlm"])
def test_encoding_is_linear_in_turns(name: str) -> None:
    tokenizer = tokenizer_with(FAMILIES[name])
    renders, searched = [], []
    for count in (50, 200):
        chat = chat_format("hf", tokenizer)
        before = chat.template.renders
        record = Record(tuple(turns(*[("user", "q"), ("assistant", "a")] * count)))
        searched.append(_calls(functools.partial(encode, record, chat, tokenizer)))
        renders.append(chat.template.renders - before)
    assert renders[0] == renders[1] <= 8
    assert searched[1] < 5 * searched[0]


def _calls(work: Callable[[], object]) -> int:
    """How many functions Python calls in `work`: what takes time, counted without a clock."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
