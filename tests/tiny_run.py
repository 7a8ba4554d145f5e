"""A whole run in miniature: a tokenizer folder, pictures, records and a config of tiny random models."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import PIL.Image
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from mmit.config import Config
from mmit.records import Image, Record, Text, Turn, write_jsonl
from tests.data.small_tokenizers import byte_level

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}
# What every test of resuming trains with: dropout draws random numbers, and puts modules of PEFT in train mode.
DROPOUT = {"llm": {"mode": "lora", "lr": 1e-2, "options": {"r": 4, "dropout": 0.1}}}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a small byte-level tokenizer with a ChatML template; the same object at every call."""
    tokenizer = _chatml()
    tokenizer.save_pretrained(folder)
    return tokenizer


@functools.cache
def _chatml() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


@functools.cache
def _vocabulary(tokenizer: str) -> int:
    """Number of tokens of a tokenizer.json, those that were added among them."""
    return tokenizers.Tokenizer.from_str(tokenizer).get_vocab_size()


def write_records(folder: Path, *, count: int = 12, text_only: int = 4) -> Path:
    """Write pictures of one colour, two questions each, and some text-only records."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        colour = list(COLOURS)[i % len(COLOURS)]
        path = folder / f"{i}.png"
        PIL.Image.new("RGB", (20 + i, 24), COLOURS[colour]).save(path)
        turns = (
            Turn("user", (Image(str(path)), Text("What color is it?"))),
            Turn("assistant", (Text(colour),)),
            Turn("user", (Text(f"Is it {colour}?"),)),
            Turn("assistant", (Text("yes"),)),
        )
        records.append(Record(turns, id=f"picture-{i}"))
    for i in range(text_only):
        records.append(Record.triple(f"Say the number {i}.", f"It is {i}.", id=f"text-{i}"))
    write_jsonl(records, folder / "train.jsonl")
    captions = [
        Record((r.turns[0].__class__("user", (r.images[0],)), r.turns[1]), id=r.id) for r in records if r.images
    ]
    write_jsonl(captions, folder / "captions.jsonl")
    return folder / "train.jsonl"


def two_layers(folder: Path, **sections: dict[str, Any]) -> Config:
    """Build `tiny_config` for tests that compare numbers of two runs: what passes between layers is part of it."""
    return tiny_config(folder, layers=2, **sections)


def tiny_config(folder: Path, *, layers: int = 1, **sections: dict[str, Any]) -> Config:
    """Build the config of a run under `folder`; `sections` update its sections key by key.

    One layer of the LLM is enough for what a run does around its model, and a fifth cheaper than two.
    """
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        write_tokenizer(tokenizer)
    data = folder / "data" / "train.jsonl"
    if not data.exists():
        write_records(folder / "data")
    llama = {
        "model_type": "llama",
        "vocab_size": _vocabulary((tokenizer / "tokenizer.json").read_text()),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    clip = {
        "model_type": "clip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    raw: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "vision": {"kind": "hf", "name": str(write_vision(folder / "vision", clip)), "fit": "resize"},
            "projector": {"kind": "mlp", "options": {"depth": 2}},
            "llm": {"name": str(tokenizer), "random_init": llama},
        },
        "tune": {"projector": {"mode": "full", "lr": 1e-2}, "llm": {"mode": "lora", "lr": 1e-2, "options": {"r": 4}}},
        "data": {"train": [{"path": str(data)}], "max_length": 128, "pack_tokens": 160, "workers": 0},
        "train": {"steps": 6, "rows_per_step": 2, "precision": "fp32"},
        "device": "cpu",
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return Config.from_dict(raw)


def write_vision(folder: Path, options: dict[str, Any]) -> Path:
    """Save a tiny random CLIP vision model, once."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        for name, data in _vision_files(json.dumps(options)).items():
            (folder / name).write_bytes(data)
    return folder


@functools.cache
def _vision_files(options: str) -> dict[str, bytes]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = {k: v for k, v in json.loads(options).items() if k != "model_type"}
    with tempfile.TemporaryDirectory() as folder:
        CLIPVisionModel(CLIPVisionConfig(**config)).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
