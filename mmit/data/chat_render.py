"""Rendering of Hugging Face chat templates: a conversation in the messages that a template reads, text out.

Owns the form of messages (contents as strings or lists of parts, where a thought goes, calls as objects or as JSON),
the frozen date, and the reading of a template's failures. Knows no tokens. A template's own refusal and any failure
is an error of the caller's choice, since the same failure is the config's fault in the simplest conversation and the
record's in any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from mmit.data.chat_builtin import CLOSE, OPEN, Role
from mmit.data.template_process import Exceeded, Failed, Refused, render
from mmit.errors import RecordError

# How a template wants `message["content"]`: one string, or a list of {"type": "text" | "image"} parts.
Style = Literal["string", "list"]
# Where a template reads a thought: a field of the message, a part of its content, or the text itself.
Way = Literal["field", "part", "inline"]
FIELD, PART, INLINE = get_args(Way)
FIELDS = ("reasoning_content", "thinking", "reasoning")  # transformers copies one to the others
SENTINEL = re.compile(r"MmitSlot(\d+)End")


def sentinel(number: int) -> str:
    """Text that stands for content number N. Mixed case, so that a template that changes case is found out."""
    return f"MmitSlot{number}End"


class Outline(NamedTuple):
    """A turn without its words.

    Attributes:
        kinds: its parts, "t" a text and "i" an image.
        thought: None without a thought, "" for an empty one, "k" for one whose words are left out.
        inline: the text around a thought written in the turn's text; None for a thought in a field of its own.
        calls: its calls of tools as JSON, "" for none.
        more: further keys of the message.
    """

    role: Role
    kinds: str
    thought: str | None = None
    inline: tuple[str, str] | None = None
    calls: str = ""
    more: tuple[tuple[str, str], ...] = ()


Shape = tuple[Outline, ...]


class Extras(NamedTuple):
    """What a conversation has besides turns: JSON of its tools and of its template arguments, "" for none."""

    tools: str = ""
    args: str = ""


class Refusal(RecordError):
    """The template called raise_exception."""


class Failure(RecordError):
    """The template cannot be rendered with these messages."""


class TooMuch(Failure):
    """The template takes more time or memory than it may; no other form of the messages will do better."""


def writes_date(source: str) -> bool:
    """Tell whether a template reads the clock."""
    return "strftime_now" in source


class Renderer:
    """A template with its tokenizer, arguments and frozen date; counts its renderings in `renders`."""

    def __init__(self, source: str, tokenizer: Any, *, args: Mapping[str, Any], date: str | None) -> None:
        self.source, self.tokenizer, self.args, self.date = source, tokenizer, dict(args), date
        self.renders = 0
        self.styles: dict[str, Style] = {}
        self.thought: Way = INLINE
        self.calls_as_text = False

    def render(self, messages: Sequence[Mapping[str, Any]], extras: Extras, *, prompt: bool = False) -> str:
        """Return the rendered text; raises Refusal, Failure or TooMuch."""
        # Counted, since a rendering takes a process: tests hold the number down.
        self.renders += 1
        # As apply_chat_template of transformers: the special tokens by name, which the arguments may replace.
        variables = {
            "messages": list(messages),
            "add_generation_prompt": prompt,
            **self.tokenizer.special_tokens_map,
            "tools": json.loads(extras.tools) if extras.tools else None,
            "documents": None,
            **self.args,
            **(json.loads(extras.args) if extras.args else {}),
        }
        try:
            return render(self.source, variables, date=self.date)
        except Refused as refused:
            raise Refusal(str(refused)) from None
        except Failed as failed:
            error = TooMuch if isinstance(failed, Exceeded) else Failure
            raise error(f"the template fails: {failed}") from None

    def messages(self, shape: Shape, words: Sequence[Any]) -> list[dict[str, Any]]:
        """Return messages of a shape; `words` are the texts of its items in order, None for an image.

        The items of a turn are its thought if it has one to fill in, its texts and images, and its first call, whose
        word goes in front of the name of the function called.
        """
        left = iter(words)
        return [self._message(outline, left) for outline in shape]

    def _message(self, turn: Outline, words: Any) -> dict[str, Any]:
        out: dict[str, Any] = {"role": turn.role}
        thought = next(words) if turn.thought == "k" else turn.thought
        parts = [(kind, next(words)) for kind in turn.kinds]
        # Images have no place in a string: they stand where the record has them, beside what the template writes (see
        # `chat_template`).
        content: Any = "".join(word or "" for _, word in parts)
        inline = turn.inline or ((OPEN, CLOSE) if self.thought == INLINE else None)
        if thought is not None and inline is not None:
            content = inline[0] + thought + inline[1] + content
        if self.style(turn) == "list":
            content = [{"type": "text", "text": word} if kind == "t" else {"type": "image"} for kind, word in parts]
            if thought is not None and inline is not None:
                content = [{"type": "text", "text": inline[0] + thought + inline[1]}, *content]
                if len(content) > 1 and content[1]["type"] == "text":  # one text, as it was written
                    content[:2] = [{"type": "text", "text": content[0]["text"] + content[1]["text"]}]
        if thought is not None and inline is None:
            if self.thought == PART:
                texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                content = [{"type": "thinking", "thinking": thought}, *texts]
            else:
                # Under all three names: which one a template reads cannot be seen from outside, and the others do no
                # harm.
                out |= dict.fromkeys(FIELDS, thought)
        out["content"] = content
        if turn.calls:
            out["tool_calls"] = self._calls(json.loads(turn.calls), next(words))
        return out | dict(turn.more)

    def style(self, turn: Outline) -> Style:
        """How the content of a turn is given: as its role's, but a list where it holds an image and lists can."""
        own = self.styles.get(turn.role, self.styles.get("user", "string"))
        return "list" if "i" in turn.kinds and self.styles.get("user") == "list" else own

    def _calls(self, calls: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
        out = []
        # Only the first is marked: where the calls begin decides what is the answer's own text, and a template writes
        # them all together.
        for number, call in enumerate(calls):
            function = dict(call["function"])
            function["name"] = (mark if number == 0 else "") + function["name"]
            arguments = function.get("arguments", {})
            if self.calls_as_text:
                function["arguments"] = arguments if isinstance(arguments, str) else json.dumps(arguments)
            else:
                function["arguments"] = _parsed(arguments)
            out.append({**call, "function": function})
        return out


def _parsed(arguments: Any) -> Any:
    """Arguments as an object, which templates expect, also where OpenAI's JSON text was given."""
    # Templates iterate over arguments; OpenAI's API gives them as JSON text.
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments
