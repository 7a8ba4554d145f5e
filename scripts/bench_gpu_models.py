"""What bench_gpu.py measures and a line of its table: models of random weights, packed rows, their FLOPs, answers.

Sizes are LLaVA-1.5-7B's, or tiny ones for a dry run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmit.data.loader import to_micro_batch
from mmit.data.packing import Row, Sample, build_row
from mmit.data.preparation import Spread
from mmit.forecast.rates import RowFacts, count_pairs, measure_rates
from mmit.models import decoding
from mmit.models.llm import load_llm
from mmit.models.projectors import build_projector
from mmit.models.tuning import Group, apply_tuning
from mmit.models.vision import build_vision
from mmit.models.vlm import VLM
from mmit.train.data.batches import Upload
from mmit.train.engines.torch_engine import TorchEngine

BF16, CPU = torch.bfloat16, torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """An LLM's size; `kv` below `heads` is grouped-query attention."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv: int
    vocab: int = 32000

    def config(self) -> dict[str, Any]:
        """As transformers names it."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "max_position_embeddings": 4096,
        }


@dataclass(frozen=True)
class Sizes:
    """What the benchmark runs: the LLM of the timed step, that of the checks, the tower, lengths and repeats."""

    big: Shape
    mid: Shape
    tower: dict[str, int]
    shorter: int  # texts are divided by this
    rows: int  # rows a step
    rank: int  # of LoRA in the timed step
    new: int  # tokens of an answer
    batches: tuple[int, ...]  # of answers at once

    @property
    def tokens(self) -> int:
        """Of an image."""
        return (self.tower["image_size"] // self.tower["patch_size"]) ** 2


def _tower(hidden: int, inter: int, layers: int, heads: int, image: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    return dict(zip(names, (hidden, inter, layers, heads, image, 14), strict=True))


FULL = Sizes(
    big=Shape(32, 4096, 11008, 32, 32),
    mid=Shape(12, 1024, 2816, 16, 4),
    tower=_tower(1024, 4096, 24, 16, 336),
    shorter=1,
    rows=8,
    rank=128,
    new=64,
    batches=(1, 8, 32),
)
DRY = Sizes(
    big=Shape(2, 64, 128, 4, 4, vocab=512),
    mid=Shape(2, 64, 128, 4, 2, vocab=512),
    tower=_tower(32, 64, 3, 2, 28),
    shorter=8,
    rows=2,
    rank=4,
    new=4,
    batches=(1, 3),
)


def make_llm(shape: Shape, *, device: torch.device, dtype: torch.dtype = BF16, empty: bool = False) -> Any:
    """Random weights, made on the device: 7B on a CPU would take minutes. `empty`: shapes alone."""
    llm: Any = load_llm("random", dtype=dtype, empty=True, random_init=shape.config())
    if empty:
        return llm
    llm = llm.to_empty(device=device)
    draw = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02, generator=draw)
    with torch.device(device):  # its buffers are not among the weights
        llm.model.rotary_emb = type(llm.model.rotary_emb)(llm.config)
    return llm


def make_vlm(
    sizes: Sizes,
    shape: Shape,
    *,
    device: torch.device,
    dtype: torch.dtype = BF16,
    pictures: bool = True,
    empty: bool = False,
) -> VLM:
    """The composite; the same numbers at every call on one device."""
    llm = make_llm(shape, device=device, dtype=dtype, empty=empty)
    if not pictures:
        return VLM(llm, vision=None, projector=None)
    place = torch.device("meta") if empty else device
    torch.manual_seed(1)
    with torch.device("meta" if empty else "cpu"):
        tower = build_vision("hf", {"model_type": "clip_vision_model", **sizes.tower}, weights=False, dtype=dtype)
        made = build_projector("mlp", vision_dim=tower.dim, llm_dim=shape.hidden, grid=tower.grid, prefix=tower.prefix)
    return VLM(llm, vision=tower.to(place), projector=made.to(place, dtype))


def tune(vlm: VLM, mode: str = "lora", **options: Any) -> list[Group]:
    """Train the LLM by `mode`, and the projector."""
    trained = vlm.projector is not None
    plan = {
        "vision": {"mode": "frozen", "lr": None, "options": {}},
        "projector": {"mode": "full" if trained else "frozen", "lr": 2e-5 if trained else None, "options": {}},
        "llm": {"mode": mode, "lr": 2e-4, "options": options},
    }
    groups = apply_tuning(vlm, plan)
    vlm.train()
    return groups


@dataclass(frozen=True)
class Micro:
    """A micro-batch of one row: the arguments of a forward pass, and the row."""

    tensors: dict[str, Any]
    row: Row
    pictures: int

    @property
    def facts(self) -> RowFacts:
        """What its FLOPs are counted from."""
        row = self.row
        return RowFacts(len(row.input_ids), len(row.targets), self.pictures, count_pairs(row.nodes))


def make_micro(
    sizes: Sizes,
    records: int = 5,
    *,
    text: int = 242,
    answer: int = 120,
    pictures: bool = True,
    one: bool = False,
    share: bool = True,
    seed: int = 0,
) -> Micro:
    """Records of LLaVA-1.5's lengths in one row, behind a system prompt of 40 tokens.

    Args:
        one: all records ask about one picture. share: beginnings that are alike run once.
    """
    draw = torch.Generator().manual_seed(seed)
    text, answer, system = (max(n // sizes.shorter, 2) for n in (text, answer, 40))
    vocab = min(sizes.big.vocab, sizes.mid.vocab)
    start = torch.randint(1, vocab, (system,), generator=draw).tolist()
    samples = []
    for record in range(records):
        words = torch.randint(1, vocab, (text,), generator=draw).tolist()
        ids = (*start, *((-1,) if pictures else ()), *words)
        weights = (*[0.0] * (len(ids) - answer), *[1.0] * answer)
        shown: dict[str, Any] = {}
        if pictures:
            shown = {"images": ("picture" if one else f"picture {record}",), "widths": (sizes.tokens,)}
        samples.append(Sample(ids, weights, record=record, **shown))
    row = build_row(samples, share=share)
    spread = Spread(1, torch.arange(sizes.tokens))
    batch = to_micro_batch(row, spreads=dict.fromkeys(row.images, spread), tokens=sizes.tokens if pictures else 0)
    tensors, count = dict(batch.tensors), len(batch.image_keys)
    if count:
        side = sizes.tower["image_size"]
        tensors["pixels"] = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)
    return Micro(tensors, row, count)


def needed_flops(sizes: Sizes, micros: Sequence[Micro], mode: str, **options: Any) -> float:
    """FLOPs that a step needs, as the dry run of a training counts them: nothing recomputed."""
    vlm = make_vlm(sizes, sizes.big, device=torch.device("meta"), empty=True)
    tune(vlm, mode, **options)
    rates = measure_rates(vlm)
    return sum(sum(kinds.values()) for m in micros for kinds in rates.flops(m.facts).values())


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    verdict: str  # OK, FAIL, INFO or SKIP
    numbers: str = ""
    expected: str = ""


@dataclass(frozen=True)
class Bench:
    """Where it runs, how large, and the device's peak in FLOP/s."""

    device: torch.device
    sizes: Sizes
    peak: float

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what is queued."""
        if self.cuda:
            torch.cuda.synchronize()

    def sent(self, micro: Micro) -> dict[str, Any]:
        """The arguments on the device."""
        return Upload(self.device)(micro.tensors)

    def model(self, *, pictures: bool = True) -> VLM:
        """The model of the checks: grouped-query attention, bf16."""
        return make_vlm(self.sizes, self.sizes.mid, device=self.device, pictures=pictures)

    def engine(self, vlm: VLM, groups: Any) -> TorchEngine:
        """As a run in bf16 has it."""
        return TorchEngine(vlm, groups, device=self.device, precision="bf16")


def verdict(fine: bool) -> str:
    """OK or FAIL."""
    return "OK" if fine else "FAIL"


def run_steps(bench: Bench, engine: Any, micros: Sequence[Micro]) -> list[float]:
    """A step on each of the rows; mean losses."""
    losses = []
    for micro in micros:
        given = bench.sent(micro)
        loss = engine.forward_backward(given, scale=1 / len(micro.row.targets), last=True)
        engine.step(1.0)
        losses.append(float(loss.mean()))
    return losses


@torch.no_grad()
def answers(vlm: VLM, micro: Micro, new: int, device: torch.device) -> tuple[list[list[int]], float, float]:
    """Greedy answers to the row's records, and seconds of prefill and decoding."""
    vlm.eval()
    able = decoding.support(vlm.llm)
    given = Upload(device)(micro.tensors)
    images = ("image_positions", "image_index", "image_tokens")
    seen = vlm.encode_images(given["pixels"]) if "pixels" in given else None
    ids = given["input_ids"]
    embeddings = vlm.embed(ids, **{k: given[k] for k in images}, features=seen)
    inner = set(micro.row.nodes[:, 2].tolist())
    ends = [a + n - 1 for i, (a, n, _) in enumerate(micro.row.nodes.tolist()) if i not in inner]
    row = decoding.Prompts(embeddings, given["positions"], micro.row.nodes, torch.tensor(ends, device=device))
    begin = time.perf_counter()
    state = decoding.prefill(vlm.llm, [row], support=able)
    float(state.logits.sum())  # waits
    middle = time.perf_counter()
    made = decoding.decode(vlm.llm, state, limits=[new] * len(ends), end_ids=())
    return made, middle - begin, time.perf_counter() - middle
