"""Use of a trained model: chat, stream, answer many records, score given answers.

Owns the order of the work: pictures run once, prompts that share one run together, their common beginnings are
computed once. Pictures, texts and records in; strings and log-probabilities out. Knows no metric; refuses a
prompt that does not fit the model's context rather than cut it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch

from mmit import precision
from mmit.data.answers import AnswerText
from mmit.data.messages import check_records
from mmit.data.packing import Row, Sample, build_row, token_keys, without
from mmit.data.preparation import prepare_images, splice_index
from mmit.data.prompts import Prompt, PromptMaker, as_prompt, ask, ask_messages, batches
from mmit.errors import ConfigError, nearest
from mmit.interop.foreign import Foreign, check_options, is_foreign, read_foreign, settle
from mmit.models import decoding
from mmit.models.decoding import Prompts
from mmit.models.generation import end_ids, generation_facts
from mmit.models.hub import model_folder
from mmit.models.llm import DTYPES, context_length, fewer_bits, usable_device
from mmit.models.prefix_cache import BLOCK, divide
from mmit.models.virtual import virtual_tokens
from mmit.pictures import Features, Pictures
from mmit.records import Record

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mmit.data.chat import ChatFormat
    from mmit.data.prompts import Picture
    from mmit.models.prefix_cache import Block, PrefixCache
    from mmit.models.sampling import Sampling
    from mmit.models.vlm import VLM

History = Sequence[tuple[str, str]] | Sequence[Mapping[str, Any]] | Record | None
NAMES = {dtype: name for name, dtype in precision.HALVES.items()}
__all__ = ["Completion", "Likelihood", "Model", "Usage", "as_prompt", "ask", "load"]


@dataclass(slots=True)
class Usage:
    """What a model has computed since it was made."""

    prefill_tokens: int = 0  # prompt tokens run through the LLM
    unshared_tokens: int = 0  # what they would be if no beginning were shared
    new_tokens: int = 0
    pictures: int = 0  # pictures run through the vision tower


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


class Loading(TypedDict, total=False):
    """How the weights of a model are loaded.

    device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:N".
    dtype: number format of the weights ("bf16", "fp16", "fp32"); None takes the one of training, and fp32 where the
        device computes that faster, unless fewer bits or a device map were asked for because of its memory.
    device_map: placement of a large LLM as in transformers: "auto", or modules to devices, "cpu" or "disk".
    offload_folder: where a device map keeps what goes to disk.
    load_in_8bit, load_in_4bit: linear layers of the LLM in fewer bits, by bitsandbytes.
    """

    device: str
    dtype: str | torch.dtype | None
    device_map: str | dict[str, Any] | None
    offload_folder: str | None
    load_in_8bit: bool
    load_in_4bit: bool


def load(
    folder: str | os.PathLike[str],
    *,
    untuned: bool = False,
    template_args: Mapping[str, Any] | None = None,
    allow_code: bool = False,
    chat: str | None = None,
    base: str | None = None,
    tower: str | None = None,
    **loading: Unpack[Loading],
) -> Model:
    """Load a model for use.

    Args:
        folder: a checkpoint; a run, whose newest checkpoint is then taken; a llava-hf folder or one of LLaVA's own;
            or the hub id of one of these (`owner/name`, `owner/name@revision`).
        untuned: the model as it was before training (base weights, a freshly drawn projector), for comparison.
        template_args: variables for the chat template besides those of training, such as enable_thinking.
        allow_code: import modules that the checkpoint names for parts of the user's own, from the working directory and
            the Python path; without it such a checkpoint is refused. Code of other projects' folders is never run.
        chat: for folders of other projects, a chat format in place of the folder's template.
        base, tower: for LLaVA's own folders; see `interop.foreign.read_foreign`.
        loading: device, dtype, device_map, offload_folder, load_in_8bit and load_in_4bit, see `Loading`.

    Raises:
        CheckpointError: the folder is not a whole checkpoint, or names code without `allow_code`.
        ModelError: a part of the model cannot be built, or the hub does not give it.
        ConfigError: no such dtype, or an option that this kind of folder does not take.
    """
    from mmit.train.checkpoint.model import LargeLLM, load_model  # here, so that a live model is used without it

    unknown: dict[str, Any] = {name: value for name, value in loading.items() if name not in Loading.__annotations__}
    foreign = check_options({"chat": chat, "base": base, "tower": tower, **unknown})
    device, dtype = loading.get("device", "auto"), _number_format(loading)
    device_map, offload = loading.get("device_map"), loading.get("offload_folder")
    path = model_folder(folder)
    bits = fewer_bits(load_in_8bit=loading.get("load_in_8bit", False), load_in_4bit=loading.get("load_in_4bit", False))
    if is_foreign(path):
        if bits and device_map is None and device != "auto":
            device_map = {"": device}
        placed: dict[str, Any] = {"device_map": device_map, "offload": offload, "quantization": bits}
        return _load_foreign(path, device, dtype, placed, template_args or {}, foreign)
    if given := [name for name, value in foreign.items() if value]:
        problem = f"{given[0]} is for folders of other projects; a checkpoint says it itself"
        raise ConfigError(problem, where=str(folder), remedy=f"leave {given[0]} out")
    large, options = LargeLLM(device_map, offload, bits), {"untuned": untuned, "allow_code": allow_code}
    found = load_model(path, device=device, dtype=dtype or "fast", large=large, **options)
    facts: dict[str, Any] = {"image": found.image, "folder": found.folder, "meta": found.meta, "notes": found.notes}
    return Model(found.vlm, found.tokenizer, found.chat.with_template_args(template_args or {}), **facts)


def _number_format(loading: Loading) -> torch.dtype | None:
    """The number format that was asked for; warns where the device computes another one faster."""
    dtype = loading.get("dtype")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype '{dtype}'", remedy=nearest(dtype, DTYPES))
        dtype = DTYPES[dtype]
    if dtype in NAMES:
        slow = precision.warning(usable_device(loading.get("device", "auto")), NAMES[dtype])
        if slow is not None:
            warnings.warn(slow, stacklevel=3)
    return dtype


def _load_foreign(
    path: Path,
    device: str,
    dtype: torch.dtype | None,
    placed: dict[str, Any],
    template_args: Mapping[str, Any],
    options: Mapping[str, str | None],
) -> Model:
    """A model of another project. `placed` are fields of `llm.Placement`, `options` those of `read_foreign`."""
    other = read_foreign(path, dtype=dtype, **placed, **options)
    fixed = dtype or placed["device_map"] or placed["quantization"]
    notes = [] if fixed else _adapt(other, usable_device(device))
    settle(other, device=device, device_map=placed["device_map"] or placed["quantization"])
    meta = {"chat": other.chat.to_json(), "image": other.image, "image_tokens": other.vlm.image_tokens}
    form = other.chat.with_template_args(template_args)
    return Model(other.vlm, other.tokenizer, form, image=other.image, folder=path, meta=meta, notes=notes)


def _adapt(found: Foreign, place: torch.device) -> list[str]:
    """Bring weights of 16 bits to float32 where the device computes that faster; returns what to say about it."""
    name = NAMES.get(found.dtype)
    if name is None:
        return []
    fast, reason = precision.fast_half(place, name)
    if fast:
        return []
    found.vlm.float()
    return [f"stored in {name}, loaded in fp32: {reason}"]


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


class Model:
    """A composite with its tokenizer, chat format and image preparation, ready to answer.

    Attributes:
        vlm, tokenizer, chat_format: the parts. The composite is put into eval mode and left in it.
        image: how pictures are brought to the tower: {"size": (H, W), "mode", "interpolation", "fill"}, and "tiles"
            where they are cut; {} for a text-only model. preparation: the same with what the model makes of it.
        generation: what its generation_config.json says of end tokens and sampling.
        folder, meta: the checkpoint it came from and its mmit.json, if any.
        notes: what was decided when it was loaded, in words.
        usage: counts of what was computed so far.
        activate: called before the LLM runs a prompt or the engine a step: where several models share one LLM, it
            puts this one's adapter to work. Answers of two such models may not be streamed at the same time.
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
        # Dropout and batch statistics must not play a part in an answer, whatever the caller did before.
        self.vlm, self.tokenizer, self.chat_format = vlm.eval(), tokenizer, chat_format
        self.image, self.folder, self.meta = dict(image or {}), folder, dict(meta or {})
        self.preparation = prepare_images(self.image, tokens=vlm.image_tokens, grid=vlm.image_grid)
        self.generation = generation_facts(vlm.llm)
        self.notes = list(notes)
        self.usage = Usage()
        self.activate: Callable[[], None] = _nothing
        self._support: decoding.Support | None = None

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
        row, prompts = self._row(list(prompt.samples), features)
        at = torch.arange(len(row.input_ids), device=self.vlm.device)
        # An image position has no token; layers that look ids up must see that.
        tokens = row.input_ids.index_fill(0, row.image_positions, -1).to(self.vlm.device)
        placed = {"positions": prompts.positions, "nodes": prompts.nodes}
        return self.vlm.row_logits(prompts.embeddings, **placed, at=at, ids=tokens)

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

    def prefill(
        self, batch: Sequence[Prompt], features: Features, *, store: PrefixCache | None = None
    ) -> tuple[decoding.State, list[int]]:
        """Run prompts, one sample each, up to where their answers begin; just one unless `support.batched`.

        Args:
            store: beginnings that were run before, whose tokens are not run again; takes up those of the batch.

        Returns:
            the state of the batch, and of each prompt how many tokens were known.
        """
        samples = [prompt.samples[0] for prompt in batch]
        if store is None or not self._remembers:
            rows = [self._row(group, features)[1] for group in self._groups(samples)]
            return decoding.prefill(self.vlm.llm, rows, support=self.support), [0] * len(batch)
        tokens = [token_keys(sample) for sample in samples]
        found = [store.find(each) for each in tokens]
        prompts, known = self._row_beyond(samples, features, store, found)

        keep = partial(store.add, tokens)
        return decoding.prefill(self.vlm.llm, [prompts], support=self.support, keep=keep), known

    def prefill_in_parts(
        self, prompt: Prompt, features: Features, *, store: PrefixCache, most: int
    ) -> Iterator[tuple[decoding.State, int] | None]:
        """Run one prompt as `prefill` does, in parts; other work may be done between two of them.

        Args:
            prompt: of one sample. features: of its pictures.
            store: known beginnings; a model that it keeps nothing of is run in one part.
            most: tokens of a part.

        Yields:
            None after every part but the last, then the state and how many tokens were known.
        """
        sample = prompt.samples[0]
        if not self._remembers:
            state, (known,) = self.prefill([prompt], features, store=store)
            yield state, known
            return
        tokens = token_keys(sample)
        row, (known,) = self._row_beyond([sample], features, store, [store.find(tokens)])
        *parts, last = decoding.in_parts(row, most)
        for part in parts:
            self.activate()  # between two parts another model of the same base may have worked
            decoding.feed(self.vlm.llm, part)
            yield None
        self.activate()
        keep = partial(store.add, [tokens])
        yield decoding.prefill(self.vlm.llm, [last], support=self.support, keep=keep), known

    def unknown(self, prompt: Prompt, store: PrefixCache) -> int:
        """How many tokens of a prompt `prefill` would run."""
        known = len(store.find(token_keys(prompt.samples[0]))) * BLOCK if self._remembers else 0
        return prompt.length - known

    def remember(
        self, store: PrefixCache, prompt: Prompt, ids: Sequence[int], state: decoding.State, place: int
    ) -> None:
        """Keep what was run of a prompt and the answer to it, for the prompt that goes on from there.

        Args:
            ids: of the answer. state, place: where it was decoded, before it leaves.
        """
        if self._remembers:
            length, width = int(state.lengths[place]), state.cache.get_seq_length()
            tokens = [*token_keys(prompt.samples[0]), *ids][:length]
            store.add([tokens], state.cache, [range(width - length, width)], place=place)

    @property
    def _remembers(self) -> bool:
        """A model without shared rows runs each prompt as plain attention, and a soft prompt comes before all keys."""
        return self.support.shared and not virtual_tokens(self.vlm.llm)

    def _row_beyond(
        self, samples: list[Sample], features: Features, store: PrefixCache, found: list[list[Block]]
    ) -> tuple[Prompts, list[int]]:
        """Lay samples into a row of which the tokens of the blocks `found` for each are known, and how many."""
        whole = build_row(samples)
        paths = decoding.paths_of(whole.nodes.tolist(), whole.predict_at.tolist())
        division = divide(whole.nodes.tolist(), paths, [len(blocks) * BLOCK for blocks in found])
        # Nothing is known: the plain way keeps the row as it is.
        if not division.length:
            return self._row(samples, features)[1], [0] * len(samples)
        row, kept = without(whole, division.order[: division.length])
        self.usage.unshared_tokens += whole.unshared_tokens
        embeddings = self._embedded(row, features, kept)
        nodes = torch.tensor(division.nodes)
        known = set(division.order[: division.length])
        device = self.vlm.device
        before = store.before(division, paths, found)
        prompts = Prompts(embeddings, row.positions.to(device), nodes, row.predict_at.to(device), before)
        return prompts, [sum(place in known for place in path) for path in paths]

    def _see(self, pictures: Pictures, batch: Sequence[Prompt]) -> Features:
        before = pictures.seen
        features = pictures.take(batch)
        self.usage.pictures += pictures.seen - before
        return features

    def _groups(self, samples: list[Sample]) -> list[list[Sample]]:
        """Samples by the row they run in: all in one where the model allows it, else each in its own."""
        return [samples] if self.support.shared else [[sample] for sample in samples]

    def _row(self, samples: list[Sample], features: Features) -> tuple[Row, Prompts]:
        """Lay samples into a row and splice their pictures in."""
        row = build_row(samples)
        self.usage.unshared_tokens += row.unshared_tokens
        embeddings, device = self._embedded(row, features), self.vlm.device
        return row, Prompts(embeddings, row.positions.to(device), row.nodes, row.predict_at.to(device))

    def _embedded(self, row: Row, features: Features, kept: torch.Tensor | None = None) -> torch.Tensor:
        """(T, D) embeddings of a row; `kept`: which of its pictures' tokens it still has, None for all."""
        vlm = self.vlm
        # Before anything of the LLM runs, the look-up of embeddings included.
        self.activate()
        # The order in which `splice_index` counts the crops of distinct pictures.
        keys = list(dict.fromkeys(row.images))
        spreads = {key: features[key][1] for key in keys}
        index = splice_index(row.images, spreads, vlm.image_tokens)
        if kept is not None:
            index = index[kept]
        # A device map may put the embeddings elsewhere than the projector.
        home = vlm.device if vlm.projector is None else next(vlm.projector.parameters()).device
        self.usage.prefill_tokens += len(row.input_ids)
        return vlm.embed(
            row.input_ids.to(vlm.device),
            image_positions=row.image_positions.to(vlm.device),
            image_index=index.to(home),
            image_tokens=vlm.image_tokens,
            features=torch.cat([features[key][0] for key in keys]) if len(index) else None,
        )

    @property
    def support(self) -> decoding.Support:
        """Whether its prompts can be decoded together, and run as one row."""
        if self._support is None:
            self._support = decoding.support(self.vlm.llm)
        return self._support

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


def _nothing() -> None:
    """An LLM of one adapter, or of none, is always ready."""


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
