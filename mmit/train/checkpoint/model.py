"""Checkpoints: folders that describe themselves; `folders.py` makes them appear whole and verifies them.

Owns the layout and the way back into a model. Everything mmit writes is safetensors, JSON or YAML; DeepSpeed's
optimizer shards are its own format and are only read from a folder whose manifest verifies. Frozen base weights are
referenced by the config, and copied in only on request.

    step-000200/
      manifest.json          written last: {"format", "files": {name: {"size", "sha256"}}}
      config.yaml            the resolved config of the run
      mmit.json              step, chat format, image preparation, versions
      projector.safetensors  adapter/ (PEFT layout)  tokenizer/
      llm/  vision.safetensors      only where they were trained, or with include_base
      vision/                       of imported and whole models: a tower of kind hf as a folder, with its config
      llm_tuned.safetensors  vision_tuned.safetensors  vision_adapter/   where a method trains a part of them
      trainer/               step, optimizer, random states
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import mmit
from mmit.config import Config, VisionConfig
from mmit.data.chat import ChatFormat
from mmit.errors import CheckpointError, ConfigError
from mmit.models.assemble import assemble, with_own_towers, without_weights
from mmit.models.intrinsic import HASH
from mmit.models.llm import bring_adapters, multiplied_out, usable_device, why_not_4bit
from mmit.models.partition import gathered, shape
from mmit.models.tuning import apply_tuning, base_name, is_added, method_of, quantization, unquantised
from mmit.models.tuning.lora import put_adapter, quietly
from mmit.models.virtual import PROMPT
from mmit.plugins import refuse_own_code
from mmit.precision import fast_half
from mmit.train.checkpoint.folders import FORMAT, MANIFEST, checkpoints, find, newest, staying, verify, write_folder
from mmit.yamlio import parse_yaml

if TYPE_CHECKING:
    from mmit.models.vision import VisionTower
    from mmit.models.vlm import VLM

__all__ = [
    "MANIFEST",
    "LargeLLM",
    "Loaded",
    "checkpoints",
    "find",
    "image_preparation",
    "load_model",
    "newest",
    "read_config",
    "read_weights",
    "verify",
    "write_folder",
    "write_model",
]


@dataclass
class Loaded:
    """A model with all that a checkpoint says of it: what `load_model` reads and `write_model` writes."""

    vlm: VLM
    tokenizer: Any
    chat: ChatFormat
    image: dict[str, Any]  # see `image_preparation`; {} for a text-only model
    folder: Path
    meta: dict[str, Any]  # mmit.json
    config: Config
    notes: list[str] = field(default_factory=list)  # what was decided while loading, in words


def image_preparation(tower: VisionTower | None, vision: VisionConfig | None) -> dict[str, Any]:
    """How a picture is brought to the tower: the arguments of `ImagePreparation` that do not follow from the VLM.

    Keys size [H, W], mode, interpolation and fill; tiles where pictures are cut into tiles; native where they keep
    their size. Raises ConfigError for a fit that the tower does not take.
    """
    if tower is None or vision is None:
        return {}
    if (tower.native is None) == (vision.fit == "native"):
        takes = "one size" if tower.native is None else "any size"
        remedy = "set model.vision.fit=" + ("pad, resize, crop or a tiling" if tower.native is None else "native")
        raise ConfigError(f"fit is {vision.fit}, and this vision encoder takes pictures of {takes}", remedy=remedy)
    if tower.native is not None:
        size = list(tower.image_size)
        common = {"size": size, "mode": vision.fit, "interpolation": tower.interpolation, "fill": [0, 0, 0]}
        return {**common, "native": tower.native} | ({"tiles": vision.tiles} if vision.tiles else {})
    tiled = vision.fit in ("any_resolution", "dynamic")
    # The mean colour, rounded down; black around tiles. Both as LLaVA and transformers do.
    fill = [0, 0, 0] if tiled else [int(255 * m) for m in tower.mean]
    found: dict[str, Any] = {
        "size": list(tower.image_size),
        "mode": vision.fit,
        "interpolation": tower.interpolation,
        "fill": fill,
    }
    return {**found, "tiles": vision.tiles} if tiled or vision.tiles else found


def write_model(folder: Path, model: Loaded, *, step: int, include_base: bool = False, merged: bool = False) -> None:
    """Write everything but the trainer's state (see the module docstring).

    Args:
        folder: exists; a draft of `write_folder`.
        model: its vlm is of plain weights or gathered ones; under ZeRO-3 the caller gathers what is written. Where it
            was read from does not matter: `image` and `meta` are made anew.
        step: that the weights are of.
        include_base: the base weights too, so that the checkpoint refers to nothing outside.
        merged: adapters were folded into them; see `no_untuned`.

    Raises:
        CheckpointError: the base of a PiSSA or OLoRA adapter is to be written.
    """
    vlm, config = model.vlm, model.config
    (folder / "config.yaml").write_text(config.to_yaml())
    meta = {
        "format": FORMAT,
        "step": step,
        "chat": model.chat.to_json(),
        "image": image_preparation(vlm.vision, config.model.vision),
        "image_tokens": vlm.image_tokens,
        "versions": {"mmit": mmit.__version__, "torch": torch.__version__},
        **({"merged": True} if merged else {}),
    }
    (folder / "mmit.json").write_text(json.dumps(meta, indent=1))
    # Always, though the base has one: its ids are what the weights were trained on, and a hub's repository may change.
    model.tokenizer.save_pretrained(folder / "tokenizer")
    if vlm.projector is not None:
        save_file(_state(vlm.projector), folder / "projector.safetensors")
    if isinstance(vlm.llm, PeftModel):
        # What the config says, not where the base was loaded from, which may be a cache of this machine.
        for adapter in vlm.llm.peft_config.values():
            adapter.base_model_name_or_path = config.model.llm.name
        # The embeddings belong to the base; peft would otherwise ask the base's folder about its vocabulary.
        vlm.llm.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    if vlm.vision is not None and isinstance(vlm.vision.encoder, PeftModel):
        vlm.vision.encoder.save_pretrained(str(folder / "vision_adapter"))
    # Methods that train single parameters of a part: these alone are written, its base is referenced.
    for part, names in vlm.tuned_names.items():
        tensors = {n: getattr(vlm, part).get_parameter(n).detach().cpu().contiguous() for n in names}
        save_file(tensors, folder / f"{part}_tuned.safetensors")
    if "llm" in vlm.whole_parts or include_base:
        _refuse_residual(vlm.llm)
        _base_llm(vlm).save_pretrained(folder / "llm", state_dict=_plain_state(_base_llm(vlm)))
    if vlm.vision is not None and ("vision" in vlm.whole_parts or include_base):
        tower = {k: v.detach().cpu().contiguous() for k, v in _tower_state(vlm.vision).items()}
        save_file(tower, folder / "vision.safetensors")


def _refuse_residual(llm: Any) -> None:
    """PiSSA and OLoRA take the adapter out of the base; a base stored like that would lose it twice."""
    configs = llm.peft_config.values() if isinstance(llm, PeftModel) else ()
    if any(getattr(c, "init_lora_weights", True) in ("pissa", "olora") for c in configs):
        raise CheckpointError(
            "the base of a PiSSA or OLoRA adapter cannot be stored beside it",
            where="tune.llm.options.init",
            remedy="merge the adapter first (mmit merge), or use init: true",
        )


def _tower_state(tower: VisionTower) -> dict[str, torch.Tensor]:
    """The encoder's own tensors under their own names, adapters left out; they share memory with the tower."""
    if not isinstance(tower.encoder, PeftModel):
        return tower.state_dict()
    inner = tower.encoder.get_base_model()
    return {f"encoder.{base_name(k)}": v for k, v in inner.state_dict().items() if not is_added(inner, k)}


def _base_llm(vlm: VLM) -> Any:
    return vlm.llm.get_base_model() if isinstance(vlm.llm, PeftModel) else vlm.llm


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def _plain_state(llm: Any) -> dict[str, torch.Tensor]:
    """The base model's own tensors under their own names, adapters left out."""
    return {base_name(k, llm): v for k, v in llm.state_dict().items() if not is_added(llm, k)}


@torch.no_grad()
def read_weights(vlm: VLM, folder: Path) -> None:
    """Put the tensors of a verified checkpoint into a composite that was built from its config.

    Raises CheckpointError when tensors are missing, left over or of another shape.
    """
    if vlm.projector is not None:
        strict(vlm.projector, load_file(folder / "projector.safetensors"), folder / "projector.safetensors")
    _read_tower(vlm, folder)
    for part in ("llm", "vision"):
        if (folder / f"{part}_tuned.safetensors").exists():
            _read_partly(vlm, part, folder / f"{part}_tuned.safetensors")
    if (folder / "adapter").exists():
        vlm.llm = _read_adapter(vlm.llm, folder / "adapter")
    if (folder / "vision_adapter").exists() and vlm.vision is not None:
        vlm.vision.encoder = _read_adapter(vlm.vision.encoder, folder / "vision_adapter")


@torch.no_grad()
def _read_tower(vlm: VLM, folder: Path) -> None:
    """Copy the encoder's own tensors where the checkpoint holds them all. Raises CheckpointError."""
    path = folder / "vision.safetensors"
    if vlm.vision is None or not path.exists():
        return
    tensors, own = load_file(path), _tower_state(vlm.vision)
    compare(own, tensors, path)
    for name, tensor in tensors.items():  # they share memory with the tower, under an adapter too
        own[name].copy_(tensor)
    vlm.whole_parts.add("vision")


def _read_partly(vlm: VLM, part: str, path: Path) -> None:
    """Copy tensors of single parameters; the model must have been tuned with the checkpoint's own method."""
    tensors = load_file(path)
    expected = {n: getattr(vlm, part).get_parameter(n) for n in vlm.tuned_names.get(part, ())}
    if expected.keys() != tensors.keys():
        raise CheckpointError(
            f"holds tensors of another tuning method than this config has for {part}, such as {min(tensors)}",
            where=str(path),
            remedy=f"set tune.{part} as in the config.yaml beside it",
        )
    compare(expected, tensors, path)
    for name, tensor in tensors.items():
        # Under ZeRO-3 each rank has a part: gathered for the copy, and the change divided again at the end of the
        # block.
        with gathered(expected[name], changed=True):
            if name == f"{PROMPT}.{HASH}" and not torch.equal(expected[name].detach().cpu().float(), tensor.float()):
                raise CheckpointError(
                    "holds the numbers of a point in another subspace than tune.llm.options.subspace names",
                    where=str(path),
                    remedy="put the subspace back that the run was trained with",
                )
            expected[name].copy_(tensor)


def _read_adapter(model: Any, adapter: Path) -> PeftModel:
    # A config that trains no adapter (frozen) makes none, and the checkpoint brings its own.
    if not isinstance(model, PeftModel):
        with quietly():
            model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    compare(expected, tensors, adapter / "adapter_model.safetensors")
    bring_adapters(model, tensors)
    put_adapter(model, tensors)
    return model


def compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raise CheckpointError where tensors are missing, left over or of another shape."""
    # All three kinds at once: a name that is missing and one that is left over are most often the same tensor renamed.
    problems = [f"missing {k}" for k in expected if k not in found]
    problems += [f"left over {k}" for k in found if k not in expected]
    problems += [
        f"{k} is {tuple(found[k].shape)}, the model has {tuple(shape(expected[k]))}"
        for k in expected
        if k in found and found[k].shape != shape(expected[k])
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"does not fit the model: {'; '.join(problems[:3])}{more}",
            where=str(where),
            remedy="load it with the config it was made with (config.yaml beside it)",
        )


def strict(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Load all of a module's tensors; see `compare`."""
    compare(module.state_dict(), tensors, where)
    module.load_state_dict(dict(tensors))


def read_config(folder: Path) -> Config:
    """The resolved config of a checkpoint."""
    path = folder / "config.yaml"
    raw, _ = parse_yaml(path.read_text(encoding="utf-8"), where=str(path))
    return Config.from_dict(raw, where=str(path))


def own_code(config: Config, meta: Mapping[str, Any]) -> dict[str, object]:
    """What decides which code a checkpoint is loaded with: {config key: value}."""
    model, tune = config.model, config.tune
    named: dict[str, object] = {"model.projector.kind": model.projector.kind, "tune.llm.mode": tune.llm.mode}
    if model.vision is not None:
        named["model.vision.kind"] = model.vision.kind
        named |= {f"model.vision.towers.{n}.kind": tower.kind for n, tower in enumerate(model.vision.towers)}
    # A template is data, which is rendered in a sandbox; only a format by its name may be code of the user's own.
    named["model.chat.format"] = meta.get("chat", {}).get("name") if "template" not in meta.get("chat", {}) else None
    return named


def chat_date(folder: Path | None) -> str | None:
    """The day that a checkpoint's chat template gives; None if it asks for none, or without a checkpoint."""
    if folder is None:
        return None
    return json.loads((folder / "mmit.json").read_text(encoding="utf-8"))["chat"].get("date")


@contextmanager
def _placed(device_map: Any) -> Iterator[None]:
    """Explain what tuning methods cannot do with weights that a device map took off."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if device_map is None:
            raise
        raise CheckpointError(
            f"its tuning method needs weights that the device map took off: {str(error).splitlines()[0]}",
            where="device_map",
            remedy="merge it first (mmit merge) and load that, or keep the LLM on devices and cpu",
        ) from error


@dataclass(frozen=True)
class LargeLLM:
    """How an LLM is loaded that would not fit as it is.

    Args:
        device_map, offload: its placement, see `models.llm.load_llm`.
        bits: fewer bits, see `models.llm.fewer_bits`.
    """

    device_map: str | dict[str, Any] | None = None
    offload: str | None = None
    bits: Mapping[str, Any] | None = None


def load_model(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | Literal["fast"] | None = None,
    large: LargeLLM = LargeLLM(),
    untuned: bool = False,
    plain: bool = False,
    allow_code: bool = False,
) -> Loaded:
    """Read a model for use.

    Args:
        folder: a checkpoint, or a run (its newest whole checkpoint is taken).
        device: "auto", "cpu", "cuda" or "cuda:N"; ignored for the LLM where a device map places it.
        dtype: number format; None as trained. "fast" takes float32 in place of bf16 where the device computes that
            faster, unless fewer bits or a device map were asked for because of its memory; weights keep their values.
        large: placement and bits of the LLM.
        untuned: the model as it was before training (base weights, freshly drawn projector), for comparison.
        plain: multiply the 4-bit weights of a QLoRA run out, once they are loaded: the same function on weights that
            can be merged and written; its config then says lora.
        allow_code: import the modules that the checkpoint names for parts of the user's own (see `mmit.plugins`).

    Raises:
        CheckpointError: nothing there, not whole, or it names code without `allow_code`.
        ModelError: a base it refers to cannot be loaded. ConfigError: no such device.
    """
    place = usable_device(device)
    path = find(folder)
    with staying(path):
        return _load(path, place, dtype, large=large, untuned=untuned, plain=plain, allow_code=allow_code)


def _load(
    path: Path,
    place: torch.device,
    dtype: torch.dtype | Literal["fast"] | None,
    *,
    large: LargeLLM,
    untuned: bool,
    plain: bool,
    allow_code: bool,
) -> Loaded:
    config = read_config(path)
    meta = json.loads((path / "mmit.json").read_text())
    refuse_own_code(own_code(config, meta), where=str(path), allowed=allow_code)  # before anything of it is imported
    model = _sections(config, path, untuned=untuned)
    number_format, notes = _number_format(config, dtype, large, place)
    if isinstance(dtype, torch.dtype) or notes:  # what the config says of parts gives way to what is asked for here
        for part in filter(None, (model["llm"], model["vision"])):
            part["dtype"] = None
    four_bits = None if untuned or large.bits is not None else _four_bits(config)
    device_map = large.device_map
    if large.bits is not None:  # quantized while they are loaded; weights of 8 bits cannot be moved afterwards
        device_map = device_map or {"": str(place)}
    bits = large.bits or four_bits
    placed: dict[str, Any] = {"device_map": device_map, "offload": large.offload, "quantization": bits}
    same: dict[str, Any] = {"seed": config.run.seed, "packed": config.data.packing is not False}
    vlm, tokenizer = assemble(model, dtype=number_format, **placed, **same, tokenizer=str(path / "tokenizer"))
    if plain and four_bits is not None:
        vlm.llm, four_bits = multiplied_out(vlm.llm, number_format), None  # type: ignore[arg-type]
        tune = {**config.tune.model_dump(), "llm": unquantised(config.tune.llm.model_dump())}
        config = Config.from_dict({**config.model_dump(), "tune": tune})
    if (path / "llm").exists():
        vlm.whole_parts.add("llm")
    if untuned and _holds_untuned_tower(config, path):
        _read_tower(vlm, path)
    if not untuned:
        with _placed(device_map):
            _tune(vlm, config, path, unquantized=four_bits is None)
    _ready(vlm, None if device_map is not None else place)
    chat = ChatFormat.from_json(meta["chat"], tokenizer)
    return Loaded(vlm, tokenizer, chat, meta["image"], path, meta, config, notes)


def no_untuned(path: Path) -> str:
    """Why the model as it was before training cannot be loaded from a checkpoint; empty where it can."""
    if json.loads((path / "mmit.json").read_text()).get("merged"):
        return "merged: the weights before training are not in the folder"
    if _bare_tower(path) and not _holds_untuned_tower(read_config(path), path):
        return "the encoder is in the folder, and its weights before training are not"
    return ""


def _bare_tower(path: Path) -> bool:
    """Whether vision/ says how the encoder is built and holds no weights: an export has all of them in one file."""
    own = path / "vision"
    return own.is_dir() and not any(own.rglob("*.safetensors")) and not any(own.rglob("*.bin"))


def _holds_untuned_tower(config: Config, path: Path) -> bool:
    """Whether the weights of an export's encoder are those before training: frozen, or beside an adapter."""
    merged = json.loads((path / "mmit.json").read_text()).get("merged")
    return not merged and _bare_tower(path) and config.tune.vision.mode in ("frozen", "lora")


def _sections(config: Config, path: Path, *, untuned: bool) -> dict[str, Any]:
    """The section `model` with the parts that the checkpoint itself holds in place of those it was made from."""
    model = config.model.model_dump()
    # Tuned as a whole, the LLM in the checkpoint is the tuned one; beside an adapter it is the base (include_base).
    if (path / "llm").exists() and not (untuned and method_of(config.tune.llm.mode).whole):
        model["llm"].update(name=str(path / "llm"), revision=None, random_init=None)
    model["vision"] = model["vision"] and with_own_towers(model["vision"], path)
    held = model["vision"] and (path / "vision.safetensors").exists()
    held = held and (not untuned or _holds_untuned_tower(config, path))
    if held and model["vision"]["kind"] != "open_clip":  # whose weights decide how pictures are normalised
        model["vision"] = without_weights(model["vision"])  # all of the tower is read by `_read_tower`
    return model


def _number_format(
    config: Config, asked: torch.dtype | Literal["fast"] | None, large: LargeLLM, place: torch.device
) -> tuple[torch.dtype, list[str]]:
    """The number format to load in, and a note where it is not the one that was trained in."""
    if isinstance(asked, torch.dtype):
        return asked, []
    trained = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    if asked == "fast" and large.device_map is None and large.bits is None and trained != torch.float32:
        fast, why = fast_half(place, "bf16")
        if not fast:
            return torch.float32, [f"trained in {config.train.precision}, loaded in fp32: {why}"]
    return trained, []


def _four_bits(config: Config) -> dict[str, Any] | None:
    """How a QLoRA run's base is quantized, where this machine can; elsewhere its adapter goes on the plain weights."""
    found = quantization(config.tune.llm.mode, config.tune.llm.options)
    if found is not None and (reason := why_not_4bit()) is not None:
        warnings.warn(f"{reason}; the base of this QLoRA checkpoint is loaded unquantised", stacklevel=3)
        return None
    return found


def _tune(vlm: VLM, config: Config, path: Path, *, unquantized: bool) -> None:
    tune = config.tune.model_dump()
    if unquantized:
        tune["llm"] = unquantised(tune["llm"])
    apply_tuning(vlm, tune, to_train=False)  # first: the weights belong to modules that the methods add
    read_weights(vlm, path)


def _ready(vlm: VLM, place: torch.device | None) -> None:
    """Set a model up for use: frozen, in evaluation mode, on its device; None where a device map placed the LLM."""
    vlm.eval().requires_grad_(False)
    if vlm.vision is not None:
        vlm.vision.freeze()
    if place is not None:
        vlm.to(place)
        return
    for part in (vlm.vision, vlm.projector):  # beside the LLM's embeddings, whose place the device map chose
        if part is not None:
            part.to(vlm.device)
