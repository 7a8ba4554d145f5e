"""lmms-eval's view of an mmit model: `lmms-eval --model mmit --model_args pretrained=RUN --tasks pope`.

Owns the two classes that lmms-eval's entry point names, one for tasks that hand over messages, one for contexts with
pictures. In: lmms-eval's requests. Out: texts, or the loss of a continuation. Refuses conversations of several rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from mmit.errors import ConfigError, MmitError, nearest
from mmit.eval.harness import requests as asking
from mmit.eval.harness import scoring
from mmit.eval.runner import CHUNK

if TYPE_CHECKING:
    from mmit.records import Record

LOSSES = ("mean", "sum")


def manifest() -> ModelManifest:
    """Return what the entry point group `lmms_eval.models` takes."""
    return ModelManifest(
        model_id="mmit",
        simple_class_path=f"{__name__}.Simple",
        chat_class_path=f"{__name__}.Chat",
    )


class _Adapter(lmms):
    """What both classes share.

    Args:
        pretrained: a run, a checkpoint or a llava-hf folder.
        batch_size, device, dtype: as in `mmit eval`; processes of a launcher take a device each.
        max_new_tokens: where a task names no limit.
        loss: "mean" over the tokens of a continuation, as lmms-eval's own models have it, or "sum".
        seed: of sampled answers.
        allow_code: as `mmit.load` takes it.

    Raises:
        ConfigError: an argument that is not possible.
        CheckpointError: the folder is not a whole checkpoint.
    """

    def __init__(  # noqa: PLR0913
        self,
        pretrained: str = "",
        *,
        batch_size: int | str = 32,
        max_batch_size: int | str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        max_new_tokens: int = 1024,
        loss: str = "mean",
        seed: int = 0,
        allow_code: bool | str = False,
    ) -> None:
        from mmit.generate import load

        super().__init__()
        if not pretrained:
            raise ConfigError("no model", where="--model_args", remedy="Give pretrained=FOLDER, a run for example.")
        if loss not in LOSSES:
            raise ConfigError(f"unknown loss '{loss}'", where="--model_args", remedy=nearest(loss, LOSSES))
        self.batch_size = scoring.batch_of(batch_size)
        self.max_new_tokens, self.loss, self.seed = int(max_new_tokens), loss, int(seed)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        own = str(self.accelerator.device) if self._world_size > 1 else device
        self.model = load(pretrained, device=own, dtype=dtype, allow_code=str(allow_code).lower() == "true")
        self.device = self.model.vlm.device
        self._note = scoring.told_once(logging.getLogger(__name__).warning)

    def clean(self) -> None:
        """Keep the model, which may be in use elsewhere; lmms-eval's own method would take it apart."""

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: mmit's adapter answers one question at a time."""
        problem = "the task asks in several rounds, which mmit's adapter does not do"
        raise MmitError(problem, where=requests[0].task_name or "", remedy="Choose other tasks.")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return (loss, whether greedy decoding says so) for each context, continuation and pictures.

        lmms-eval takes the choice of the *lowest* number, so this is the loss, not the log-probability. Its evaluator
        turns a bare pair into text; inside a GenerationResult the pair arrives whole.
        """
        pairs: list[tuple[Record, str]] = []
        found = []
        last: tuple[Any, Record | None] = (None, None)
        for request in tqdm(requests, desc="mmit", disable=self.rank != 0):
            key, record, text = self._continued(request, last)
            pairs.append((record, text))
            last = (key, record)
            if len(pairs) >= CHUNK * self.batch_size:
                found += scoring.score_answers(self.model, pairs, batch_size=self.batch_size)
                pairs = []
        found += scoring.score_answers(self.model, pairs, batch_size=self.batch_size)
        losses = [-one.log_probability / (one.tokens if self.loss == "mean" else 1) for one in found]
        return [GenerationResult((loss, one.greedy)) for loss, one in zip(losses, found, strict=True)]

    def _continued(self, request: Instance, last: tuple[Any, Record | None]) -> tuple[Any, Record, str]:
        """Return a key of the question, its record (that of the last request if it has the same key), the answer."""
        context, text, *more = request.args
        if not more:  # how likely an answer is without its question
            return None, asking.question(context, (), name=str(request.task_name)), text
        see, doc_id, task, split = more
        key = (context, task, split, doc_id)
        doc = self.task_dict[task][split][doc_id] if key != last[0] or callable(text) else None
        record = last[1] if key == last[0] else None
        if record is None:
            record = asking.question(context, see(doc), name=f"{task} {doc_id}")
        return key, record, text(doc) if callable(text) else text

    def _write(
        self, requests: Sequence[Instance], settings: Sequence[dict[str, Any]], ask: Callable[[Instance], Record]
    ) -> list[str]:
        """Answer requests in their order, those with equal settings together."""
        how = [asking.generation(given, max_new_tokens=self.max_new_tokens) for given in settings]
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="mmit", disable=self.rank != 0) as bar:
            for places, part in scoring.by_settings(requests, how, batch_size=self.batch_size):
                self._note(how[places[0]])
                records = [ask(request) for request in part]
                said = scoring.write(
                    self.model, records, how[places[0]], batch_size=self.batch_size, seed=self.seed + places[0]
                )
                for place, answer in zip(places, said, strict=True):
                    answers[place] = answer
                bar.update(len(places))
        return answers


class Simple(_Adapter):
    """For tasks that give a context and a function from a document to its pictures."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request (context, settings, doc_to_visual, doc_id, task, split)."""

        def ask(request: Instance) -> Record:
            context, _, see, doc_id, task, split = request.args
            return asking.question(context, see(self.task_dict[task][split][doc_id]), name=f"{task} {doc_id}")

        return self._write(requests, [request.args[1] for request in requests], ask)


class Chat(_Adapter):
    """For tasks that give messages, in which pictures stand where they are spoken of."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request (context, doc_to_messages, settings, doc_id, task, split)."""

        def ask(request: Instance) -> Record:
            _, say, _, doc_id, task, split = request.args
            return asking.conversation(say(self.task_dict[task][split][doc_id]), name=f"{task} {doc_id}")

        return self._write(requests, [request.args[2] for request in requests], ask)
