"""Further adapters on a base that is loaded already: checkpoints of several runs that share one LLM and one tower.

In: a composite, the checkpoint it came from, and another checkpoint. Out: a composite of the same LLM and tower with
the other's adapter and projector. Refuses a checkpoint of another base, and one that holds more than an adapter and a
projector: its weights cannot be exchanged between two steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from mmit.data.chat import ChatFormat
from mmit.errors import CheckpointError
from mmit.models.assemble import projector_for
from mmit.models.tuning.fused_lora import fuse_lora
from mmit.models.tuning.lora import put_adapter, quietly
from mmit.models.vlm import VLM
from mmit.plugins import refuse_own_code
from mmit.train.checkpoint.folders import find
from mmit.train.checkpoint.model import Loaded, compare, own_code, read_config, strict

if TYPE_CHECKING:
    from peft import PeftConfig

    from mmit.config import Config

ALONE = "serve it by itself, merged or not (mmit merge)"
# What a checkpoint holds where more than an adapter and a projector was trained.
MORE = ("llm", "llm_tuned.safetensors", "vision.safetensors", "vision_tuned.safetensors", "vision_adapter")


def read_further(vlm: VLM, base: Path, folder: str | Path, *, name: str, tokenizer: Any) -> Loaded:
    """Read a checkpoint's adapter onto the LLM of a composite, beside those it has.

    Args:
        vlm: the composite. base: the checkpoint it was loaded from.
        folder: the other checkpoint, or a run. name: what PEFT is to call its adapter; without dots.
        tokenizer: of the composite.

    Raises:
        CheckpointError: of another base, with more than an adapter and a projector, or not whole.
    """
    path = find(folder)
    config, own = read_config(path), read_config(base)
    meta = json.loads((path / "mmit.json").read_text(encoding="utf-8"))
    refuse_own_code(own_code(config, meta), where=str(path), allowed=False)
    # Configs are compared, not weights: that would mean to read the base once more for each adapter.
    _check_same_base(path, config, base, own)
    described = json.loads((path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    _check_apart(described, path)
    # PEFT does not combine adapters of different kinds in one model.
    if isinstance(vlm.llm, PeftModel):
        for before in vlm.llm.peft_config.values():
            _check_apart(_facts(before), base)
            if (kind := getattr(before.peft_type, "value", before.peft_type)) != described["peft_type"]:
                problem = f"its adapter is {described['peft_type']}, and the base has one of {kind}"
                raise CheckpointError(problem, where=str(path), remedy=ALONE)
    projector = None
    if vlm.projector is not None and vlm.vision is not None:
        weight, width = next(vlm.projector.parameters()), vlm.word_embeddings.shape[1]
        projector = projector_for(vlm.vision, llm_dim=width, model=config.model.model_dump())
        projector.to(weight.device, weight.dtype)
        strict(projector, load_file(path / "projector.safetensors"), path / "projector.safetensors")
    llm = _beside(vlm.llm, path / "adapter", name)
    made = VLM(llm, vision=vlm.vision, projector=projector, padded=vlm.padded)
    made.eval().requires_grad_(False)
    return Loaded(made, tokenizer, ChatFormat.from_json(meta["chat"], tokenizer), meta["image"], path, meta, config)


def _check_same_base(path: Path, config: Config, base: Path, own: Config) -> None:
    for part in ("llm", "vision"):
        mine, theirs = (c.model.model_dump()[part] or {} for c in (config, own))
        # These change no weight that an adapter sits on.
        for key in ("dtype", "attention_dropout", "cache", "cache_dir"):
            mine.pop(key, None)
            theirs.pop(key, None)
        different = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        if different:
            key = different[0]
            problem = f"model.{part}.{key} is {mine.get(key)!r}, that of the base {base} is {theirs.get(key)!r}"
            raise CheckpointError(problem, where=str(path), remedy="an adapter answers on its own base: " + ALONE)
    for folder in (path, base):
        if more := [name for name in MORE if (folder / name).exists()]:
            problem = f"holds {more[0]}: more was trained than an adapter and a projector"
            raise CheckpointError(problem, where=str(folder), remedy=ALONE)
    if not (path / "adapter").exists():
        raise CheckpointError("holds no adapter of the LLM", where=str(path), remedy=ALONE)
    # One tokenizer encodes for all adapters of a base.
    files = [folder / "tokenizer" / "tokenizer.json" for folder in (path, base)]
    if [file.exists() and file.read_bytes() for file in files] != [files[0].exists() and files[0].read_bytes()] * 2:
        raise CheckpointError(f"its tokenizer is not that of the base {base}", where=str(path), remedy=ALONE)


def _facts(config: PeftConfig) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in ("bias", "init_lora_weights")}


def _check_apart(described: dict[str, Any], path: Path) -> None:
    """Refuse adapters that change the weights they sit on."""
    for key, changes in (("bias", ("all", "lora_only")), ("init_lora_weights", ("pissa", "olora"))):
        if described.get(key) in changes:
            problem = f"the adapter has {key} {described[key]!r}, which changes weights of the base"
            raise CheckpointError(problem, where=str(path), remedy=ALONE)


def _beside(llm: Any, adapter: Path, name: str) -> PeftModel:
    with quietly():
        if isinstance(llm, PeftModel):
            llm.load_adapter(str(adapter), adapter_name=name, autocast_adapter_dtype=False)
        else:
            llm = PeftModel.from_pretrained(llm, str(adapter), adapter_name=name, autocast_adapter_dtype=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    compare(
        get_peft_model_state_dict(llm, adapter_name=name, save_embedding_layers=False),
        tensors,
        adapter / "adapter_model.safetensors",
    )
    put_adapter(llm, tensors, name)
    fuse_lora(llm)
    return llm
