"""Tokens and loss mask of a conversation, born together, piece by piece.

Owns ChatFormat (turns to pieces: template text, content, images) and `encode` (pieces to ids). Only here is a
mask made: supervised are the assistant's text and the token that ends it. Takes the turns of a record and a
tokenizer object; gives ids, mask and origins of equal length, with one IMAGE_SLOT per image. Never tokenises
content inside rendered text and never cuts a record.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from mmit.data.chat_builtin import BUILT_IN, FlatTurn, Origin, Piece
from mmit.data.chat_template import ChatTemplate, Shape
from mmit.data.content import After, PieceTokenizer, piece_tokenizer
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record, Text, Turn

IMAGE_SLOT = -200  # LLaVA's IMAGE_TOKEN_INDEX; no tokenizer has a negative id


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a record, whether each is supervised, and where each comes from; all of one length.

    An image is a single IMAGE_SLOT, never supervised.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    origin: tuple[Origin, ...]


class ChatFormat(ABC):
    """How turns become pieces. Build one with `chat_format`.

    Attributes:
        name: what it was asked for as.
        end: the supervised text after every answer; its last token ends a generation.
        as_processor: tokenise as a transformers processor does: the tokenizer's BOS goes before a rendered text
            that does not begin with it, and text after an image is text after a control token, not, as in LLaVA,
            a text of its own.
    """

    name: str
    end: str
    as_processor: bool = False
    _tokenizer: Any

    def pieces(self, turns: Sequence[Turn], *, generate: bool = False) -> list[Piece]:
        """Return the pieces of a conversation; with `generate`, up to where the next answer begins.

        A template piece may end in the space that the first token of the following content will carry.
        Raises RecordError for turns that break the rules of a record or that the format cannot express.
        """
        Record(tuple(turns)).validate(for_training=not generate)
        _refuse_unwritten(turns)
        return _merged(self._lay_out([_flat(turn) for turn in turns], generate))

    @abstractmethod
    def _lay_out(self, turns: list[FlatTurn], generate: bool) -> list[Piece]: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` rebuilds the format from, for a checkpoint."""

    @staticmethod
    def from_json(obj: Mapping[str, Any], tokenizer: Any) -> ChatFormat:
        """Rebuild a format; raises ConfigError for unknown keys or names."""
        keys = ("name", "template", "image_token", "template_args", "as_processor")
        for key in obj:
            if key not in keys:
                raise ConfigError(f"unknown key '{key}'", where="chat format", remedy=nearest(key, keys))
        if "name" not in obj:
            raise ConfigError("the key 'name' is missing", where="chat format", remedy=f"keys: {', '.join(keys)}")
        if "template" not in obj:
            return chat_format(obj["name"], tokenizer)
        return TemplateFormat(
            obj["name"],
            obj["template"],
            tokenizer,
            image_token=obj.get("image_token"),
            template_args=obj.get("template_args"),
            as_processor=bool(obj.get("as_processor")),
        )

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of `end` after an answer; generation stops at the last of them."""
        return piece_tokenizer(self._tokenizer).template(self.end, "text")


class TemplateFormat(ChatFormat):
    """A Jinja chat template, the tokenizer's own or the user's."""

    def __init__(
        self,
        name: str,
        template: str,
        tokenizer: Any,
        *,
        image_token: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        as_processor: bool = False,
    ) -> None:
        self.name, self._tokenizer = name, tokenizer
        self._template = ChatTemplate(
            template, tokenizer, where=f"chat template '{name}'", image_token=image_token, args=template_args
        )
        self.end, self.as_processor = self._template.end, as_processor

    def _lay_out(self, turns: list[FlatTurn], generate: bool) -> list[Piece]:
        shape: Shape = tuple((role, "".join("i" if p is None else "t" for p in parts)) for role, parts in turns)
        texts = iter([part for _, parts in turns for part in parts if part is not None])
        pieces = []
        for slot in self._template.slots(shape, generate=generate):
            text = slot.text
            if slot.kind == "content":
                text = next(texts).lstrip(slot.left).rstrip(slot.right)
            pieces.append(Piece(slot.kind, text, slot.supervised))
        return pieces

    def to_json(self) -> dict[str, Any]:
        """Return name, template text, image token, template arguments, and `as_processor` where it is set."""
        template = self._template
        told: dict[str, Any] = {
            "name": self.name,
            "template": template.source,
            "image_token": template.image_token,
            "template_args": template.args,
        }
        return {**told, "as_processor": True} if self.as_processor else told


class BuiltInFormat(ChatFormat):
    """One of BUILT_IN; the tokenizer's BOS comes first if it puts one in front of every text by itself."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        self.name, self._tokenizer = name, tokenizer
        tokens = piece_tokenizer(tokenizer)
        self._write, end = BUILT_IN[name]
        self.end = end or tokenizer.eos_token
        if not self.end:
            problem = f"the chat format '{name}' ends an answer with the EOS token, but the tokenizer has none"
            raise ConfigError(problem, remedy="Set tokenizer.eos_token.")
        self._bos = [Piece("template", tokens.bos)] if tokens.bos else []
        if name == "chatml":
            for token in ("<|im_start|>", "<|im_end|>"):
                if len(tokens.control_spans(token)) != 1:
                    problem = f"the tokenizer has no token {token}, which the chat format 'chatml' needs"
                    raise ConfigError(problem, remedy="Use 'qa' or 'vicuna_v1', which need only an EOS token.")

    def _lay_out(self, turns: list[FlatTurn], generate: bool) -> list[Piece]:
        return self._bos + self._write(turns, self.end, generate)

    def to_json(self) -> dict[str, Any]:
        """Return the name, which says everything."""
        return {"name": self.name}


def chat_format(
    name: str,
    tokenizer: Any,
    *,
    image_token: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> ChatFormat:
    """Build a chat format for a fast Hugging Face tokenizer.

    `name` is a key of BUILT_IN, "hf" for the tokenizer's own chat template, the path of a .jinja file or of a
    .json file that holds what `to_json` gives, or the text of a template. `image_token` names the text that stands
    for one image in a template that takes image parts, where mmit cannot tell; `template_args` go to the template
    as variables, such as enable_thinking.
    Raises ConfigError if the name is unknown or the template cannot be used.
    """
    if name in BUILT_IN:
        if image_token is not None or template_args:
            problem = f"the chat format '{name}' takes neither image_token nor template_args"
            raise ConfigError(problem, remedy="Leave them out, or use a chat template.")
        return BuiltInFormat(name, tokenizer)
    if name == "hf":
        if not tokenizer.chat_template:
            problem = "the chat format 'hf' needs the tokenizer's chat template, and it has none"
            remedy = f"Name another chat format: {', '.join(BUILT_IN)}, or the path of a .jinja file."
            raise ConfigError(problem, remedy=remedy)
        template = tokenizer.get_chat_template()
    elif "{%" in name or "{{" in name:
        name, template = "custom", name
    elif name.endswith(".json"):
        try:
            return ChatFormat.from_json(json.loads(Path(name).read_text(encoding="utf-8")), tokenizer)
        except (OSError, ValueError) as error:
            problem = f"cannot read the chat format: {error}"
            raise ConfigError(problem, where=name, remedy="Check the path.") from error
    elif name.endswith(".jinja"):
        try:
            name, template = Path(name).stem, Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"cannot read the chat template: {error}"
            raise ConfigError(problem, where=name, remedy="Check the path.") from error
    else:
        remedy = f"{nearest(name, [*BUILT_IN, 'hf'])}, or the path of a .jinja file"
        raise ConfigError(f"unknown chat format '{name}'", remedy=remedy)
    return TemplateFormat(name, template, tokenizer, image_token=image_token, template_args=template_args)


def encode(turns: Sequence[Turn], chat: ChatFormat, tokenizer: Any, *, generate: bool = False) -> Encoded:
    """Tokenise a conversation piece by piece; with `generate`, up to where the answer begins.

    A space that ends a template piece goes over to the content after it, since tokenizers attach a space
    to the word on its right; a prompt for generation therefore ends without it. Raises RecordError for turns
    that the format refuses and for characters that the tokenizer cannot write.
    """
    tokens = piece_tokenizer(tokenizer)
    out = _Writer(tokens, as_processor=chat.as_processor)
    runs = [list(run) for _, run in groupby(chat.pieces(turns, generate=generate), key=lambda p: p.kind)]
    if chat.as_processor and tokens.bos and not runs[0][0].text.startswith(tokens.bos):
        out.bos()
    for number, run in enumerate(runs):
        if run[0].kind == "image":
            out.images(len(run))
        elif run[0].kind == "content":
            for piece in run:
                out.content(piece)
        else:
            following = runs[number + 1][0].kind if number + 1 < len(runs) else "end"
            out.template(run, lend_space=following == "content" or (generate and following == "end"))
    if not generate and True not in out.supervised:
        raise RecordError("no token of the record is supervised", remedy="Give the assistant turn some text.")
    return Encoded(tuple(out.ids), tuple(out.supervised), tuple(out.origin))


class _Writer:
    """Collects ids, mask and origin, and remembers what stands to the left of the next piece."""

    def __init__(self, tokens: PieceTokenizer, *, as_processor: bool) -> None:
        self.ids: list[int] = []
        self.supervised: list[bool] = []
        self.origin: list[Origin] = []
        self._tokens = tokens
        # As LLaVA does: the text after an image is tokenised like a text of its own.
        self._after_image: After = "control" if as_processor else "start"
        self._after: After = "start"
        self._space = ""

    def bos(self) -> None:
        """Add the token that the tokenizer puts before every text by itself; the text still begins after it."""
        self._add(self._tokens.template(self._tokens.bos, "start"), False, "template")

    def images(self, count: int) -> None:
        self._add([IMAGE_SLOT] * count, False, "image")
        self._after = self._after_image

    def content(self, piece: Piece) -> None:
        self._add(self._tokens.content(self._space + piece.text, self._after), piece.supervised, "content")
        self._after, self._space = "text", ""

    def template(self, run: list[Piece], *, lend_space: bool) -> None:
        """Add neighbouring template pieces, encoded as one text; only the first can be supervised."""
        text = "".join(piece.text for piece in run)
        if lend_space and text.endswith(" "):
            text, self._space = text[:-1], " "
        if not text:
            return
        ids = self._tokens.template(text, self._after)
        end = run[0].text if run[0].supervised else ""
        count = len(self._tokens.template(end, self._after)) if end else 0
        self._add(ids[:count], True, "template")
        self._add(ids[count:], False, "template")
        self._after = "control" if ids and ids[-1] in self._tokens.control_ids else "text"

    def _add(self, ids: Sequence[int], supervised: bool, origin: Origin) -> None:
        self.ids += ids
        self.supervised += [supervised] * len(ids)
        self.origin += [origin] * len(ids)


def _refuse_unwritten(turns: Sequence[Turn]) -> None:
    """Raise RecordError for what the chat formats do not write: it must not be learnt as if it were not there."""
    for number, turn in enumerate(turns, 1):
        held = {key: getattr(turn, key) for key in ("weight", "thinking", "tool_calls")}
        found = [key for key, value in held.items() if value not in (None, ())]
        if any(isinstance(part, Text) and part.weight is not None for part in turn.parts):
            found.append("weighted text")
        if turn.role == "tool":
            found.append("a tool's result")
        if turn.role == "assistant" and any(isinstance(part, Image) for part in turn.parts):
            found.append("an image")
        if found:
            problem = f"turn {number} ({turn.role}) has {', '.join(found)}, which the chat format does not write"
            raise RecordError(problem, remedy="Leave the record out: run.on_bad_record=skip.")


def _flat(turn: Turn) -> FlatTurn:
    """Join neighbouring texts, so that how a text was cut into parts makes no difference; drop empty ones."""
    parts: list[str | None] = []
    for part in turn.parts:
        if isinstance(part, Image):
            parts.append(None)
        elif parts and parts[-1] is not None:
            parts[-1] += cast(Text, part).text
        elif cast(Text, part).text:
            parts.append(cast(Text, part).text)
    return cast(Any, turn.role), parts


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Drop empty pieces and join neighbouring template pieces of equal supervision."""
    out: list[Piece] = []
    for piece in pieces:
        if not piece.text and piece.kind != "image":
            if piece.supervised:
                raise RecordError("the chat template strips the answer to nothing", remedy="Give it some text.")
        elif out and piece.kind == out[-1].kind == "template" and piece.supervised == out[-1].supervised:
            out[-1] = Piece("template", out[-1].text + piece.text, piece.supervised)
        else:
            out.append(piece)
    return out
