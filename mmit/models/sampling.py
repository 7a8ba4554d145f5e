"""The choice of the next token: greedy, or drawn by temperature, top_k and top_p.

In: logits and a source of randomness for each prompt. Out: token ids. Refuses options out of their range, and logits
that are not finite.

Dimensions: B prompts, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmit.errors import ConfigError, ModelError
from mmit.models.sending import send

NOT_FINITE = -1  # in place of a token
_NUMBER: tuple[type, ...] = (int, float)
_SAMPLING_TYPES = (
    ("temperature", _NUMBER, "a number, 0 (greedy) or more"),
    ("top_p", _NUMBER, "a number above 0 and up to 1"),
    ("top_k", (int,), "a whole number, 0 (every token) or more"),
    ("seed", (int,), "a whole number"),
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; temperature 0 is greedy, top_k 0 keeps every token.

    `seed` and a prompt's number alone decide its random draws, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind, told in _SAMPLING_TYPES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ConfigError(f"{name} is {value!r}", remedy=f"Give {told}.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}", remedy="Give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}", remedy="Give a number above 0 and up to 1.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}", remedy="Give 0 (every token) or more.")

    def generator(self, prompt: int) -> torch.Generator:
        """Return the source of randomness of one prompt. On the CPU, so that every device draws the same."""
        digest = hashlib.blake2b(f"{self.seed} {prompt}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def choose(logits: torch.Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> list[int]:
    """Choose the next token of every place as `try_choose` does. Raises ModelError for logits that are not finite."""
    found = try_choose(logits, sampling, draws)
    if NOT_FINITE in found:
        raise ModelError("the model's logits are not finite", remedy="load it with dtype bf16 or fp32")
    return found


def try_choose(logits: torch.Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> list[int]:
    """Choose the next token of every place; NOT_FINITE where logits are not.

    Nucleus sampling (top_p) is arXiv:1904.09751; top_k is applied before it, as transformers does.

    Args:
        logits: (B, V).
        sampling: how.
        draws: (B,) generators, each advanced by one draw unless greedy.
    """
    best = logits.max(-1)
    finite = torch.isfinite(best.values)
    if sampling.temperature == 0:
        return _told(best.indices, finite)
    ordered, ids = torch.sort(logits.float() / sampling.temperature, dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = float("-inf")
    share = ordered.softmax(-1)
    total = share.cumsum(-1)
    share = share.masked_fill(total - share >= sampling.top_p, 0.0)
    # Drawn in the order of the vocabulary: in that of the shares, rounding could swap two that are nearly equal.
    share = torch.zeros_like(share).scatter(-1, ids, share)
    total = share.cumsum(-1)
    uniform = send(torch.stack([torch.rand((), generator=draw) for draw in draws]), total.device)
    # Up to the last token kept: rounding in the sum must not let a token of probability 0 through.
    last = share.shape[-1] - 1 - (share > 0).flip(-1).int().argmax(-1)
    return _told(torch.minimum((total <= uniform[:, None] * total[:, -1:]).sum(-1), last), finite)


def _told(ids: torch.Tensor, finite: torch.Tensor) -> list[int]:
    """The (B,) ids, NOT_FINITE where `finite` (B,) is false; both come from the device in one go."""
    found: list[int] = torch.where(finite, ids, NOT_FINITE).tolist()
    return found
