"""DPO, KTO and ORPO of TRL itself, on the same pictures and tokens: its losses, its forward, its gradients.

TRL runs its concatenated batch through transformers' own Llava; mmit reads the same folder and runs packed rows.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import add_fused_lm_head

from mmit.data.packing import Sample
from mmit.models.interop.llava_hf import read_llava_hf
from mmit.train.objective import Method
from tests.interop.llava_models import make_llava_hf
from tests.train.preference_bench import Bench

pytestmark = pytest.mark.slow
COUNT = 16
DPO = {
    "sigmoid": (Method("dpo", beta=0.3), ["sigmoid"], [1.0]),
    "hinge": (Method("dpo", beta=0.3, loss="hinge"), ["hinge"], [1.0]),
    "ipo": (Method("dpo", beta=0.3, loss="ipo"), ["ipo"], [1.0]),
    "robust": (Method("dpo", beta=0.3, loss="robust", label_smoothing=0.2), ["robust"], [1.0]),
    "sigmoid and sft": (Method("dpo", beta=0.3, sft_weight=0.7), ["sigmoid", "sft"], [1.0, 0.7]),
}


class Both:
    """transformers' Llava, and a bench of mmit on the same weights."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.theirs = make_llava_hf(folder / "llava")
        add_fused_lm_head(self.theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        read = read_llava_hf(folder / "llava", dtype=torch.float32)
        self.bench = Bench(folder, kind, count=COUNT, model=(read.vlm, read.tokenizer, read.image))
        self.image_token = self.theirs.config.image_token_index
        self.pixels: dict[int, torch.Tensor] = {}

    def batch(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Sequences side by side as TRL's collator leaves them: padded on the right, a picture each."""
        vlm = self.bench.vlm
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "completion_mask": []}
        pixels = []
        for sample in samples:
            ids: list[int] = []
            mask: list[int] = []
            for token, weight in zip(sample.ids, sample.weights, strict=True):
                ids += [self.image_token] * vlm.image_tokens if token < 0 else [token]
                mask += [0] * vlm.image_tokens if token < 0 else [int(weight > 0)]
            rows["input_ids"].append(torch.tensor(ids))
            rows["completion_mask"].append(torch.tensor(mask))
            rows["attention_mask"].append(torch.ones(len(ids), dtype=torch.int64))
            image = self.bench.data.record(sample.record).images[0]
            pixels.append(vlm.vision._normalise(self.bench.load_image(image, "")))
        batch = {name: pad_sequence(values, batch_first=True) for name, values in rows.items()}
        return batch | {"pixel_values": torch.cat(pixels)}

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        self.theirs.zero_grad()
        loss.backward()
        found = {}
        for name, parameter in self.theirs.named_parameters():
            for begin, ours in (
                ("model.language_model.", "llm.model."),
                ("lm_head.", "llm.lm_head."),
                ("model.multi_modal_projector.linear_1.", "projector.layers.0."),
                ("model.multi_modal_projector.linear_2.", "projector.layers.2."),
            ):
                if name.startswith(begin) and parameter.grad is not None:
                    found[ours + name.removeprefix(begin)] = parameter.grad
        return found


def trainer(kind: Any, model: Any, **attributes: Any) -> Any:
    """A trainer with what its loss reads, without the data and the loop around it."""
    found = object.__new__(kind)
    alone = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, num_processes=1
    )
    given: dict[str, Any] = {
        "accelerator": alone,
        "model": model,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "beta": 0.3,
    }
    for name, value in (given | attributes).items():
        object.__setattr__(found, name, value)
    return found


def check(mine: tuple[float, dict[str, torch.Tensor], Any], both: Both, loss: torch.Tensor) -> None:
    ours, gradients, _ = mine
    assert ours == pytest.approx(float(loss.detach()), abs=1e-5)
    theirs = both.gradients(loss)
    assert gradients.keys() == theirs.keys() and len(theirs) > 20
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return Both(tmp_path_factory.mktemp("trl"), "dpo")


@pytest.mark.parametrize("name", DPO)
def test_dpo(pairs, name, record_property):
    method, types, weights = DPO[name]
    samples = pairs.bench.samples()
    batch = pairs.batch([own[0] for own in samples] + [own[1] for own in samples])
    batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), pairs.bench.reference.unbind(1), strict=True))
    plain: dict[str, Any] = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
    work = trainer(
        DPOTrainer, pairs.theirs.train(), loss_types=types, loss_weights=weights, label_smoothing=0.2, **plain
    )
    loss = work._compute_loss(pairs.theirs, batch, return_outputs=False)
    rows = [list(range(COUNT))]
    mine = pairs.bench.step(method, rows)
    check(mine, pairs, loss)
    told = {name: values[0] for name, values in work._metrics["train"].items()}
    for metric, value in mine[2].items():
        assert value == pytest.approx(told[metric], abs=1e-4), metric
    (packed,) = pairs.bench.batches(rows)
    whole, unpadded = batch["input_ids"].numel(), int(batch["attention_mask"].sum())
    pairs_alone = int(pairs.bench.scan.length.sum())  # nothing shared between pairs, as different system texts would
    record_property("tokens", [packed.tokens, pairs_alone, unpadded, whole])
    assert packed.tokens <= pairs_alone <= 0.6 * unpadded <= 0.6 * whole


def test_orpo_but_for_the_prompt_in_its_likelihood(pairs):
    """TRL's odds-ratio term; its likelihood also counts the prompt, the paper's (and mmit's) the answer alone."""
    samples = pairs.bench.samples()
    batch = pairs.batch([own[0] for own in samples] + [own[1] for own in samples])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    plain = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    logits = pairs.theirs.train()(**plain).logits
    work = trainer(ORPOTrainer, pairs.theirs)
    logps = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    odds, *_ = work.odds_ratio_loss(logps[:COUNT], logps[COUNT:])
    answers = torch.nn.functional.cross_entropy(logits[:COUNT, :-1].flatten(0, 1), labels[:COUNT, 1:].flatten())
    check(pairs.bench.step(Method("orpo", beta=0.3), [list(range(COUNT))]), pairs, answers - odds.mean())


def test_kto(tmp_path):
    both = Both(tmp_path, "kto")
    samples = both.bench.samples()
    batch, other = (both.batch([own[i] for own in samples]) for i in (0, 1))
    batch |= {f"KL_{name}": other[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    good = torch.tensor([both.bench.data.record(n).label for n in range(COUNT)])
    batch |= {"label": good, "ref_logps": both.bench.reference[:, 0], "ref_KL_logps": both.bench.reference[:, 1]}
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    work = trainer(KTOTrainer, both.theirs.train(), loss_type="kto", calculate_KL=True, **weights)
    loss = work._compute_loss(both.theirs, batch, return_outputs=False)
    mine = both.bench.step(Method("kto", beta=0.3, **weights), [list(range(COUNT))])
    assert 0.1 < mine[2]["kl"] == pytest.approx(work._metrics["train"]["kl"][0], abs=1e-4)
    check(mine, both, loss)
