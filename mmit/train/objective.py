"""What a run minimises besides the plain loss: DPO, ORPO and KTO, as formulas over the log-probabilities of answers.

In: the cross-entropies of a row's targets (S,) and which answer each belongs to (`data.preference.Compared`). Out: one
loss per comparison (B,), which the loop and the engines weigh and sum as they do losses of tokens. A step's loss is the
weighted mean over its comparisons, over all ranks and micro-batches. What a step needs to know before its first loss
(KTO's estimate of how far the model has moved, the number of tokens of a likelihood term) is summed over the whole
step, so that splitting the same rows differently changes nothing.

The log-probability of an answer is the sum over its tokens, the token that ends it among them. Formulas and defaults
are those of TRL 1.16; tests hold both to each other.

Letters: B comparisons, S targets, U units of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F

from mmit.data.preference import METHODS, Compared, Compares
from mmit.models.modes import evaluation_mode

if TYPE_CHECKING:
    from torch import nn

    from mmit.data.loader import MicroBatch
    from mmit.train.data.batches import TrainData
    from mmit.train.engines.base import Engine


@dataclass(frozen=True)
class Method:
    """The section `train.objective`, as plain values, but for what kind choices alone has; see there."""

    kind: Literal["sft", "choices", "dpo", "orpo", "kto"] = "sft"
    beta: float = 0.1
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def compares(self) -> Compares:
        """What it learns from."""
        return METHODS[self.kind]

    @property
    def referenced(self) -> bool:
        """Whether it looks at the log-probabilities of the model as the run began."""
        return self.kind in ("dpo", "kto")


@dataclass
class Items:
    """Comparisons, of one micro-batch or of many.

    Attributes:
        logps: (B, 2) log-probabilities of chosen and rejected; of labels: of the answer, and of the mismatched one.
        counts: (B, 2) their tokens. reference: (B, 2) what the model gave them as the run began; 0 without.
        good: (B,) verdicts. weights: (B,).
    """

    logps: torch.Tensor
    counts: torch.Tensor
    reference: torch.Tensor
    good: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def joined(parts: Sequence[Items]) -> Items:
        """Those of several micro-batches, in their order."""
        names = ("logps", "counts", "reference", "good", "weights")
        return Items(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass
class Shared:
    """What the comparisons of one step, or of an evaluation, share."""

    moved: float = 0.0  # KTO: mean log-ratio of mismatched answers, 0 at least
    per_token: float = 0.0  # weight of the comparisons over the weight of the tokens of their chosen answers


def answer_logps(losses: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Sum the cross-entropies (S,) of each answer: (answers,) log-probabilities."""
    # Not index_add, whose order of summing changes from run to run on CUDA.
    return -torch.stack([part.sum() for part in losses.split(list(lengths))])


def comparison_losses(method: Method, items: Items, shared: Shared) -> torch.Tensor:
    """(B,) the loss of each comparison.

    DPO (arXiv:2305.18290), with IPO's squared loss over mean log-ratios (arXiv:2310.12036), the hinge of SLiC, and
    robust DPO (arXiv:2403.00409); ORPO (arXiv:2403.07691), whose likelihood term is the mean over the tokens of all
    chosen answers; KTO (arXiv:2402.01306).
    """
    if method.kind == "kto":
        ratio = items.logps[:, 0] - items.reference[:, 0]
        sign = torch.where(items.good, 1.0, -1.0)
        weight = torch.where(items.good, method.desirable_weight, method.undesirable_weight)
        return weight * (1 - torch.sigmoid(method.beta * (sign * (ratio - shared.moved))))
    likelihood = -items.logps[:, 0] * shared.per_token
    if method.kind == "orpo":
        chosen, rejected = (items.logps / items.counts.clamp(min=1)).unbind(1)
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return likelihood - method.beta * F.logsigmoid(odds)
    ratios = items.logps - items.reference
    if method.loss == "ipo":
        ratios = ratios / items.counts.clamp(min=1)
    margin = ratios[:, 0] - ratios[:, 1]
    if method.loss == "sigmoid":
        found = -F.logsigmoid(method.beta * margin)
    elif method.loss == "hinge":
        found = torch.relu(1 - method.beta * margin)
    elif method.loss == "ipo":
        found = (margin - 1 / (2 * method.beta)) ** 2
    else:
        flip = method.label_smoothing
        # Divided by 1 - 2 flip, the expected loss under flipped labels is that without them (robust DPO).
        kept, flipped = F.logsigmoid(method.beta * margin), F.logsigmoid(-method.beta * margin)
        found = (-(1 - flip) * kept + flip * flipped) / (1 - 2 * flip)
    return found + method.sft_weight * likelihood if method.sft_weight else found


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, exact at both ends (Maechler 2012)."""
    near = x > -0.6931471805599453  # -log 2
    # Both branches get a harmless x where the other counts: autograd multiplies the gradient of the branch that was not
    # taken by 0, and 0 times infinity is NaN.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def metric_sums(method: Method, items: Items) -> list[float]:
    """Sums over comparisons that `metric_means` makes metrics of: they add up over micro-batches and ranks."""
    count = float(len(items.good))
    ratios = (items.logps - items.reference).detach() * method.beta
    if method.kind == "orpo":
        ratios = (items.logps / items.counts.clamp(min=1)).detach() * method.beta
    if method.compares == "pairs":
        better = float((ratios[:, 0] > ratios[:, 1]).sum())
        logps = items.logps.detach().double().sum(0).tolist()
        return [count, count, better, *ratios.double().sum(0).tolist(), *logps]
    good = items.good
    rewards, logps_ = ratios[:, 0].double(), items.logps[:, 0].detach().double()
    sums = [float(values[side].sum()) for values in (rewards, logps_) for side in (good, ~good)]
    return [float(good.sum()), float((~good).sum()), 0.0, *sums]


def metric_means(method: Method, sums: Sequence[float], shared: Shared) -> dict[str, float]:
    """Metrics under TRL's names, of sums over all ranks."""
    good, bad, better, *rest = sums
    names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
    found = {
        name: total / count for name, total, count in zip(names, rest, (good, bad, good, bad), strict=True) if count
    }
    if good and bad:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if method.compares == "pairs":
        return found | {"rewards/accuracies": better / (good or 1.0)}
    return found | {"kl": shared.moved}


@dataclass
class Preference:
    """A preference method at work in a run, on one rank.

    Attributes:
        reference: (U, 2) float32 of the units of the data, None where the method has none.
    """

    method: Method
    model: nn.Module
    reference: torch.Tensor | None = None
    shared: Shared = field(default_factory=Shared)
    _sums: list[float] = field(default_factory=list)
    _seen: list[Items] = field(default_factory=list)

    def begin(self, engine: Engine, data: TrainData, batches: Sequence[MicroBatch]) -> None:
        """Find what the losses of a step need to know of all of it. All ranks call this together."""
        # Before the first backward pass: estimated by each micro-batch for itself, it would make a step depend on how
        # its rows are split.
        self._seen = []
        sums = [0.0, 0.0, 0.0, 0.0]  # moved, how many; weight of comparisons, of the tokens of chosen answers
        for batch in batches:
            if self.method.kind == "kto":
                with evaluation_mode(self.model):
                    moved = self._mismatched(engine, data, batch)
                if batch.weight and batch.compared is not None:
                    ratio = moved.cpu() - self._reference_of(batch.compared.units)[:, 1]
                    sums[0] += float(ratio.double().sum())
                    sums[1] += len(ratio)
            elif batch.weight and batch.compared is not None:
                sums[2] += batch.loss_weight
                pairs = zip(batch.compared.weights, batch.compared.lengths[::2], strict=True)
                sums[3] += sum(weight * length for weight, length in pairs)
        self.shared = _shared(self.method, engine.all_sum(sums) if self._asks_whole else sums)

    @property
    def _asks_whole(self) -> bool:
        return self.method.kind in ("kto", "orpo") or self.method.sft_weight > 0

    def losses(self, losses: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """(S,) cross-entropies of a micro-batch -> (B,) losses of its comparisons; notes what metrics are made of."""
        if not batch.weight or batch.compared is None:
            return losses[:1] * 0  # of an idle rank: still a part of the graph, so that its backward pass runs
        items = self.items(losses, batch.compared)
        self._seen.append(Items(items.logps.detach(), items.counts, items.reference, items.good, items.weights))
        return comparison_losses(self.method, items, self.shared)

    def metrics(self, engine: Engine) -> dict[str, float]:
        """Metrics of the step, the same on all ranks, which call this together."""
        sums = metric_sums(self.method, Items.joined(self._seen)) if self._seen else [0.0] * 7
        self._seen = []
        return metric_means(self.method, engine.all_sum(sums), self.shared)

    def evaluate(self, engine: Engine, data: TrainData, batches: Any) -> dict[str, float]:
        """Loss and metrics of held-out comparisons, exact over ranks: one `Shared` for all of them."""
        seen: list[Items] = []
        for batch in batches:
            losses = engine.losses(data.prepare(batch))
            moved = self._mismatched(engine, data, batch) if self.method.kind == "kto" else None
            if batch.weight and batch.compared is not None:
                seen.append(self.items(losses, batch.compared, moved))
        shared, sums = Shared(), [0.0] * 9
        items = Items.joined(seen) if seen else None
        found = [0.0] * 4
        if items is not None:
            weights = items.weights.double()
            ratio = (items.logps - items.reference)[:, 1].double()
            found = [float(ratio.sum()), float(len(ratio)), float(weights.sum())]
            found.append(float((weights * items.counts[:, 0]).sum()))
        shared = _shared(self.method, engine.all_sum(found))
        if items is not None:
            losses = comparison_losses(self.method, items, shared).double()
            sums = [float((losses * items.weights).sum()), float(items.weights.double().sum())]
            sums += metric_sums(self.method, items)
        loss, weight, *rest = engine.all_sum(sums)
        return {"loss": loss / (weight or 1.0), **metric_means(self.method, rest, shared)}

    def items(self, losses: torch.Tensor, compared: Compared, moved: torch.Tensor | None = None) -> Items:
        """The comparisons of a micro-batch; `moved` (B,) are the log-probabilities of mismatched answers."""
        logps, counts = answer_logps(losses, compared.lengths), torch.tensor(compared.lengths)
        if self.method.compares == "pairs":
            logps, counts = logps.view(-1, 2), counts.view(-1, 2)
        else:
            other = torch.zeros_like(logps) if moved is None else moved
            logps, counts = torch.stack([logps, other], 1), torch.stack([counts, counts], 1)
        device = losses.device
        return Items(
            logps,
            counts.to(device),
            self._reference_of(compared.units).to(device),
            torch.tensor(compared.good, device=device),
            torch.tensor(compared.weights, device=device),
        )

    def _mismatched(self, engine: Engine, data: TrainData, batch: MicroBatch) -> torch.Tensor:
        """(B,) log-probabilities of the mismatched answers of a micro-batch, without gradients."""
        other = batch.compared.mismatched if batch.compared is not None else None
        assert other is not None and other.compared is not None
        return answer_logps(engine.losses(data.prepare(other)), other.compared.lengths)

    def _reference_of(self, units: Sequence[int]) -> torch.Tensor:
        """(B, 2)."""
        return torch.zeros(len(units), 2) if self.reference is None else self.reference[list(units)]

    def measure(self, engine: Engine, data: TrainData, units: int) -> torch.Tensor:
        """(U, 2) float32: the log-probabilities that the model gives now. All ranks call this together.

        Args:
            data: walks over every unit once, in rows as in training.
        """
        # Each rank fills the units that it walks over and leaves zeros elsewhere: a sum puts the table together.
        table = torch.zeros(units, 2, dtype=torch.float64)
        plain = Preference(self.method, self.model)
        with evaluation_mode(self.model), torch.no_grad():
            for batch in data.batches():
                losses = engine.losses(data.prepare(batch))
                moved = self._mismatched(engine, data, batch) if self.method.kind == "kto" else None
                if batch.weight and batch.compared is not None:
                    table[batch.compared.units] = plain.items(losses, batch.compared, moved).logps.double().cpu()
        return torch.tensor(engine.all_sum(table.flatten().tolist()), dtype=torch.float32).view(units, 2)


def _shared(method: Method, sums: Sequence[float]) -> Shared:
    """Of (moved, how many, weight of comparisons, weight of tokens), summed over ranks."""
    moved, count, weight, tokens = sums
    if method.kind == "kto":
        return Shared(moved=max(moved / (count or 1.0), 0.0))  # an estimate of a divergence, which is never negative
    return Shared(per_token=weight / (tokens or 1.0))
