"""lm-eval's view of an mmit model, for tasks in words: `mmit harness lm-eval run --model mmit --tasks hellaswag ...`.

Owns the class that is registered as the model `mmit`. In: lm-eval's requests. Out: log-probabilities and texts. A
context is continued as it is, like lm-eval's own models do; with lm-eval's --apply_chat_template its turns go through
the model's chat format, in which no text can become a control token.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mmit.data.content import piece_tokenizer
from mmit.errors import ConfigError
from mmit.eval.harness import requests as asking
from mmit.eval.harness import scoring
from mmit.eval.runner import CHUNK
from mmit.models.llm import context_length

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from mmit.generate import Likelihood
    from mmit.records import Record

log = logging.getLogger(__name__)
Scored = tuple[float, bool]
DEFAULT_DEVICE = "cuda:0"  # of lm-eval's --device
WINDOW = 2048  # tokens of a rolling window where the model has no limit


@register_model("mmit")
class TextModel(TemplateLM):
    """An mmit model that continues texts.

    Args:
        pretrained: a run, a checkpoint or a llava-hf folder.
        batch_size, device, dtype: as in `mmit eval`.
        max_gen_toks: longest answer where a task names none.
        seed: of sampled answers.
        allow_code: as `mmit.load` takes it.

    Raises:
        ConfigError: an argument that is not possible.
        CheckpointError: the folder is not a whole checkpoint.
    """

    def __init__(
        self,
        pretrained: str = "",
        *,
        batch_size: int | str = 32,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        allow_code: bool | str = False,
    ) -> None:
        from mmit.generate import load

        super().__init__()
        if not pretrained:
            raise ConfigError("no model", where="--model_args", remedy="Give pretrained=FOLDER, a run for example.")
        self.batch_size = scoring.batch_of(batch_size)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        self.model = load(pretrained, device=_device(device), dtype=dtype, allow_code=str(allow_code).lower() == "true")
        self._tokens = piece_tokenizer(self.model.tokenizer)
        self._note = scoring.told_once(log.warning)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.model.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the tokenizer's BOS, else its EOS."""
        bos = self.model.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; BOS goes first if the tokenizer puts it there and this is not declined."""
        begin: tuple[int, ...] = ()
        if self._tokens.bos and add_special_tokens is not False:
            begin = tuple(self._tokens.template(self._tokens.bos, "start"))
        return [*begin, *self._tokens.content(string, "start")]

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are told apart by."""
        return f"mmit-{self.model.chat_format.name}-{self.model.tokenizer.name_or_path}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the name of the model's chat format; there is no other to choose. Raises ConfigError."""
        if isinstance(chat_template, str):
            remedy = "Give --apply_chat_template without a name."
            raise ConfigError(f"no chat template '{chat_template}'", where="--apply_chat_template", remedy=remedy)
        return self.model.chat_format.name if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write down the turns; the chat format lays them out when they are asked. Raises ConfigError."""
        if not add_generation_prompt:
            problem = "the task begins the answer itself (gen_prefix), which mmit's chat formats do not continue"
            raise ConfigError(problem, where="--apply_chat_template", remedy="Leave --apply_chat_template out.")
        return asking.pack_chat(chat_history)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        """Return (log-probability, whether greedy decoding says so) for each context and continuation."""
        chats: list[tuple[Record, str]] = []
        places: list[int] = []
        # The choices of a question come one after the other: they share a Record, so that its prompt runs once.
        for context, group in groupby(range(len(requests)), key=lambda n: requests[n].args[0]):
            record = asking.unpack_chat(context, name=f"question {len(chats)}")
            if record is not None:
                for place in group:
                    places.append(place)
                    chats.append((record, requests[place].args[1]))
        taken = set(places)
        plain = [request for place, request in enumerate(requests) if place not in taken]
        found: dict[int, Scored] = {}
        said = scoring.score_answers(self.model, chats, batch_size=self.batch_size)
        found.update(zip(places, map(_scored, said), strict=True))
        rest = super().loglikelihood(plain, disable_tqdm=disable_tqdm) if plain else []
        found.update(zip((n for n in range(len(requests)) if n not in taken), rest, strict=True))
        return [found[place] for place in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        pairs = [(begin, end) for _, begin, end in requests]
        out: list[Likelihood] = []
        size = CHUNK * self.batch_size
        for start in tqdm(range(0, len(pairs), size), desc="mmit", disable=disable_tqdm):
            out += scoring.score_tokens(self.model, pairs[start : start + size], batch_size=self.batch_size)
        return [_scored(one) for one in out]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, read in windows where it is longer than the model's context."""
        longest = context_length(self.model.vlm.llm) or WINDOW
        sums = []
        for request in tqdm(requests, desc="mmit", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=longest,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found = scoring.score_tokens(self.model, pairs, batch_size=self.batch_size)
            sums.append(sum(one.log_probability for one in found))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer each request (context, settings), in their order."""
        how = [self._how(request.args[1]) for request in requests]
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="mmit", disable=disable_tqdm) as bar:
            for places, part in scoring.by_settings(requests, how, batch_size=self.batch_size):
                self._note(how[places[0]])
                said = self._write([request.args[0] for request in part], how[places[0]], seed=self.seed + places[0])
                for place, answer in zip(places, said, strict=True):
                    answers[place] = answer
                bar.update(len(places))
        return answers

    def _how(self, settings: Mapping[str, Any]) -> asking.Generation:
        return asking.generation(settings, max_new_tokens=self.max_gen_toks)

    def _write(self, contexts: Sequence[str], how: asking.Generation, *, seed: int) -> list[str]:
        options: dict[str, Any] = {"batch_size": self.batch_size, "seed": seed}
        records = [asking.unpack_chat(context, name=f"question {n}") for n, context in enumerate(contexts)]
        asked = [record for record in records if record is not None]
        if len(asked) == len(records):
            return scoring.write(self.model, asked, how, **options)
        beginnings = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        return scoring.continue_tokens(self.model, beginnings, how, **options)


def _device(asked: str | None) -> str:
    """Return the device; without any GPU, lm-eval's own default of cuda:0 stands for no choice at all."""
    if asked == DEFAULT_DEVICE and not torch.cuda.is_available():
        log.warning("There is no GPU; mmit runs on the CPU.")
        return "cpu"
    return asked or "auto"


def main(arguments: Sequence[str]) -> None:
    """Run lm-eval's own command line in this process, which has the model `mmit`."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


def _scored(likelihood: Likelihood) -> Scored:
    return likelihood.log_probability, likelihood.greedy
