"""Single parts as Hugging Face folders: a vision tower with its preprocessing, an adapter alone, LLaVA's own files.

Goes in: parts of a composite. Comes out: folders that transformers, peft and LLaVA's code load. LLaVA's layouts are
those of its train.py and builder.py (arXiv:2310.03744); no file that needs code to be read is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from PIL.Image import Resampling
from safetensors.torch import save_file
from transformers import AutoConfig, CLIPImageProcessor

from mmit.errors import ModelError
from mmit.models.files import load_tensors
from mmit.models.interop.tensors import complain
from mmit.models.llm import load_llm
from mmit.models.projectors import MLP, Linear
from mmit.models.tuning.lora import quietly
from mmit.models.vision_encoder import Encoder, explained
from mmit.models.vlm import VLM

if TYPE_CHECKING:
    from mmit.models.vision import VisionTower

# model_type of an LLM -> (LLaVA's model_type, its class)
LLAVA_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "mpt": ("llava_mpt", "LlavaMptForCausalLM"),
}


def write_tower(folder: Path, config: Any, tensors: Mapping[str, torch.Tensor], *, image: Mapping[str, Any]) -> None:
    """Write a vision tower for kind hf: config, all its tensors, and how its pictures are normalised.

    Args:
        folder: is made.
        config: of transformers, of the tower alone.
        tensors: {name: tensor} with the names of the tower.
        image: size, interpolation, mean and std.
    """
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    # CLIP's and SigLIP's classes keep the tower in an attribute, DINOv2's are the tower themselves.
    prefix = "" if config.model_type.startswith("dinov2") else "vision_model."
    save_file(
        {f"{prefix}{key}": value.contiguous() for key, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_constants(folder, image)


def write_tower_config(folder: Path, name: str, tower: VisionTower | Encoder) -> None:
    """Write what `build_vision` needs of a hub id or folder besides weights."""
    folder.mkdir(parents=True)
    with explained(f"hf {name}", remedy="the tower's own folder or hub id is needed for its config"):
        AutoConfig.from_pretrained(name, trust_remote_code=False).save_pretrained(folder)
    size = list(tower.image_size)
    told = {"size": size, "interpolation": tower.interpolation, "mean": tower.mean, "std": tower.std}
    _write_constants(folder, told)
    if tower.native is not None:  # its limits under the names that `vision_native` reads
        path, rule = folder / "preprocessor_config.json", tower.native
        stated = json.loads(path.read_text(encoding="utf-8"))
        stated |= {key: rule[key] for key in ("min_pixels", "max_pixels") if key in rule}
        stated["size"] = {"max_height": rule["max_side"]} if "max_side" in rule else {}
        if "max_edge" in rule:
            stated["size"] = {"longest_edge": rule["max_edge"]}
        else:
            stated["max_patches"] = rule["max_pixels"] // rule["patch"] ** 2
        path.write_text(json.dumps(stated, indent=1), encoding="utf-8")


def _write_constants(folder: Path, image: Mapping[str, Any]) -> None:
    height, width = image["size"]
    CLIPImageProcessor(
        size={"height": height, "width": width},
        crop_size={"height": height, "width": width},
        do_center_crop=False,
        resample=int(Resampling[image["interpolation"].upper()]),
        image_mean=list(image["mean"]),
        image_std=list(image["std"]),
    ).save_pretrained(folder)


def write_adapter(folder: Path, vlm: VLM, *, base: str) -> None:
    """Write the LLM's adapter alone, as peft does. Raises ModelError if there is none."""
    if not isinstance(vlm.llm, PeftModel):
        raise ModelError(
            "the LLM of this model has no adapter",
            where="export --format peft",
            remedy="it was trained in full or stayed frozen; use --format llava-hf or --format mmit",
        )
    # Where the adapter was trained the base may have been a folder that others do not have.
    for adapter in vlm.llm.peft_config.values():
        adapter.base_model_name_or_path = base
    vlm.llm.save_pretrained(str(folder), save_embedding_layers=False)


def reload_adapter(
    folder: Path, base: str, *, revision: str | None, random_init: Any, quantization: Mapping[str, Any] | None = None
) -> VLM | None:
    """Put a written adapter on its base with peft's own loader, in float32.

    Args:
        folder: what `write_adapter` wrote.
        base: name or folder of the base. revision: its commit, or None.
        random_init: the config's; a base of random weights cannot be loaded again.
        quantization: the bits that the base was trained in, as `load_llm` takes them; None as it is.

    Returns:
        the adapted LLM as a composite that sees nothing; None where the base was random to begin with.
    """
    if random_init is not None:
        return None
    llm = load_llm(base, revision=revision, dtype=torch.float32, quantization=quantization)
    with quietly():
        adapted = PeftModel.from_pretrained(llm, str(folder))
    return VLM(adapted.eval(), vision=None, projector=None)


def write_llava(
    folder: Path, vlm: VLM, *, tokenizer: Any, tower_name: str, base: str, fit: str, max_length: int
) -> list[str]:
    """Write LLaVA's layout: mm_projector.bin, then adapter and non_lora_trainables.bin, or the whole LLM.

    Args:
        folder: exists and is empty.
        vlm: the composite, with its adapter if it has one.
        tokenizer: of the LLM.
        tower_name: what LLaVA loads as `mm_vision_tower`.
        base: what LLaVA is given as --model-base.
        fit: how pictures are fitted to the tower.
        max_length: longest record in tokens.

    Returns:
        the names of the weight files written.

    Raises:
        ModelError: LLaVA's code has no class for the LLM, the tower or the projector.
    """
    assert vlm.vision is not None and vlm.projector is not None
    llm: Any = vlm.llm.get_base_model() if isinstance(vlm.llm, PeftModel) else vlm.llm
    kind = llm.config.model_type
    if kind not in LLAVA_CLASSES:
        raise ModelError(
            f"LLaVA's code has no class for a '{kind}' model",
            where="export --format llava",
            remedy=f"it has {', '.join(LLAVA_CLASSES)}; use --format llava-hf",
        )
    if vlm.vision.kind != "hf" or fit not in ("pad", "crop"):
        raise ModelError(
            f"LLaVA's code reads transformers' CLIP towers with padded or cropped pictures, not {vlm.vision.kind} "
            f"{vlm.vision.name} with fit: {fit}",
            where="export --format llava",
            remedy="use --format llava-hf, which converts towers, or --format mmit",
        )
    projector = {f"mm_projector.{key}": value for key, value in _llava_projector(vlm.projector).items()}
    torch.save({f"model.{key}": value for key, value in projector.items()}, folder / "mm_projector.bin")
    written = ["mm_projector.bin"]
    config = _llava_config(llm, vlm, tower_name=tower_name, fit=fit, max_length=max_length)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    if isinstance(vlm.llm, PeftModel):
        write_adapter(folder, vlm, base=base)
        rest = {f"base_model.model.model.{key}": value for key, value in projector.items()}
        torch.save(rest, folder / "non_lora_trainables.bin")
        return [*written, "adapter_model.safetensors", "non_lora_trainables.bin"]
    tokenizer.save_pretrained(folder)
    state = {key: value.detach().cpu().contiguous() for key, value in llm.state_dict().items()}
    if getattr(llm.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    save_torch_state_dict({**state, **{f"model.{k}": v for k, v in projector.items()}}, folder)
    return [*written, *sorted(path.name for path in folder.glob("model*.safetensors"))]


def _llava_config(llm: Any, vlm: VLM, *, tower_name: str, fit: str, max_length: int) -> dict[str, Any]:
    """LLaVA's config.json: that of the LLM, and the fields that its builder reads."""
    assert vlm.vision is not None
    model_type, architecture = LLAVA_CLASSES[llm.config.model_type]
    config = llm.config.to_dict()
    config.update(
        model_type=model_type,
        architectures=[architecture],
        mm_vision_tower=tower_name,
        mm_hidden_size=vlm.vision.dim,
        mm_projector_type=_projector_type(vlm.projector),
        mm_vision_select_layer=vlm.vision.layer,
        mm_vision_select_feature="cls_patch" if vlm.vision.prefix else "patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        image_aspect_ratio={"pad": "pad", "crop": "square"}[fit],
        mm_patch_merge_type="flat",
        use_mm_proj=True,
        tokenizer_model_max_length=max_length,
        tokenizer_padding_side="right",
    )
    return config


def _llava_projector(projector: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors as LLaVA names them inside `mm_projector`: one linear layer has no number."""
    _projector_type(projector)
    state = {key: value.detach().cpu().contiguous() for key, value in projector.state_dict().items()}
    single = len(projector.layers) == 1  # type: ignore[arg-type]
    return {key.removeprefix("layers.").removeprefix("0." if single else "layers."): v for key, v in state.items()}


def _projector_type(projector: Any) -> str:
    if type(projector) not in (MLP, Linear) or not isinstance(projector.norm, torch.nn.Identity):
        raise ModelError(
            f"LLaVA has no projector like {type(projector).__name__}"
            + ("" if isinstance(getattr(projector, "norm", None), torch.nn.Identity) else " with a norm"),
            where="export --format llava",
            remedy="it has linear and mlpNx_gelu; use --format mmit",
        )
    depth = (len(projector.layers) + 1) // 2
    return "linear" if depth == 1 else f"mlp{depth}x_gelu"


def read_llava_projector(path: Path, projector: torch.nn.Module) -> None:
    """Load LLaVA's `mm_projector.bin` or `non_lora_trainables.bin` into a projector; any prefix is legal.

    A projector with a `line_end` takes it from `image_newline`.

    Raises ModelError with what is missing, left over or of another shape.
    """
    mark, own = "mm_projector.", _llava_projector(projector)
    found, other = {}, []
    for key, value in load_tensors(path).items():
        # Training with DeepSpeed, PEFT or neither puts other prefixes in front; what follows the mark is the same in
        # all.
        if mark in key:
            found[key.split(mark, 1)[1]] = value.float()
        elif "line_end" in own and key.split(".")[-1] == "image_newline":
            found["line_end"] = value.float()
        else:
            other.append(key)
    complain("holds more than a projector", left_over=other, where=str(path))
    complain(
        "the projector does not fit",
        missing=own.keys() - found.keys(),
        left_over=found.keys() - own.keys(),
        shapes=[k for k in own.keys() & found.keys() if own[k].shape != found[k].shape],
        where=str(path),
        remedy="check mm_projector_type, the tower's width and the LLM's width",
    )
    single = len(projector.layers) == 1  # type: ignore[arg-type]
    front = f"layers.{'0.' if single else ''}"
    projector.load_state_dict({key if key == "line_end" else front + key: value for key, value in found.items()})
