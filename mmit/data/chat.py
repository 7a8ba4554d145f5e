"""Tokens and loss weights of a conversation, born together, piece by piece.

Owns ChatFormat (turns to pieces: template text, content, images) and `encode` (pieces to ids). Only here does a token
get its loss weight, by the rules of `data/loss.py`; by default the assistant's text and the token that ends it have
1, all others 0. Takes a record (or its turns) and a tokenizer object; gives ids, weights and origins of equal length,
with one IMAGE_SLOT per image. Never tokenises content inside rendered text and never cuts a record.
"""

from __future__ import annotations

import datetime
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from mmit.data.chat_builtin import BUILT_IN, Piece, Said, Words, merged, own_writer
from mmit.data.chat_render import Extras, Shape, writes_date
from mmit.data.chat_template import ChatTemplate
from mmit.data.chat_turns import Talk, as_record, extras_of, flat, outline_of
from mmit.data.chat_writer import Encoded, Writer
from mmit.data.content import checked_tokens, piece_tokenizer
from mmit.data.loss import ANSWERS, Loss
from mmit.data.thoughts import checked_marks, marks_of
from mmit.errors import ConfigError, MmitError, RecordError, nearest
from mmit.plugins import FORM, is_spec
from mmit.records import Record, Text, Turn


@dataclass(frozen=True)
class FormatOptions:
    """What a chat format is told besides its name.

    Attributes:
        image_token: the text that stands for one image in a template that takes image parts, where mmit cannot tell.
        template_args: variables of the template, such as enable_thinking.
        as_processor: see `ChatFormat`.
        content_tokens: control tokens that an assistant's text may hold as themselves, besides those that are not
            special and stand in the template.
        date: the day (ISO) of a template that asks for it; None takes today, from then on kept in `to_json`.
        thinks: prompts end before a thought, see `ChatFormat`.
        thoughts: further marks of a thought in an answer's text, as <thinking>...</thinking>.
    """

    image_token: str | None = None
    template_args: Mapping[str, Any] | None = None
    as_processor: bool = False
    content_tokens: Sequence[str] = ()
    date: str | None = None
    thinks: bool = False
    thoughts: str | None = None


_KEYS = ("name", "template", *(field.name for field in fields(FormatOptions)))


class ChatFormat(ABC):
    """How turns become pieces. Build one with `chat_format`.

    Attributes:
        name: what it was asked for as.
        end: the supervised text after every answer; its last token ends a generation.
        as_processor: tokenise as a transformers processor does: the tokenizer's BOS goes before a rendered text
            that does not begin with it, and text after an image is text after a control token, not, as in LLaVA,
            a text of its own.
        content_tokens: control tokens that an assistant's text and thoughts may hold as themselves.
        own: `name` is `module:name` of a function of the user's own.
        thinks: prompts end before a thought, which is left to the model; set where thoughts were learnt.
        thoughts: "OPENING...CLOSING", marks of a thought at the beginning of an answer's text, besides <think>.
    """

    name: str
    end: str
    own: bool = False
    thinks: bool = False
    as_processor: bool = False
    content_tokens: frozenset[str] = frozenset()
    thoughts: str | None = None
    _tokenizer: Any

    def pieces(self, talk: Talk, *, generate: bool = False) -> list[Piece]:
        """Return the pieces of a conversation; with `generate`, up to where the next answer begins.

        A template piece may end in the space that the first token of the following content will carry.
        Raises RecordError for turns that break the rules of a record or that the format cannot express.
        """
        record = as_record(talk)
        record.validate(for_training=not generate)
        # An answer that the template strips to nothing would leave no token to learn; `merged` refuses one.
        answers = {number for number, turn in enumerate(record.turns) if turn.role == "assistant"}
        return merged(self._lay_out(record, generate), answers)

    @abstractmethod
    def _lay_out(self, record: Record, generate: bool) -> list[Piece]: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` rebuilds the format from, for a checkpoint."""

    @staticmethod
    def from_json(obj: Mapping[str, Any], tokenizer: Any) -> ChatFormat:
        """Rebuild a format; raises ConfigError for unknown keys or names."""
        for key in obj:
            if key not in _KEYS:
                raise ConfigError(f"unknown key '{key}'", where="chat format", remedy=nearest(key, _KEYS))
        if "name" not in obj:
            raise ConfigError("the key 'name' is missing", where="chat format", remedy=f"keys: {', '.join(_KEYS)}")
        given = {key: obj[key] for key in _KEYS[2:] if obj.get(key)}
        if "template" not in obj:
            return chat_format(obj["name"], tokenizer, **given)
        return TemplateFormat(obj["name"], obj["template"], tokenizer, FormatOptions(**given))

    def with_template_args(self, args: Mapping[str, Any]) -> ChatFormat:
        """Return this format with further template arguments, such as enable_thinking. Raises ConfigError."""
        if not args:
            return self
        problem = f"the chat format '{self.name}' takes no template arguments"
        raise ConfigError(problem, remedy="Leave them out, or use a chat template.")

    def own_thought(self) -> tuple[tuple[str, str], ...]:
        """Pairs of marks that open and close a thought in the text of an answer, besides <think> and </think>."""
        return () if self.thoughts is None else (marks_of(self.thoughts),)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of `end` after an answer; generation stops at the last of them."""
        return piece_tokenizer(self._tokenizer).template(self.end, "text")

    @cached_property
    def thought_marks(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Ids that open and close the thought of an answer, from the first special token to the last.

        None where what closes it has no special token: then the marks are in the decoded text.
        """
        talk = (Turn("user", (Text("a"),)), Turn("assistant", (Text("b"),), thinking="c"))
        try:
            pieces = self.pieces(talk)
        except MmitError:
            return None
        # Found by asking the format itself: what opens and closes a thought differs, and no list of it would be
        # complete.
        at = next((n for n, piece in enumerate(pieces) if (piece.kind, piece.part) == ("content", "thought")), 0)
        around = pieces[at - 1 : at + 2] if at else []
        if len(around) < 3 or any(piece.part != "thought" for piece in around):
            return None
        tokens = piece_tokenizer(self._tokenizer)
        opening, closing = (tokens.special_part(around[n].text) for n in (0, 2))
        return (opening, closing) if closing else None


class TemplateFormat(ChatFormat):
    """A Jinja chat template, the tokenizer's own or the user's."""

    def __init__(self, name: str, template: str, tokenizer: Any, options: FormatOptions) -> None:
        self.name, self._tokenizer, self.thoughts = name, tokenizer, checked_marks(options.thoughts)
        date = options.date
        if date is None and writes_date(template):
            date = datetime.date.today().isoformat()  # from here on its day, in a checkpoint too
        self._template = ChatTemplate(
            template,
            tokenizer,
            where=f"chat template '{name}'",
            image_token=options.image_token,
            args=options.template_args,
            date=date,
            # Where the template writes no end of an answer one is added, or the model would never learn to stop; not
            # for a processor's own rendering, which must come out token for token.
            add_ends=not options.as_processor,
        )
        self.end, self.as_processor = self._template.end, options.as_processor
        self.thinks = options.thinks
        self._given_tokens = checked_tokens(options.content_tokens, tokenizer)
        named = piece_tokenizer(tokenizer).named_in(template)
        self.content_tokens = self._given_tokens | named - {self._template.image_token or ""}

    @property
    def thinks(self) -> bool:
        """Whether prompts end as the template's own generation prompt does, before a thought."""
        return self._template.thinks

    @thinks.setter
    def thinks(self, value: bool) -> None:
        self._template.thinks = value or bool(self._template.args)

    @property
    def template(self) -> ChatTemplate:
        """What reads the Jinja text."""
        return self._template

    def outline(self, record: Record) -> tuple[Shape, Extras, list[Said]]:
        """A record as the template reads it: its turns without words, its tools and arguments, its turns."""
        said = [flat(turn, number, self.own_thought) for number, turn in enumerate(record.turns)]
        return tuple(map(outline_of, said)), extras_of(record), said

    def _lay_out(self, record: Record, generate: bool) -> list[Piece]:
        shape, extras, said = self.outline(record)
        # Words are put in by order: the slots name a turn, and its texts come in the order in which they are written.
        texts = [iter([words for words in turn.parts if words is not None]) for turn in said]
        pieces = []
        for slot in self._template.slots(shape, extras, generate=generate):
            if slot.kind != "content":
                pieces.append(slot.piece)
                continue
            words = Words(said[slot.turn].thought or "") if slot.part == "thought" else next(texts[slot.turn])
            words = words.stripped(slot.left, slot.right)
            pieces.append(Piece("content", words.text, slot.turn, slot.part, words.spans, words.marks))
        return pieces

    def own_thought(self) -> tuple[tuple[str, str], ...]:
        """Those that were named, and what the template itself writes around a thought."""
        own = self._template.thought_marks
        return (*super().own_thought(), *(() if own is None else (own,)))

    def with_template_args(self, args: Mapping[str, Any]) -> ChatFormat:
        """Return this format with further template arguments, such as enable_thinking."""
        # By way of its JSON, so that a format is always what a checkpoint would say of it.
        told = self.to_json()
        return ChatFormat.from_json({**told, "template_args": {**told["template_args"], **args}}, self._tokenizer)

    def to_json(self) -> dict[str, Any]:
        """Return name, template text, image token, template arguments, and what else is set."""
        template = self._template
        told: dict[str, Any] = {
            "name": self.name,
            "template": template.source,
            "image_token": template.image_token,
            "template_args": template.args,
        }
        more = {
            "as_processor": self.as_processor,
            "content_tokens": sorted(self._given_tokens),
            "date": template.date,
            "thinks": self.thinks and not template.args,
            "thoughts": self.thoughts,
        }
        return told | {key: value for key, value in more.items() if value}


class BuiltInFormat(ChatFormat):
    """One of BUILT_IN, or a function of the user's own (see `chat_builtin`).

    The tokenizer's BOS comes first if it puts one in front of every text by itself.
    """

    def __init__(
        self, name: str, tokenizer: Any, *, content_tokens: Sequence[str] = (), thoughts: str | None = None
    ) -> None:
        self.name, self._tokenizer, self.thoughts = name, tokenizer, checked_marks(thoughts)
        self.content_tokens = checked_tokens(content_tokens, tokenizer)
        tokens = piece_tokenizer(tokenizer)
        self.own = name not in BUILT_IN
        self._write: Any
        self._write, end = BUILT_IN[name] if name in BUILT_IN else own_writer(name)
        self.end = end or tokenizer.eos_token
        if not self.end:
            problem = f"the chat format '{name}' ends an answer with the EOS token, but the tokenizer has none"
            raise ConfigError(problem, remedy="Set tokenizer.eos_token.")
        self._bos = [Piece("template", tokens.bos)] if tokens.bos else []
        # The format is nothing but these tokens; as letters they would teach the model a text that looks like them.
        if name == "chatml":
            for token in ("<|im_start|>", "<|im_end|>"):
                if len(tokens.control_spans(token)) != 1:
                    problem = f"the tokenizer has no token {token}, which the chat format 'chatml' needs"
                    raise ConfigError(problem, remedy="Use 'qa' or 'vicuna_v1', which need only an EOS token.")

    def _lay_out(self, record: Record, generate: bool) -> list[Piece]:
        for number, turn in enumerate(record.turns, 1):
            found = "tool calls" if turn.tool_calls else "a tool's result" if turn.role == "tool" else ""
            if found:
                problem = f"turn {number} has {found}, for which the chat format '{self.name}' has no place"
                raise RecordError(problem, remedy="Use a chat template that knows tools, or leave the record out.")
        # Left out they would be missing in the prompt that the answer was written for.
        for key in ("tools", "template_args"):
            if getattr(record, key):
                problem = f"the record has {key}, for which the chat format '{self.name}' has no place"
                raise RecordError(problem, remedy="Use a chat template, or leave them or the record out.")
        said = [flat(turn, number, self.own_thought) for number, turn in enumerate(record.turns)]
        pieces: list[Piece] = self._bos + self._write(said, self.end, generate)
        marks = sum(len(words.marks) for turn in said for words in turn.parts if words is not None)
        # A format of the user's own may have dropped them; its boxes would then be letters that look like tokens.
        if marks != sum(len(piece.marks) for piece in pieces):
            problem = f"the record's boxes have control tokens, which the chat format '{self.name}' writes as letters"
            remedy = 'In its function write Piece("content", part.text, turn.number, "text", part.spans, part.marks).'
            raise RecordError(problem, remedy=remedy)
        return pieces

    def to_json(self) -> dict[str, Any]:
        """Return the name, and the content tokens and marks of thoughts where there are some."""
        more = {"content_tokens": sorted(self.content_tokens), "thoughts": self.thoughts}
        return {"name": self.name} | {key: value for key, value in more.items() if value}


def chat_format(name: str, tokenizer: Any, **options: Any) -> ChatFormat:
    """Build a chat format for a fast Hugging Face tokenizer.

    Args:
        name: a key of BUILT_IN, `module:name` of a function of the user's own, "hf" for the tokenizer's own chat
            template, the path of a .jinja file or of a .json file that holds what `to_json` gives, or the text of a
            template.
        tokenizer: gives the template of "hf", and says which texts are control tokens.
        options: fields of `FormatOptions`.

    Raises:
        ConfigError: the name is unknown, the template cannot be used, or an option has no place in the format.
    """
    given = FormatOptions(**options)
    if name in BUILT_IN or is_spec(name):
        if given.image_token is not None or given.template_args:
            problem = f"the chat format '{name}' takes neither image_token nor template_args"
            raise ConfigError(problem, remedy="Leave them out, or use a chat template.")
        return BuiltInFormat(name, tokenizer, content_tokens=given.content_tokens, thoughts=given.thoughts)
    if name.endswith(".json") and not _is_text(name):
        return _from_file(name, tokenizer, given)
    shown, template = _template_of(name, tokenizer)
    return TemplateFormat(shown, template, tokenizer, given)


def _is_text(name: str) -> bool:
    """Whether this is a template itself and no name of one."""
    return "{%" in name or "{{" in name


def _template_of(name: str, tokenizer: Any) -> tuple[str, str]:
    """The name of a template in messages, and its text."""
    if name == "hf":
        if not tokenizer.chat_template:
            problem = "the chat format 'hf' needs the tokenizer's chat template, and it has none"
            remedy = f"Name another chat format: {', '.join(BUILT_IN)}, or the path of a .jinja file."
            raise ConfigError(problem, remedy=remedy)
        return name, tokenizer.get_chat_template()
    if _is_text(name):
        return "custom", name
    if name.endswith(".jinja"):
        try:
            return Path(name).stem, Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"cannot read the chat template: {error}"
            raise ConfigError(problem, where=name, remedy="Check the path.") from error
    remedy = f"{nearest(name, [*BUILT_IN, 'hf'])}, the path of a .jinja file, or {FORM} of your own"
    raise ConfigError(f"unknown chat format '{name}'", remedy=remedy)


def _from_file(path: str, tokenizer: Any, given: FormatOptions) -> ChatFormat:
    """The format that a file of `to_json` describes; options that are given now go before those of the file."""
    try:
        told = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"cannot read the chat format: {error}"
        raise ConfigError(problem, where=path, remedy="Check the path.") from error
    # But for the day: a model was trained on that of its file, and today's would be another prompt.
    date = given.date if told.get("date") is None else None
    more = {field.name: getattr(given, field.name) for field in fields(given)} | {"date": date}
    more["content_tokens"] = list(given.content_tokens)
    return ChatFormat.from_json({**told, **{key: value for key, value in more.items() if value}}, tokenizer)


def encode(talk: Talk, chat: ChatFormat, tokenizer: Any, *, generate: bool = False, loss: Loss = ANSWERS) -> Encoded:
    """Tokenise a conversation piece by piece.

    A space that ends a template piece goes over to the content after it, since tokenizers attach a space
    to the word on its right; a prompt for generation therefore ends without it.

    Args:
        talk: a record, or bare turns.
        chat: the format. tokenizer: the one it was made for.
        generate: stop where the answer begins.
        loss: which tokens carry loss, and how much.

    Returns:
        ids, weights and origins of one length.

    Raises:
        RecordError: turns that the format refuses, characters that the tokenizer cannot write, or a record from which
            nothing would be learnt.
    """
    record = as_record(talk)
    tokens = piece_tokenizer(tokenizer)
    out = Writer(tokens, as_processor=chat.as_processor, allowed=chat.content_tokens)
    weigh = loss.weigher(record)
    pieces = chat.pieces(record, generate=generate)
    if chat.as_processor and tokens.bos and not pieces[0].text.startswith(tokens.bos):
        out.bos()
    at, count = 0, len(pieces)
    while at < count:
        piece = pieces[at]
        if piece.kind == "content":
            out.content(piece, weigh(piece), named=record.turns[piece.turn].role == "assistant")
            at += 1
            continue
        # Neighbouring template pieces are encoded as one text, so that a token may span what the template wrote in two
        # steps.
        stop = at + 1
        while stop < count and pieces[stop].kind == piece.kind:
            stop += 1
        if piece.kind == "image":
            out.images(stop - at)
        else:
            lend = pieces[stop].kind == "content" if stop < count else generate
            out.template([(one, cast("float", weigh(one))) for one in pieces[at:stop]], lend_space=lend)
        at = stop
    # Nothing predicts the first token, so a weight there would count a loss that is never computed.
    if out.weights:
        out.weights[0] = 0.0
    if not generate and not any(weight > 0 for weight in out.weights):
        silent = record.weight == 0 or any(turn.weight is not None for turn in record.turns)
        remedy = "Leave the record out, or give an answer a weight." if silent else "Give the assistant turn some text."
        raise RecordError("no token of the record is supervised: nothing would be learnt", remedy=remedy)
    return Encoded(tuple(out.ids), tuple(out.weights), tuple(out.origin))
