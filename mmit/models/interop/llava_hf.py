"""llava-hf folders (`LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`), read into a composite.

Goes in: a folder whose config.json declares model_type "llava" or "llava_next" and the architecture of transformers.
Comes out: the composite, for LLaVA-NEXT with its tiles and the vector that ends a line (`image_newline`), the
processor's tokenizer, chat template and picture preparation, and the whole tower (the composite holds it only up to
the layers that are read). Refuses what the composite cannot compute exactly: projectors without bias or with another
activation, towers other than CLIP and SigLIP.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Resampling
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import mmit.models.vision_hf as vision_hf
from mmit.errors import ModelError, nearest
from mmit.models import attention
from mmit.models.interop.tensors import complain, fill_module, folder_tensors, split_by_prefix
from mmit.models.llm import Placement, bits_config, ready
from mmit.models.projectors import build_projector
from mmit.models.vision import VisionTower
from mmit.models.vision_encoder import Reading, explained, load_needed, triple
from mmit.models.vlm import VLM

if TYPE_CHECKING:
    from mmit.models.projector_base import Projector

ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
# (prefix in the file, part, prefix in the part): transformers up to 4.51 and what it still writes, then the names
# in memory since 4.52, which some folders hold.
PREFIXES = (
    ("language_model.lm_head.", "llm", "lm_head."),
    ("language_model.model.", "llm", "model."),
    ("vision_tower.vision_model.", "vision", ""),
    ("vision_tower.", "vision", ""),
    ("multi_modal_projector.", "projector", ""),
    ("model.language_model.", "llm", "model."),
    ("model.vision_tower.vision_model.", "vision", ""),
    ("model.vision_tower.", "vision", ""),
    ("model.multi_modal_projector.", "projector", ""),
    ("lm_head.", "llm", "lm_head."),
    ("language_model.", "llm", ""),  # a body that published files call by another name than 'model'
)
NEWLINE = (("image_newline", "newline", ""), ("model.image_newline", "newline", ""))
PROJECTOR = {"linear_1": "layers.0", "linear_2": "layers.2"}  # theirs -> ours


@dataclass
class LlavaHF:
    """What a llava-hf folder holds.

    `image` are the arguments of `data.images.fit`; `vision_options` those of `model.vision` in a config but for the
    name; `vision_config` and `vision_state` describe the whole tower as transformers' class has it.
    """

    vlm: VLM
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    chat_template: str | None
    image_token: str
    image: dict[str, Any]
    vision_options: dict[str, Any]
    vision_config: Any
    vision_state: dict[str, torch.Tensor]
    dtype: torch.dtype


def is_llava_hf(folder: Path) -> bool:
    """Tell whether a folder's config.json declares a llava-hf model."""
    try:
        declared = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = ARCHITECTURES.get(str(declared.get("model_type")))
    return named is not None and named in (declared.get("architectures") or ())


def read_llava_hf(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    packed: bool = True,
    **place: Any,
) -> LlavaHF:
    """Read a llava-hf folder.

    Args:
        folder: holds config.json, weights, tokenizer and processor files.
        dtype: number format of the weights; None takes the one that config.json states, else float32.
        packed: see `load_llm`.
        place: device_map, offload and quantization of the LLM, see `load_llm`.

    Raises:
        ModelError: the folder is incomplete, of another layout, or describes what mmit does not compute.
    """
    folder, where = Path(folder), str(folder)
    with explained(where, remedy="is this a llava-hf folder with its config.json?"):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # Numbers as they were published, unless something else is asked for: float32 of a 7B model would take twice the
    # memory for nothing.
    stated = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    dtype = dtype or stated
    _check_config(config, where)
    with explained(where, remedy="the folder must hold the tokenizer and preprocessor_config.json too"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    _check_tokens(config, processor, where)
    tiled = config.model_type == "llava_next"
    parts = split_by_prefix(folder_tensors(folder), PREFIXES + (NEWLINE if tiled else ()), where=where)
    picture = _picture(processor, where)
    if tiled:
        picture |= _tiles(config, processor, where)
    tower, options = _tower(config, parts["vision"], picture=picture, where=where)
    llm = language_model(_text(config), parts["llm"], dtype=dtype, packed=packed, where=where, **place)
    like: dict[str, Any] = {"vision_dim": tower.dim, "llm_dim": config.text_config.hidden_size, "grid": tower.grid}
    projector = build_projector("mlp", **like, prefix=tower.prefix, depth=2, line_end=tiled).to(dtype)
    _fill_projector(projector, parts, dtype=dtype, where=where)
    told = ("size", "mode", "interpolation", "fill", *(("tiles",) if tiled else ()))
    return LlavaHF(
        vlm=VLM(llm, vision=tower.to(dtype), projector=projector),
        tokenizer=processor.tokenizer,
        processor=processor,
        chat_template=processor.chat_template or processor.tokenizer.chat_template,
        image_token=processor.image_token,
        image={key: picture[key] for key in told},
        vision_options={**options, "fit": picture["mode"], "tiles": picture.get("tiles", {})},
        vision_config=config.vision_config,
        vision_state=parts["vision"],
        dtype=dtype,
    )


def _fill_projector(
    projector: Projector, parts: Mapping[str, Mapping[str, torch.Tensor]], *, dtype: torch.dtype, where: str
) -> None:
    """Give the projector the folder's weights, and the vector that ends a line, which lies beside them."""
    newline = parts.get("newline", {}).get("")
    # The vector that ends a line lies beside the projector in the file, and is a part of it here: tuning and saving
    # reach it so.
    renamed = {} if newline is None else {"line_end": newline.to(dtype)}
    for key, tensor in parts["projector"].items():
        name, _, leaf = key.rpartition(".")
        renamed[f"{PROJECTOR.get(name, name)}.{leaf}"] = tensor.to(dtype)
    fill_module(projector, renamed, where=f"{where}, multi_modal_projector")


def _check_config(config: Any, where: str) -> None:
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise ModelError(
            f"its projector has activation '{config.projector_hidden_act}' and "
            f"bias {config.multimodal_projector_bias}; mmit's mlp has gelu and bias",
            where=where,
            remedy="there is no projector for it in mmit",
        )
    kind = config.vision_config.model_type
    valid = [name for name in vision_hf.MODEL_CLASSES if name.startswith(("clip", "siglip"))]
    if kind not in valid:
        raise ModelError(f"its vision tower is a '{kind}'", where=where, remedy=nearest(kind, valid))


def _check_tokens(config: Any, processor: Any, where: str) -> None:
    """Refuse a tokenizer that is not the one the model was trained with, where that shows."""
    tokens, rows = processor.tokenizer, config.text_config.vocab_size
    # Contract: one id marks pictures, in the tokenizer as in the model. Were they two, pictures would be read as words
    # without an error.
    found = tokens.convert_tokens_to_ids(processor.image_token)
    remedy = "put the model's own tokenizer files and config.json together; another tokenizer gives other ids"
    if found != config.image_token_index:
        raise ModelError(
            f"its tokenizer has the image token '{processor.image_token}' at id {found}, its config.json at "
            f"{config.image_token_index}",
            where=where,
            remedy=remedy,
        )
    if len(tokens) > rows:
        raise ModelError(f"its tokenizer has {len(tokens)} tokens, its model {rows}", where=where, remedy=remedy)


def _tower(
    config: Any, tensors: dict[str, torch.Tensor], *, picture: dict[str, Any], where: str
) -> tuple[VisionTower, dict[str, Any]]:
    """Return the tower, cut at the layer that is read, and its options for `build_vision`."""
    import transformers

    vision = config.vision_config
    clip = vision.model_type.startswith("clip")
    strategy, layer = config.vision_feature_select_strategy, config.vision_feature_layer
    # The strategy counts a class token that SigLIP does not have; transformers drops the first patch all the same.
    if not clip and strategy == "default":
        raise ModelError(
            "vision_feature_select_strategy 'default' drops the first token, which in SigLIP is a patch",
            where=where,
            remedy="set it to 'full' in config.json if that is what the model was trained with",
        )
    kind = vision_hf.MODEL_CLASSES[vision.model_type]
    valid = type(vision)().to_dict()
    options: dict[str, Any] = {"layer": layer, "select": "cls_patch" if clip and strategy == "full" else "patch"}
    encoder = vision_hf.hf_encoder(
        {key: value for key, value in vision.to_dict().items() if key in valid},
        Reading(**options),  # without the final norm: transformers reads hidden states, which come before it
    )
    # The tower has no positions for another size.
    if picture["size"] != list(encoder.image_size):
        raise ModelError(
            f"its processor makes pictures of {picture['size']}, its tower takes {list(encoder.image_size)}",
            where=where,
            remedy="check preprocessor_config.json against config.json",
        )
    with torch.device("meta"):
        # Without memory, for its names: files hold the whole tower, of which only the layers up to the one read are
        # built.
        whole: Any = getattr(transformers, kind)(vision)
    full = {key: value.shape for key, value in getattr(whole, "vision_model", whole).state_dict().items()}
    complain(
        "the weights do not fit the vision tower", missing=full.keys() - tensors.keys(), where=f"{where}, vision_tower"
    )
    reader: Any = encoder.reader
    core = getattr(reader.model, "vision_model", reader.model)
    load_needed(core, tensors, full=full, where=f"{where}, vision_tower")
    constants = {key: picture[key] for key in ("mean", "std", "interpolation")}
    encoder = dataclasses.replace(encoder, name=where, weights_id=where, **constants)
    return VisionTower("hf", encoder), options


def _tiles(config: Any, processor: Any, where: str) -> dict[str, Any]:
    """How LLaVA-NEXT cuts a picture; its canvases are (height, width), those of a tiling (W, H)."""
    canvases = [list(canvas) for canvas in config.image_grid_pinpoints]
    other = [list(canvas) for canvas in processor.image_processor.image_grid_pinpoints]
    if canvases != other:
        raise ModelError(
            f"its processor cuts tiles from {other}, its model reads {canvases}",
            where=where,
            remedy="check image_grid_pinpoints in preprocessor_config.json against config.json",
        )
    if config.vision_config.model_type.startswith("clip") and config.vision_feature_select_strategy == "full":
        raise ModelError("keeps the class token, so that its tiles join to no picture", where=where)
    pinpoints = [[width, height] for height, width in canvases]
    return {"mode": "any_resolution", "fill": [0, 0, 0], "tiles": {"pinpoints": pinpoints}}


def _text(config: Any) -> Any:
    """Return the config of the language model, tied if the whole is."""
    text = config.text_config
    text.tie_word_embeddings = bool(config.tie_word_embeddings or getattr(text, "tie_word_embeddings", False))
    return text


def language_model(
    text: Any,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    where: str,
    packed: bool = True,
    **place: Any,
) -> PreTrainedModel:
    """Build a causal LM from its config and exactly its tensors.

    Args:
        text: config of the LLM.
        tensors: under the names of its class, every one of which must find its place.
        dtype, packed, place: as for `load_llm`.
        where: begins the errors.

    Raises:
        ModelError: tensors are missing, left over or of another shape; with what does not fit.
    """
    placed = Placement(**place)
    head, words = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if text.tie_word_embeddings and head is not None:
        if words is None or not torch.equal(head, words):
            raise ModelError(
                "config.json ties lm_head to the word embeddings, but the file holds another lm_head",
                where=where,
                remedy="set tie_word_embeddings to false in config.json",
            )
        tensors = {key: value for key, value in tensors.items() if key != "lm_head.weight"}
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"its language model is a '{text.model_type}', which is no causal LM", where=where)
    with explained(f"{where}, text_config", remedy="are the weights those of the language model in config.json?"):
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        model, info = model_class.from_pretrained(
            None,
            config=text,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            **placed.arguments(),
            **({"attn_implementation": attention.NAME} if packed else {}),
            **({} if (bits := placed.quantization) is None else {"quantization_config": bits_config(bits, dtype)}),
        )
    complain(
        "the weights do not fit the language model",
        missing=info["missing_keys"],
        left_over=info["unexpected_keys"],
        shapes=[str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]],
        where=f"{where}, language_model",
    )
    return ready(model)


def _picture(processor: Any, where: str) -> dict[str, Any]:
    """Read from an image processor how a picture becomes pixels: size, mode, interpolation, fill, mean, std."""
    p = getattr(processor, "image_processor", None)
    if p is None:
        raise ModelError("its processor has no image processor", where=where, remedy="add preprocessor_config.json")
    remedy = "mmit prepares pictures by resize, pad or centre crop to the tower's size, /255, mean and std"

    def fail(problem: str) -> ModelError:
        return ModelError(f"its image processor {problem}", where=where, remedy=remedy)

    if not (p.do_resize and p.do_rescale and p.do_normalize) or abs(p.rescale_factor * 255 - 1) > 1e-4:
        raise fail("does not resize, scale by 1/255 and normalise")
    size, crop = dict(p.size), dict(p.crop_size or {}) if getattr(p, "do_center_crop", False) else {}
    edge = size.get("shortest_edge")
    target = [crop.get("height"), crop.get("width")] if crop else [size.get("height"), size.get("width")]
    if edge and not crop or edge and target != [edge, edge]:
        raise fail(f"scales the short side to {edge} and crops to {crop or 'nothing'}")
    if not edge and target != [size.get("height"), size.get("width")]:
        raise fail(f"scales to {size} and crops to {crop}")
    mode = "pad" if getattr(p, "do_pad", False) else "crop" if edge else "resize"
    mean, std = triple(p.image_mean), triple(p.image_std)
    return {
        "size": target,
        "mode": mode,
        "interpolation": Resampling(int(p.resample)).name.lower(),
        "fill": [int(255 * m) for m in mean],
        "mean": mean,
        "std": std,
    }
