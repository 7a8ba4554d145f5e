"""Steps, resumes and answers on fake CUDA tensors; run as a process of its own with the hooks preloaded.

    LD_PRELOAD=hooks.so python -m tests.fake_cuda.cases step lora

Prints one JSON: what the case asked of the device, see `Traffic`, or {"error": ...} where fake tensors refused it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import DynamicCache

from mmit.data.loader import to_micro_batch
from mmit.data.packing import Sample, build_row
from mmit.data.preparation import Spread
from mmit.models import attention, attention_plan, decoding
from mmit.models.calls import RowInputs
from mmit.models.intrinsic import find_subspace, write_subspace
from mmit.models.llm import load_llm
from mmit.models.planning import row_planner
from mmit.models.prefix_cache import Before
from mmit.models.projectors import build_projector
from mmit.models.sampling import Sampling, choose
from mmit.models.tuning import Group, apply_tuning, fused_lora
from mmit.models.virtual import with_prompt
from mmit.models.vision import build_vision
from mmit.models.vlm import VLM
from mmit.train.engines.torch_engine import TorchEngine
from tests.fake_cuda.traffic import OURS, Traffic, to_fake_cuda, tolist

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = 4  # image tokens of such a tower
Planted = Callable[[VLM], None]
PLANNED: list[str] = []  # the parts of plans that were made, in their order


class Placed(nn.Module):
    """A model that lies where it computes; an engine's `to` would need numbers to copy."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def to(self, *args: Any, **kwargs: Any) -> Placed:
        return self

    def forward(self, **tensors: Any) -> torch.Tensor:
        return self.vlm(**tensors)


def attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Attention written out, as torch's own function does where it has no kernel; that one would ask the driver."""
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]


@contextmanager
def simulated(nodes: torch.Tensor | None = None) -> Iterator[FakeTensorMode]:
    """A fake H100: its tensors, its capability; plans of attention are made of real numbers, as in a run.

    Args:
        nodes: (K, 3) in the place of those that a fake soft prompt has moved, which have no numbers.
    """

    def real(name: str) -> Callable[..., Any]:
        make = getattr(attention_plan, name)

        def made(*given: Any) -> Any:
            PLANNED.append(name)
            with _disable_current_modes():
                return make(*given)

        return made

    def numbers(tensor: torch.Tensor) -> Any:
        if nodes is None or not isinstance(tensor, FakeTensor) or tensor.shape != nodes.shape or tensor.is_cuda:
            return tolist(tensor)
        with _disable_current_modes():
            return tolist(nodes)

    torch.autograd.set_multithreading_enabled(False)  # a thread of its own for the device would not see the modes
    with ExitStack() as stack:
        for owner, name, value in (
            *((attention_plan, name, real(name)) for name in ("make_buckets", "make_segments")),
            (torch.nn.functional, "scaled_dot_product_attention", attended),
            # A fake parameter is of a class of its own, which the fused path takes for one that does more.
            (fused_lora, "_plain", lambda module: type(module) is nn.Linear),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
            (torch.Tensor, "tolist", numbers),
            (FakeTensor, "tolist", numbers),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield FakeTensorMode(allow_non_fake_inputs=True)


def build(mode: str, options: dict[str, Any], dtype: torch.dtype, *, vision_mode: str = "frozen") -> Any:
    """A composite and its groups on the CPU, tiny, with random weights."""
    llm = load_llm("tiny", dtype=dtype, random_init=LLAMA)
    tower = build_vision("hf", CLIP, weights=False, dtype=dtype)
    made = build_projector("mlp", vision_dim=tower.dim, llm_dim=64, grid=tower.grid, prefix=tower.prefix)
    vlm = VLM(llm, vision=tower, projector=made.to(dtype))
    tune = {
        "vision": {"mode": vision_mode, "lr": None if vision_mode == "frozen" else 1e-4, "options": {}},
        "projector": {"mode": "full", "lr": 1e-3, "options": {}},
        "llm": {"mode": mode, "lr": None if mode == "frozen" else 1e-3, "options": options},
    }
    with tempfile.TemporaryDirectory() as folder:
        if mode == "intrinsic":
            layers, z = find_subspace(torch.randn(3, 4, 64), 2, hidden=0)
            write_subspace(Path(folder), layers, z, tokens=4, facts={})
            options["subspace"] = folder
        return vlm, apply_tuning(vlm, tune)


def row(kind: str) -> tuple[dict[str, Any], int]:
    """Arguments of a forward pass and the number of images: "shared" questions of one image, several, or text."""
    samples = []
    for record in range(3):
        image = [] if kind == "text" else [-1]
        ids = [5, 6, 7, *image, *range(20 + 9 * record, 28 + 9 * record)]
        weights = tuple([0.0] * (len(ids) - 4) + [1.0] * 4)
        name = "a" if kind == "shared" else f"image {record}"
        shown = {"images": (name,), "widths": (TOKENS,)} if image else {}
        samples.append(Sample(tuple(ids), weights, record=record, **shown))  # type: ignore[arg-type]
    built = build_row(samples, share=kind == "shared")
    spread = Spread(1, torch.arange(TOKENS))
    batch = to_micro_batch(built, spreads=dict.fromkeys(built.images, spread), tokens=0 if kind == "text" else TOKENS)
    return batch.tensors, len(batch.image_keys)


def uploaded(tensors: dict[str, Any], images: int, mode: FakeTensorMode) -> dict[str, Any]:
    """The arguments where a run's `Upload` puts them."""
    moved = {
        key: mode.from_tensor(value).to("cuda") if isinstance(value, torch.Tensor) and key != "nodes" else value
        for key, value in tensors.items()
    }
    if images:
        with mode:
            moved["pixels"] = torch.zeros(images, 3, 28, 28, dtype=torch.uint8, device="cuda")
    return moved


def step(
    method: str = "lora",
    *,
    options: dict[str, Any] | None = None,
    kind: str = "shared",
    precision: str = "bf16",
    vision: str = "frozen",
    resume: bool = False,
    plant: Planted | None = None,
) -> dict[str, Any]:
    """Two micro-batches and an optimizer step; with `resume` the states are saved, taken back, and stepped again."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vlm, groups = build(method, dict(options or {}), dtype, vision_mode=vision)
    tensors, images = row(kind)
    width = torch.zeros(len(tensors["input_ids"]), 64)  # a soft prompt stands in front of the row's nodes
    nodes = with_prompt(vlm.llm, width, tensors["positions"], tensors["nodes"], tensors["predict_at"])[2]
    with simulated(nodes) as mode:
        new = to_fake_cuda(vlm, mode)
        groups = [Group(g.name, g.lr, [(n, new[id(p)]) for n, p in g.parameters]) for g in groups]  # type: ignore[misc]
        if plant is not None:
            plant(vlm)
        vlm.train()
        with mode:
            vlm.split()
            engine = TorchEngine(Placed(vlm), groups, device=torch.device("cuda"), precision=precision)
            given = uploaded(tensors, images, mode)
            with _disable_current_modes():
                given["plan"] = row_planner(vlm)(tensors["nodes"])  # as a loader's worker does
            micro, optimizer = Traffic(), Traffic()
            PLANNED.clear()
            with micro:
                engine.forward_backward(given, scale=0.5, last=False)
            planned = list(PLANNED)
            with optimizer:
                engine.forward_backward(given, scale=0.5, last=True)
                before = optimizer.syncs.copy()
                engine.step(1.0)
            if resume:
                saved = [
                    (n, {k: mode.from_tensor(torch.zeros(v.shape)) for k, v in s.items()}) for n, s in engine.states()
                ]
                with optimizer:
                    engine.take_states(iter(saved))
                    engine.forward_backward(given, scale=1.0, last=True)
                before = optimizer.syncs.copy()
                with optimizer:
                    engine.step(1.0)
            places = {
                f"{key} of {m.device}: {value.device}"
                for m, state in engine.optimizer.state.items()
                for key, value in state.items()
            }
    return {
        "kernels": micro.kernels,
        "plans made in the forward pass": planned,
        "syncs of a micro-batch": dict(micro.syncs),
        "blocking copies of a micro-batch": dict(micro.blocking()),
        "syncs of a step": dict(optimizer.syncs - before),
        "mismatches": micro.mismatches + optimizer.mismatches,
        "states": sorted(places),
    }


def answer(sampling: Sampling = Sampling()) -> dict[str, Any]:  # noqa: B008
    """Prefill of prompts that share a beginning, and four tokens of each."""
    llm = load_llm("tiny", dtype=torch.bfloat16, random_init=LLAMA)
    nodes = torch.tensor([[0, 20, -1], [20, 3, 0], [23, 5, 0], [28, 4, 0]])
    ends = [22, 27, 31]
    with simulated() as mode:
        to_fake_cuda(llm, mode)
        llm.eval()
        made = decoding.paths_of(nodes.tolist(), ends)
        with mode:
            embeddings = torch.empty(32, 64, dtype=torch.bfloat16, device="cuda")
            positions = torch.zeros(32, dtype=torch.int64, device="cuda")
            at = torch.zeros(3, dtype=torch.int64, device="cuda")
        able = decoding.Support(batched=True, shared=True)
        first, token = Traffic(), Traffic()
        with torch.no_grad(), mode, patch.object(decoding, "paths_of", lambda *args: made):
            with first:
                state = decoding.prefill(llm, [decoding.Prompts(embeddings, positions, nodes, at)], support=able)
            logits = state.logits
            with token:
                for _ in range(4):
                    with _disable_current_modes():  # the numbers that are drawn are real, on the host
                        uniform = [torch.Generator().manual_seed(n) for n in range(3)]
                    chosen = choose(logits, sampling, uniform)
                    logits = decoding.step(llm, state, chosen)
    each = {place: count / 4 for place, count in token.syncs.items()}
    copies = {place: count / 4 for place, count in token.blocking().items()}
    return {
        "kernels": token.kernels / 4,
        "syncs of a prefill": dict(first.syncs),
        "blocking copies of a prefill": dict(first.blocking()),
        "syncs of a token": each,
        "blocking copies of a token": copies,
        "mismatches": first.mismatches + token.mismatches,
    }


def two_devices() -> dict[str, Any]:
    """Prefill of an LLM whose second half lies on another GPU, as accelerate's `device_map` puts it."""
    llm = load_llm("tiny", dtype=torch.bfloat16, random_init=LLAMA)
    halves = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    halves |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    nodes = torch.tensor([[0, 4, -1], [4, 4, 0], [8, 4, 0]])
    with simulated() as mode:
        for name, number in halves.items():
            to_fake_cuda(llm.get_submodule(name), mode, f"cuda:{number}")
        llm.hf_device_map = halves
        places = {"": torch.device("cuda", 0), **{name: torch.device("cuda", n) for name, n in halves.items()}}
        with patch("accelerate.hooks.set_module_tensor_to_device"):  # the weights are there already
            attach_align_device_hook_on_blocks(
                llm,
                execution_device=places,
                offload=dict.fromkeys(halves, False),
                skip_keys=llm._skip_keys_device_placement,
            )
        with mode:
            embeddings = torch.empty(12, 64, dtype=torch.bfloat16, device="cuda:0")
            positions = torch.zeros(12, dtype=torch.int64, device="cuda:0")
            at = torch.zeros(2, dtype=torch.int64, device="cuda:0")
        seen = Traffic()
        with torch.no_grad(), mode, seen:
            before = Before(0, DynamicCache())
            out = attention.run_row(llm, RowInputs(embeddings, positions, nodes), at=at, before=before)
            vlm = VLM(llm, vision=None, projector=None)
            given: dict[str, Any] = {"positions": positions, "nodes": nodes, "at": at, "ids": None}
            losses = vlm.row_losses(embeddings, targets=torch.zeros_like(at), **given)
    return {
        "losses": str(losses.device),
        "logits": str(out.logits.device),
        "shape": list(out.logits.shape),
        "mismatches": seen.mismatches,
    }


def waits(vlm: VLM) -> None:
    """Plant a look at a number of the device in the projector."""
    assert vlm.projector is not None
    vlm.projector.register_forward_hook(lambda module, args, out: out * (1.0 if out.sum().item() else 2.0))


def copies(vlm: VLM) -> None:
    """Plant a tensor that is made on the host in each forward pass."""
    assert vlm.projector is not None
    vlm.projector.register_forward_hook(lambda module, args, out: out * torch.tensor([2.0], device=out.device))


def strays(vlm: VLM) -> None:
    """Plant an index on another device."""
    assert vlm.projector is not None

    def hook(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out[torch.zeros(len(out), dtype=torch.int64, device="cuda:1")]

    vlm.projector.register_forward_hook(hook)


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4}),
    "lora with dropout": ("lora", {"r": 4, "dropout": 0.1}),
    "dora": ("lora", {"r": 4, "dora": True}),
    "ia3": ("ia3", {}),
    "houlsby": ("houlsby", {}),
    "soft prompt": ("soft_prompt", {}),
    "intrinsic": ("intrinsic", {}),
    "prefix": ("prefix", {}),
    "bitfit": ("bitfit", {"insert_biases": True}),
    "layernorm": ("layernorm", {}),
    "full": ("full", {}),
    "frozen": ("frozen", {}),
}
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: partial(step, method, options=options) for name, (method, options) in METHODS.items()},
    "fp32": partial(step, "lora", options={"r": 4}, precision="fp32"),
    "several images": partial(step, "lora", options={"r": 4}, kind="several"),
    "text": partial(step, "lora", options={"r": 4}, kind="text"),
    "vision encoder": partial(step, "lora", options={"r": 4}, vision="full"),
    "resume": partial(step, "lora", options={"r": 4}, resume=True),
    "resume, fp32": partial(step, "full", precision="fp32", resume=True),
    "answer": answer,
    "sampled": partial(answer, Sampling(temperature=0.7, top_p=0.9, top_k=20)),
    "two devices": two_devices,
    "planted wait": partial(step, "lora", options={"r": 4}, plant=waits),
    "planted copy": partial(step, "lora", options={"r": 4}, plant=copies),
    "planted mismatch": partial(step, "lora", options={"r": 4}, plant=strays),
}

if __name__ == "__main__":
    found: dict[str, Any] = {}
    for name in sys.argv[1:] or CASES:
        try:
            found[name] = CASES[name]()
        except Exception as error:  # noqa: BLE001 # what fake tensors refuse is what is looked for
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if any(name in f.filename for name in OURS)]
            where = [f"{'/'.join(f.filename.split('/')[-2:])}:{f.lineno}" for f in ours[-4:]]
            found[name] = {"error": f"{type(error).__name__}: {error}", "at": where}
    sys.stdout.write(json.dumps(found) + "\n")
