"""The model's side of a harness: many requests at once, answered in their order.

In: a model, and records or token ids. Out: texts and `Likelihood`s. Requests that ask for the same settings run as
batches; continuations of the same beginning share it. Refuses a text that does not fit the model's context.
Imports no harness.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from mmit.data.answers import AnswerText
from mmit.data.packing import Sample
from mmit.data.prompts import Prompt
from mmit.errors import ConfigError, RecordError
from mmit.eval.runner import CHUNK
from mmit.generate import Likelihood, Model
from mmit.models.llm import context_length
from mmit.models.sampling import Sampling

if TYPE_CHECKING:
    from mmit.eval.harness.requests import Generation
    from mmit.records import Record

Asked = TypeVar("Asked")
Ids = Sequence[int]


def batch_of(given: Any) -> int:
    """Read a harness's --batch_size. Raises ConfigError unless it is a number from 1 up."""
    if not str(given).isdecimal() or int(given) < 1:
        problem = f"batch size {given!r}"
        raise ConfigError(problem, where="--batch_size", remedy="Give a number; mmit has no automatic choice.")
    return int(given)


def by_settings(
    asked: Sequence[Asked], settings: Sequence[Hashable], *, batch_size: int
) -> Iterator[tuple[list[int], list[Asked]]]:
    """Yield (places, requests) of equal settings, a chunk of batches at a time, so that few pictures are open."""
    places: dict[Hashable, list[int]] = {}
    for place, setting in enumerate(settings):
        places.setdefault(setting, []).append(place)
    size = CHUNK * batch_size
    for group in places.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield part, [asked[place] for place in part]


def write(model: Model, records: Sequence[Record], how: Generation, *, batch_size: int, seed: int = 0) -> list[str]:
    """Answer questions as a harness's settings say.

    Args:
        model: answers. records: the questions.
        how: the settings: most new tokens, texts that stop, how tokens are drawn.
        batch_size: questions at once. seed: of sampled answers.

    Returns:
        the answers, in the order of the questions.
    """
    return model.generate(
        records,
        batch_size=batch_size,
        max_new_tokens=how.max_new_tokens,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        stop=how.stop,
        seed=seed,
    )


def score_answers(
    model: Model, asked: Sequence[tuple[Record, str]], *, batch_size: int, with_end: bool = False
) -> list[Likelihood]:
    """Say how likely an answer to each question is; neighbours with one and the same Record run together.

    An answer begins a turn of its own: the space that a harness puts before it is left out.

    Args:
        model: measures. asked: (question, answer) pairs. batch_size: questions at once.
        with_end: count the end of the answer too.

    Returns:
        one for each pair, in order.

    Raises:
        RecordError: an answer without text.
    """
    maker, prompts = model.prompt_maker(), []
    for number, (_, group) in enumerate(groupby(asked, key=lambda pair: id(pair[0]))):
        pairs = list(group)
        answers = [answer.lstrip() for _, answer in pairs]
        if not all(answers):
            raise RecordError("an answer without text", where=pairs[0][0].where, remedy="Check the task's choices.")
        prompts.append(maker.choices(pairs[0][0], number, answers=answers, with_end=with_end))
    return [one for row in model.likelihoods(prompts, batch_size=batch_size) for one in row]


def score_tokens(model: Model, pairs: Sequence[tuple[Ids, Ids]], *, batch_size: int) -> list[Likelihood]:
    """Say how likely token ids are after others, without any chat format; nothing is certain.

    Neighbours with the same beginning run together. Raises RecordError for an empty beginning or one that is too
    long.
    """
    context = context_length(model.vlm.llm)
    prompts: list[Prompt] = []
    empty = Likelihood(0.0, 0, True)
    for begin, group in groupby((pair for pair in pairs if pair[1]), key=lambda pair: tuple(pair[0])):
        ends = [tuple(pair[1]) for pair in group]
        longest = len(begin) + max(map(len, ends)) - 1  # the last token is predicted, not run
        if not begin:
            raise RecordError("nothing stands before the text", remedy="Begin with the tokenizer's BOS or EOS.")
        if context is not None and longest > context:
            raise _too_long(longest, context)
        samples = [Sample((*begin, *end), (False,) * len(begin) + (True,) * len(end)) for end in ends]
        prompts.append(Prompt(len(prompts), tuple(samples), {}, longest))
    found = iter([one for row in model.likelihoods(prompts, batch_size=batch_size) for one in row])
    return [next(found) if end else empty for _, end in pairs]


def continue_tokens(
    model: Model, beginnings: Sequence[Ids], how: Generation, *, batch_size: int, seed: int = 0
) -> list[str]:
    """Continue token ids without any chat format; whitespace around the texts is kept.

    Args:
        model: answers. beginnings: ids, BOS included where it is wanted.
        how, batch_size, seed: as of `write`.

    Raises:
        RecordError: a beginning that leaves no room in the model's context.
    """
    context = context_length(model.vlm.llm)
    prompts = []
    for number, begin in enumerate(beginnings):
        if context is not None and len(begin) >= context:
            raise _too_long(len(begin), context)
        # A row runs what stands before its last target, so a dummy target follows the beginning.
        sample = Sample((*begin, 0), (False,) * len(begin) + (True,), (), number)
        prompts.append(Prompt(number, (sample,), {}, len(begin)))
    sampling = Sampling(temperature=how.temperature, top_p=how.top_p, top_k=how.top_k, seed=seed)
    reader = AnswerText(model.tokenizer, how.stop, strip=False)
    return model.answer(prompts, reader, batch_size=batch_size, max_new_tokens=how.max_new_tokens, sampling=sampling)


def _too_long(tokens: int, context: int) -> RecordError:
    problem = f"{tokens} tokens do not fit the model's context of {context}"
    return RecordError(problem, remedy="Give fewer solved examples (--num_fewshot), or choose another task.")


def told_once(tell: Callable[[str], None]) -> Callable[[Generation], None]:
    """Return what tells of each ignored setting once."""
    told: set[str] = set()

    def note(how: Generation) -> None:
        for key in how.ignored:
            if key not in told:
                told.add(key)
                tell(f"mmit has no use for the generation setting '{key}'; it is ignored.")

    return note
