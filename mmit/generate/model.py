"""A trained model at work: chat, stream, answer many records, score given answers.

Owns the order of the work: pictures run once, and records that share one together (how prompts share a run is
`runner.py`'s). Pictures, texts and records in; strings and log-probabilities out. Knows no metric; refuses a prompt
that does not fit the model's context rather than cut it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from mmit.data.answers import AnswerText
from mmit.data.messages import check_records
from mmit.data.preparation import prepare_images
from mmit.data.prompts import Prompt, PromptMaker, ask, ask_messages, batches
from mmit.errors import ConfigError, nearest
from mmit.generate.runner import Runner
from mmit.models import decoding
from mmit.models.generation import end_ids, generation_facts
from mmit.models.llm import DTYPES, context_length
from mmit.pictures import Features, Pictures
from mmit.records import Record

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mmit.data.chat import ChatFormat
    from mmit.data.prompts import Picture
    from mmit.models.sampling import Sampling
    from mmit.models.vlm import VLM

History = Sequence[tuple[str, str]] | Sequence[Mapping[str, Any]] | Record | None


class Likelihood(NamedTuple):
    """How likely a given continuation is."""

    log_probability: float  # summed over its tokens
    tokens: int
    greedy: bool  # each of its tokens is the likeliest one where it stands


class Completion(NamedTuple):
    """An answer, whether it was cut off by length, and the tokens read and written."""

    text: str
    cut: bool
    prompt_tokens: int
    new_tokens: int


class Answering(TypedDict, total=False):
    """How an answer is written. Where one of the three ways to draw is None or left out, the model's
    generation_config.json says it (`Model.generation`); greedy decoding where it asks for no sampling.
    """

    max_new_tokens: int  # most tokens of an answer, by default 256; the end of the model's context ends it sooner
    temperature: float | None  # see `Sampling`
    top_p: float | None
    top_k: int | None
    seed: int  # of the draws, by default 0; a record's depend on its place in the list
    stop: Sequence[str] | None  # texts that end an answer and are left out of it


class Model(Runner):
    """A composite with its tokenizer, chat format and image preparation, ready to answer.

    Attributes (and those of `Runner`):
        vlm, tokenizer, chat_format: the parts. The composite is put into eval mode and left in it.
        image: how pictures are brought to the tower: {"size": (H, W), "mode", "interpolation", "fill"}, and "tiles"
            where they are cut; {} for a text-only model. preparation: the same with what the model makes of it.
        generation: what its generation_config.json says of end tokens and sampling.
        folder, meta: the checkpoint it came from and its mmit.json, if any.
        notes: what was decided when it was loaded, in words.
    """

    def __init__(
        self,
        vlm: VLM,
        tokenizer: Any,
        chat_format: ChatFormat,
        *,
        image: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        meta: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if vlm.vision is not None and not image:
            raise ConfigError("a model with a vision tower needs its image preparation")
        super().__init__(vlm)
        self.tokenizer, self.chat_format = tokenizer, chat_format
        self.image, self.folder, self.meta = dict(image or {}), folder, dict(meta or {})
        self.preparation = prepare_images(self.image, tokens=vlm.image_tokens, grid=vlm.image_grid)
        self.generation = generation_facts(vlm.llm)
        self.notes = list(notes)

    @property
    def number_format(self) -> str:
        """What its weights are kept and multiplied in: "bf16", or all of them, "bf16+fp32", where parts differ."""
        kinds = {p.dtype for p in self.vlm.parameters() if p.is_floating_point()}
        return "+".join(sorted(next((k for k, v in DTYPES.items() if v == kind), str(kind)) for kind in kinds))

    def chat(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | None = None,
        *,
        history: History = None,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **answering: Unpack[Answering],
    ) -> str:
        """Answer a question about pictures, or about none.

        Args:
            images, text, history, system: see `ask`.
            messages: in their place the whole conversation, [{"role", "content"}, ...] as OpenAI's API and
                transformers take it; see `data.messages.turns_of`.
            answering: max_new_tokens, temperature, top_p, top_k, seed, stop; see `Answering`.

        Returns:
            the answer without surrounding whitespace.
        """
        record = _asked(images, text, history=history, system=system, messages=messages)
        return self.generate([record], **answering)[0]

    def stream(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | None = None,
        *,
        history: History = None,
        system: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **answering: Unpack[Answering],
    ) -> Iterator[str]:
        """Answer as `chat` does, in pieces that add up to its answer; none ends inside a character.

        Args:
            images, text, history, system, messages: the question, as `chat` takes it.
            answering: as `chat` takes it.
        """
        options: dict[str, Any] = dict(answering)
        limit, reader = options.pop("max_new_tokens", 256), self.reader(options.pop("stop", ()))
        _check_count("max_new_tokens", limit)
        record = _asked(images, text, history=history, system=system, messages=messages)
        prompt = self.prompt_maker().question(record, 0)
        return self._stream(prompt, reader, limit, sampling=self.sampling(**options))

    def reader(self, stop: Sequence[str] | None) -> AnswerText:
        """Return what reads the text of an answer from its ids; `stop` are texts that end it."""
        chat = self.chat_format
        return AnswerText(self.tokenizer, stop, thought=chat.thought_marks, marks=chat.own_thought())

    @torch.inference_mode()
    def _stream(self, prompt: Prompt, reader: AnswerText, max_new_tokens: int, *, sampling: Sampling) -> Iterator[str]:
        ids: list[int] = []
        sent = ""
        reader = reader.growing()
        features = self._see(Pictures(self.vlm, self.preparation, [[prompt]]), [prompt])
        for new in self._steps([prompt], features, reader, max_new_tokens=max_new_tokens, sampling=sampling):
            ids += [token for _, token in new]
            text = reader.settled(ids)
            # A token may change text that stood before it (byte tokens, spaces of a tokenizer); what was sent cannot be
            # taken back.
            if text.startswith(sent) and text != sent:
                yield text[len(sent) :]
                sent = text
        rest = reader.whole(ids)[len(sent) :]
        if rest:
            yield rest

    @torch.inference_mode()
    def generate(
        self,
        records: Sequence[Record],
        *,
        batch_size: int = 32,
        blank_images: bool = False,
        progress: Callable[[int], None] | None = None,
        **answering: Unpack[Answering],
    ) -> list[str]:
        """Answer many records, in their order.

        A record's own last answer is ignored. Records that share a picture run together. But for rounding, the
        answers do not depend on `batch_size` or on what else is in the batch.

        Args:
            records: what is asked.
            batch_size: most prompts decoded at a time.
            blank_images: show a picture of the encoder's mean colour in place of every picture.
            progress: called after each batch with the number of records it answered.
            answering: see `Answering`.

        Returns:
            the answers, without surrounding whitespace.

        Raises:
            RecordError: a record is malformed, its picture unreadable, or its prompt too long for the model.
            ConfigError: an option is out of its range.
        """
        check_records(records)
        options: dict[str, Any] = dict(answering)
        max_new_tokens, stop = options.pop("max_new_tokens", 256), options.pop("stop", ())
        _check_count("max_new_tokens", max_new_tokens)
        _check_count("batch_size", batch_size)
        if progress is not None and not callable(progress):
            raise ConfigError(f"progress is {progress!r}", remedy="Give a function of the number of records answered.")
        sampling, reader = self.sampling(**options), self.reader(stop)
        maker = self.prompt_maker(blank=blank_images)
        prompts = [maker.question(record, n) for n, record in enumerate(records)]
        return self.answer(
            prompts,
            reader,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            progress=progress,
        )

    @torch.inference_mode()
    def answer(
        self,
        prompts: Sequence[Prompt],
        reader: AnswerText,
        *,
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Continue prompts that are tokens already.

        Args:
            prompts: one sample each, numbered by their place. reader: makes text of ids, and knows the texts that stop.
            batch_size: prompts at once. max_new_tokens: of an answer at most. sampling: how tokens are drawn.
            progress: is told how many prompts are done.

        Returns:
            one answer per prompt, in their order.
        """
        texts = [""] * len(prompts)
        # Batches come in the order that shares pictures and lengths best; answers go back to their numbers.
        ids = self._continued(prompts, reader, batch_size, max_new_tokens, sampling, draws=None, progress=progress)
        for number, tokens in ids:
            texts[number] = reader.whole(tokens)
        return texts

    @torch.inference_mode()
    def complete(
        self,
        records: Sequence[Record],
        *,
        seeds: Sequence[int],
        batch_size: int = 32,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, Completion]]:
        """Answer records as `generate` does, and say how each answer ended and what it took.

        Args:
            seeds: one per record; a record's draws depend on its seed alone, not on its place in the list.

        Yields:
            the record's place in the list and its answer, batch by batch.
        """
        check_records(records)
        maker = self.prompt_maker()
        prompts = [maker.question(record, n) for n, record in enumerate(records)]
        sampling = self.sampling(temperature=temperature, top_p=top_p)
        reader = self.reader(stop)
        context = context_length(self.vlm.llm)
        ids = self._continued(prompts, reader, batch_size, max_new_tokens, sampling, draws=seeds)
        for number, tokens in ids:
            length = prompts[number].length
            # Cut off means that the room was used up and nothing ended the answer.
            room = max_new_tokens if context is None else min(max_new_tokens, context - length)
            ended = bool(tokens) and (tokens[-1] in self.end_ids or (bool(stop) and reader.ended(tokens)))
            yield number, Completion(reader.whole(tokens), len(tokens) >= room and not ended, length, len(tokens))

    def _continued(
        self,
        prompts: Sequence[Prompt],
        reader: AnswerText,
        batch_size: int,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        draws: Sequence[int] | None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield each prompt's number and the ids of its continuation; `draws` stand for prompts in random draws."""
        plan = batches(prompts, batch_size)
        pictures = Pictures(self.vlm, self.preparation, plan)
        for batch in plan:
            features = self._see(pictures, batch)
            # A model that cannot be batched takes its prompts one by one.
            # Pictures of the batch have been encoded together all the same.
            for part in [batch] if self.support.batched else [[prompt] for prompt in batch]:
                ids: list[list[int]] = [[] for _ in part]
                steps = self._steps(
                    part, features, reader, max_new_tokens=max_new_tokens, sampling=sampling, draws=draws
                )
                for new in steps:
                    for place, token in new:
                        ids[place].append(token)
                for prompt, tokens in zip(part, ids, strict=True):
                    yield prompt.number, tokens
            if progress is not None:
                progress(len(batch))

    @torch.inference_mode()
    def score(
        self,
        records: Sequence[Record],
        choices: Sequence[str] | Sequence[Sequence[str]],
        *,
        batch_size: int = 32,
        with_end: bool = False,
        blank_images: bool = False,
    ) -> list[list[float]]:
        """Say how likely given answers are: the log-probability of each, summed over its tokens.

        Args:
            records: what is asked; a record's own last answer is ignored.
            choices: the answers, one list for all records or one list per record.
            batch_size: most answers run at a time; those to one record stay together.
            with_end: count the token that ends an answer too, so that "a" is not favoured over "a b".
            blank_images: as in `generate`.

        Returns:
            for each record, a number per choice.

        Raises:
            ConfigError: an argument of another type, or not one list of choices for each record.
            RecordError: a record is malformed, its picture unreadable, or its prompt too long for the model.
        """
        check_records(records)
        _check_count("batch_size", batch_size)
        if not isinstance(with_end, bool):
            raise ConfigError(f"with_end is {with_end!r}", remedy="Give True or False.")
        if isinstance(choices, (str, bytes)) or not isinstance(choices, Sequence):
            problem = f"choices is a {type(choices).__name__}, not a list of texts"
            raise ConfigError(problem, remedy="Give one list of texts, or one list per record.")
        per_record: Any = [choices] * len(records) if choices and isinstance(choices[0], str) else choices
        if len(per_record) != len(records):
            problem = f"{len(per_record)} lists of choices for {len(records)} records"
            raise ConfigError(problem, remedy="Give one list of texts, or one list per record.")
        for number, answers in enumerate(per_record, 1):
            texts = isinstance(answers, Sequence) and not isinstance(answers, (str, bytes))
            if not texts or not all(isinstance(answer, str) for answer in answers):
                problem = f"the choices of record {number} are no list of texts"
                raise ConfigError(problem, remedy="Give one list of texts, or one list per record.")
            if not answers:
                raise ConfigError(f"record {number} has no choices", remedy="Give each record a text or more.")
        maker = self.prompt_maker(blank=blank_images)
        prompts = [
            maker.choices(record, n, answers=answers, with_end=with_end)
            for n, (record, answers) in enumerate(zip(records, per_record, strict=True))
        ]
        found = self.likelihoods(prompts, batch_size=batch_size)
        return [[likelihood.log_probability for likelihood in row] for row in found]

    @torch.inference_mode()
    def logits(
        self, input_ids: Sequence[int] | torch.Tensor, images: Picture | Sequence[Picture] | None = None
    ) -> torch.Tensor:
        """Logits of the next token after every token of one sequence.

        Args:
            input_ids: (T,) token ids as they are, no template around them; a negative id is the slot of an image.
            images: for the slots, in their order: a path, encoded bytes, a PIL picture, or a list of them.

        Returns:
            (T', V) on the model's device; T' is T with every slot widened to the tokens of its image.

        Raises:
            ConfigError: other than one dimension, an id outside of the vocabulary, or more or fewer images than slots.
        """
        ids = torch.as_tensor(input_ids)
        vocabulary = len(self.vlm.word_embeddings)
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or int(ids.max()) >= vocabulary:
            problem = (
                f"input_ids is a {ids.dtype} tensor of shape {tuple(ids.shape)}, or has ids of {vocabulary} or more"
            )
            raise ConfigError(problem, remedy="Give the ids of one sequence, (T,).")
        prompt = self.prompt_maker().tokens(ids.tolist(), images)
        features = self._see(Pictures(self.vlm, self.preparation, [[prompt]]), [prompt])
        prompts = self._row(list(prompt.samples), features)[1]
        at = torch.arange(len(prompts.embeddings), device=self.vlm.device)
        placed: dict[str, Any] = {"positions": prompts.positions, "nodes": prompts.nodes, "ids": prompts.ids}
        return self.vlm.row_logits(prompts.embeddings, **placed, at=at)

    @torch.inference_mode()
    def likelihoods(self, prompts: Sequence[Prompt], *, batch_size: int) -> list[list[Likelihood]]:
        """Say for each prompt how likely its samples' targets are; `prompts` are numbered by their place."""
        plan = batches([prompt for prompt in prompts if prompt.samples], batch_size)
        pictures = Pictures(self.vlm, self.preparation, plan)
        scores: list[list[Likelihood]] = [[] for _ in prompts]
        for batch in plan:
            found = iter(self._likelihoods(batch, self._see(pictures, batch)))
            for prompt in batch:
                scores[prompt.number] = [next(found) for _ in prompt.samples]
        return scores

    def _likelihoods(self, batch: list[Prompt], features: Features) -> list[Likelihood]:
        samples = [sample for prompt in batch for sample in prompt.samples]
        # Numbered by place: the row's `target_records` then say which continuation a token belongs to.
        samples = [replace(sample, record=n) for n, sample in enumerate(samples)]
        totals = torch.zeros(len(samples)), torch.zeros(len(samples), dtype=torch.int64)
        for group in self._groups(samples):
            row, prompts = self._row(group, features)
            found = decoding.log_likelihoods(
                self.vlm, prompts, targets=row.targets, owners=row.target_records, count=len(samples)
            )
            totals = totals[0] + found.sums.cpu(), totals[1] + found.misses.cpu()
        sums, misses = totals[0].tolist(), totals[1].tolist()
        tokens = [sum(sample.supervised) for sample in samples]
        return [Likelihood(*each) for each in zip(sums, tokens, [not n for n in misses], strict=True)]

    def _steps(
        self,
        batch: list[Prompt],
        features: Features,
        reader: AnswerText,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        draws: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        """Prefill one batch and decode it: after each step, (place in the batch, new id) pairs."""
        _check_count("max_new_tokens", max_new_tokens)
        context = context_length(self.vlm.llm)
        readers = [reader.growing() for _ in batch] if reader.stop else []
        rooms = [max_new_tokens if context is None else context - prompt.length for prompt in batch]
        steps = decoding.steps(
            self.vlm.llm,
            self.prefill(batch, features)[0],
            limits=[min(max_new_tokens, room) for room in rooms],
            end_ids=self.end_ids,
            sampling=sampling,
            numbers=[prompt.number if draws is None else draws[prompt.number] for prompt in batch],
            stop=(lambda place, ids: readers[place].ended(ids)) if readers else None,
        )
        for new in steps:
            self.usage.new_tokens += len(new)
            yield new

    def prompt_maker(self, *, blank: bool = False) -> PromptMaker:
        """Return what turns questions into this model's prompts."""
        vlm = self.vlm
        shown = None
        if blank and self.preparation is not None:
            assert vlm.vision is not None
            shown = self.preparation.blank([round(255 * channel) for channel in vlm.vision.mean])
        return PromptMaker(self.chat_format, self.tokenizer, self.preparation, context_length(vlm.llm), blank=shown)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the chat format's, the tokenizer's EOS, and the generation config's list."""
        return end_ids(self.chat_format.end_ids, self.tokenizer, self.vlm.llm)

    def sampling(self, **given: Any) -> Sampling:
        """The model's own way to draw tokens, with what the caller gives put in its place."""
        unknown = [name for name in given if name not in Answering.__annotations__]
        if unknown:
            raise ConfigError(f"unknown option '{unknown[0]}'", remedy=nearest(unknown[0], Answering.__annotations__))
        return replace(self.generation.sampling, **{name: value for name, value in given.items() if value is not None})


def _asked(
    images: Any,
    text: Any,
    *,
    history: History,
    system: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
) -> Record:
    """The record of a question, given in parts or as messages. Raises ConfigError for both, and for neither."""
    if messages is None:
        return ask(images, text, history=history, system=system)
    given = {"images": images, "text": text, "history": history}
    if extra := [name for name, value in given.items() if value is not None]:
        problem = f"messages and {extra[0]} are both given"
        raise ConfigError(problem, remedy="Put everything into messages, or leave messages out.")
    return ask_messages(messages, system=system)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}", remedy="Give a whole number, 1 or more.")
    if value < 1:
        raise ConfigError(f"{name} is {value}", remedy="Give 1 or more.")
