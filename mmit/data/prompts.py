"""From questions to prompts: records or bare texts in, samples for a row out, in batches.

Owns what a prompt is (a record up to where its last answer begins), the samples that make a row predict after
it, and which prompts run together. Reads no picture; refuses a prompt that leaves no room for an answer.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmit.data.chat import ChatFormat, encode
from mmit.data.image_identity import image_key
from mmit.data.messages import history_turns, is_messages, turns_of
from mmit.data.packing import Sample
from mmit.errors import ConfigError, RecordError, TooLong
from mmit.records import Image, Record, Text, Turn

if TYPE_CHECKING:
    import PIL.Image

    from mmit.data.chat_writer import Encoded
    from mmit.data.preparation import ImagePreparation, Spread

    Picture = str | os.PathLike[str] | bytes | PIL.Image.Image | Image

USAGE = "Write chat(images, text), the images None for none."
BLANK = "blank"  # the key of the one picture that stands for all in the blank-image baseline


@dataclass(frozen=True, slots=True)
class PromptImage:
    """A picture of a prompt, the tokens it becomes, and its place for messages."""

    image: Image
    spread: Spread
    where: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A record made ready: one sample to be answered, or one per given answer."""

    number: int  # its place among the caller's records
    samples: tuple[Sample, ...]
    pictures: dict[Hashable, PromptImage]
    length: int  # tokens of the longest sample


def as_prompt(record: Record) -> Record:
    """Return the record up to where its last answer begins; raises RecordError if that is no question."""
    if record.turns and record.turns[-1].role == "assistant":
        record = replace(record, turns=record.turns[:-1])
    record.validate(for_training=False)
    return record


def ask(
    images: Picture | Sequence[Picture] | None,
    text: str,
    *,
    history: Sequence[tuple[str, str]] | Sequence[Mapping[str, Any]] | Record | None = None,
    system: str | None = None,
) -> Record:
    """Build the record of a question.

    Args:
        images: a path, encoded bytes, a PIL picture, a list of them, or None.
        text: what the user says.
        history: earlier (user, assistant) texts, the pictures then belonging to the first of them; or messages
            [{"role", "content"}, ...] or a Record that end with an answer, the pictures then belonging to the new turn.
        system: the system turn, if the history has none.

    Raises:
        ConfigError: an argument of another type.
        RecordError: the turns break the rules of a record.
    """
    shown = _shown(images)
    for name, value in (("text", text), ("system", system)):
        if not isinstance(value, str) and (name == "text" or value is not None):
            problem = f"{name} is a {type(value).__name__}, not a text"
            raise ConfigError(problem, remedy=f"{USAGE} For a conversation: messages=[...].")
    question = Turn("user", (*shown, Text(text)))
    earlier = () if history is None or isinstance(history, Record) else history_turns(history)
    if isinstance(history, Record):
        history.validate(for_training=True)
        turns = [*history.turns, question]
    elif history and isinstance(history[0], Mapping):
        Record(earlier).validate(for_training=True)
        turns = [*earlier, question]
    else:
        turns = [*earlier, Turn("user", (Text(text),))]
        turns[0] = Turn("user", (*shown, *turns[0].parts))
    return _record(turns, system)


def ask_messages(messages: Sequence[Mapping[str, Any]], *, system: str | None = None) -> Record:
    """Build the record of a question from messages that end with the user's; see `data.messages.turns_of`."""
    return _record(list(turns_of(messages)), system)


def _record(turns: list[Turn], system: str | None) -> Record:
    if system is not None:
        if turns and turns[0].role == "system":
            raise RecordError("the history has a system turn already", remedy="Leave system out.")
        turns = [Turn("system", (Text(system),)), *turns]
    record = Record(tuple(turns))
    record.validate(for_training=False)
    return record


def _shown(images: Any) -> tuple[Image, ...]:
    """The pictures of a question. Raises ConfigError for what is none."""
    if is_messages(images):
        raise ConfigError("images holds messages", remedy="Write chat(messages=[...]).")
    if images is None:
        images = []
    elif isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        images = [images]
    pictures = tuple(i if isinstance(i, Image) else Image(i) for i in images)
    for picture in pictures:
        is_picture = isinstance(picture.source, (str, bytes)) or hasattr(picture.source, "convert")
        if not is_picture:
            problem = f"an image is a {type(picture.source).__name__}"
            raise ConfigError(problem, remedy="Give a path, encoded bytes, a PIL picture, or a list of them.")
    return pictures


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """Tokenises prompts for one model: its chat format, its pictures' tokens, its context (None: no limit)."""

    chat: ChatFormat
    tokenizer: Any
    preparation: ImagePreparation | None  # None: it sees nothing
    context: int | None
    blank: Image | None = None  # shown in place of every picture, under the key BLANK

    def question(self, record: Record, number: int) -> Prompt:
        """Make the prompt of a record, its own last answer left out. Raises RecordError naming the record."""
        record = as_prompt(record)
        ids = self._encode(record, number, generate=True).ids
        # A row runs what stands before its last target, so a dummy target follows the prompt.
        return self._prompt(record, number, [((*ids, 0), (False,) * len(ids) + (True,))])

    def choices(self, record: Record, number: int, *, answers: Sequence[str], with_end: bool) -> Prompt:
        """Make a sample per given answer.

        Args:
            record: ends with the user's turn, or loses the answer it has.
            number: of the prompt, for errors and its seed.
            answers: the texts to choose from.
            with_end: the end of an answer is a target too, not only its tokens.

        Raises:
            RecordError: as `encode`.
        """
        record = as_prompt(record)
        samples = []
        for answer in answers:
            whole = replace(record, turns=(*record.turns, Turn("assistant", (Text(answer),))))
            # The whole conversation is tokenised with each answer in it, and not the answer by itself: what stands on
            # its left decides how it is cut into tokens.
            encoded = self._encode(whole, number, generate=False)
            samples.append((encoded.ids, _last_answer(encoded, with_end)))
        return self._prompt(record, number, samples)

    def tokens(self, ids: Sequence[int], images: Picture | Sequence[Picture] | None) -> Prompt:
        """Make the prompt of token ids as they are; each negative one is the slot of the next image.

        Raises:
            ConfigError: the slots and images differ in number. RecordError: too long, or the model sees no images.
        """
        shown, slots = _shown(images), sum(token < 0 for token in ids)
        if slots != len(shown):
            problem = f"input_ids has {slots} image slots (negative ids) for {len(shown)} images"
            raise ConfigError(problem, remedy="Put one negative id where each image goes.")
        record = Record((Turn("user", (*shown, Text(""))),))
        return self._prompt(record, 0, [((*ids, 0), (False,) * len(ids) + (True,))])

    def _encode(self, record: Record, number: int, *, generate: bool) -> Encoded:
        try:
            return encode(record, self.chat, self.tokenizer, generate=generate)
        except RecordError as error:
            raise RecordError(error.problem, where=_where(record, number), remedy=error.remedy) from error

    def _prompt(
        self, record: Record, number: int, samples: Sequence[tuple[tuple[int, ...], tuple[bool, ...]]]
    ) -> Prompt:
        where = _where(record, number)
        if record.images and self.preparation is None:
            problem = "has images, but the model has no vision tower"
            raise RecordError(problem, where=where, remedy="Send text only.")
        images = record.images if self.blank is None else (self.blank,) * len(record.images)
        keys = tuple(BLANK if self.blank is not None else image_key(image) for image in images)
        spreads = {key: self._spread(image, where) for key, image in zip(keys, images, strict=True)}
        widths = tuple(spreads[key].tokens for key in keys)
        # All samples of a prompt carry the same pictures under the same keys, so that one row can share their
        # beginning.
        made = tuple(Sample(ids, targets, keys, number, widths) for ids, targets in samples)
        # The last token is only predicted, never run.
        length = max((sample.length - 1 for sample in made), default=0)
        if self.context is not None and length >= self.context:
            raise TooLong(
                f"takes {length} tokens ({sum(widths)} of them for {len(keys)} images), and the model's context "
                f"of {self.context} leaves no room for an answer",
                where=where,
                remedy="Shorten the text, leave out early turns, or send fewer pictures.",
            )
        return Prompt(
            number,
            made,
            {key: PromptImage(image, spreads[key], where) for key, image in zip(keys, images, strict=True)},
            length,
        )

    def _spread(self, image: Image, where: str) -> Spread:
        assert self.preparation is not None
        return self.preparation.spread(image, where=where)


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches of at most `batch_size` samples, the longest first; what begins with one picture stays together.

    Where a picture has more prompts than fit into a batch they are spread over several; a prompt with more
    samples than that is a batch of its own.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}", remedy="Give 1 or more.")
    # By the first picture alone: prompts of one picture share what is computed of it if they meet in a batch. Later
    # pictures follow text, which differs.
    groups: dict[Hashable, list[Prompt]] = {}
    for prompt in prompts:
        # Without a picture a prompt is a group of its own, and goes where its length belongs.
        groups.setdefault(next(iter(prompt.pictures), (None, prompt.number)), []).append(prompt)
    out: list[list[Prompt]] = []
    room = 0
    # The longest first: a batch that does not fit into memory fails at once and not after an hour, and like lengths pad
    # each other little.
    for group in sorted(groups.values(), key=lambda group: -max(prompt.length for prompt in group)):
        whole = sum(len(prompt.samples) for prompt in group)
        if whole > room:
            room = 0  # begin anew rather than run the picture twice
        for prompt in sorted(group, key=lambda prompt: -prompt.length):
            if len(prompt.samples) > room:
                out.append([])
                room = batch_size
            out[-1].append(prompt)
            room -= len(prompt.samples)
    return out


def _where(record: Record, number: int) -> str:
    known = record.id or record.source or record.row is not None
    return record.where if known else f"record {number + 1}"


def _last_answer(encoded: Encoded, with_end: bool) -> tuple[bool, ...]:
    """Mark the tokens of the last answer; earlier answers belong to the prompt."""
    # Known limit: the format must supervise the last answer without a gap, as all of mmit's do.
    end = max(i for i, supervised in enumerate(encoded.supervised) if supervised) + 1
    start = end
    while start and encoded.supervised[start - 1]:
        start -= 1
    return tuple(start <= i < end and (with_end or origin == "content") for i, origin in enumerate(encoded.origin))
