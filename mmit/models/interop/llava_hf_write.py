"""A composite written as a llava-hf folder, which transformers' own classes load.

Goes in: a composite whose adapters are merged, its tokenizer, a chat template for the processor and how pictures are
prepared. Comes out: config, weights under the names that every version of transformers reads, tokenizer with its image
token, processor and generation config. Refuses what `LlavaForConditionalGeneration` and
`LlavaNextForConditionalGeneration` cannot hold.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from PIL.Image import Resampling
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from mmit.errors import ModelError
from mmit.models.interop.hf_towers import hf_tower, read_blocks
from mmit.models.interop.llava_hf import ARCHITECTURES, PROJECTOR
from mmit.models.interop.llava_names import named_tensors, text_config_of
from mmit.models.interop.tensors import complain
from mmit.models.projectors import MLP

if TYPE_CHECKING:
    from mmit.models.vlm import VLM

# LLaVA-1.6's canvases, (W, H), for tiles of 336 pixels: what a tiling without canvases of its own takes.
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NAMES = {"llm": "language_model.", "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector."}


def check_writable(vlm: VLM, image: Mapping[str, Any]) -> None:
    """Raise ModelError, before anything is computed, for what llava-hf cannot hold.

    `image` says how pictures are prepared: the arguments of `data.preparation.ImagePreparation`.
    """
    if vlm.vision is None or vlm.projector is None:
        raise ModelError("a text-only model is no LLaVA", remedy="export with --format peft or --format mmit")
    hf_tower(vlm.vision)
    off = [name for name in ("thumbnail", "unpad", "line_ends") if not image.get("tiles", {}).get(name, True)]
    if image["mode"] == "dynamic" or off:
        raise ModelError(
            f"cannot be exported: {'tiles of fit dynamic' if not off else f'tiles with {off[0]}: false'} are not "
            "LLaVA-NEXT's",
            where="model.vision",
            remedy="export with --format mmit, or train with fit any_resolution and its defaults",
        )
    layers = getattr(vlm.projector, "layers", ())
    if type(vlm.projector) is not MLP or len(layers) != 3 or not isinstance(vlm.projector.norm, torch.nn.Identity):
        raise ModelError(
            f"cannot be exported: llava-hf's projector is two linear layers with GELU between them, and this one is "
            f"a {type(vlm.projector).__name__} of {(len(layers) + 1) // 2} layers",
            where="projector",
            remedy="train with projector kind mlp, depth 2 and no norm; or export with --format mmit",
        )


@dataclass(frozen=True)
class TextSide:
    """What a llava-hf folder holds for text, besides the LLM.

    Attributes:
        tokenizer: copied before the image token is added.
        chat_template: Jinja, for messages whose contents are lists of parts.
        image_token: text of the image token.
        end_ids: ids that end an answer.
        drop_bos: the chat format writes no BOS, so the tokenizer must not put one in front by itself.
    """

    tokenizer: Any
    chat_template: str
    image_token: str
    end_ids: Sequence[int]
    drop_bos: bool = False


def write_llava_hf(folder: Path, vlm: VLM, text: TextSide, *, image: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write the folder.

    Args:
        folder: exists and is empty.
        vlm: composite with a plain LLM; its word embeddings grow by a row if the image token is new and there is no
            unused row for it.
        text: tokenizer, chat template and what belongs to them.
        image: how pictures are prepared; any_resolution makes it a LLaVA-NEXT.
        dtype: number format of the weights written.

    Raises:
        ModelError: see `check_writable`; the image token means something else to the tokenizer.
    """
    check_writable(vlm, image)
    assert vlm.vision is not None
    # The caller's tokenizer goes on being used, and a token added to it would change the ids of its chat format.
    tokens = copy.deepcopy(text.tokenizer)
    image_id = _add_image_token(tokens, text.image_token)
    if text.drop_bos:
        # Both places that may put a BOS in front: the template of the post-processor, and the flag of older classes.
        tokens.backend_tokenizer.post_processor = None
        tokens.add_bos_token = False
    # Many models have spare rows in their table, which the image token may take: then no weight changes its shape.
    _grow(vlm.llm, max(len(tokens), image_id + 1))

    vision_config, vision_state = hf_tower(vlm.vision)
    # transformers counts a class token among the features of CLIP alone, and leaves it out by "default".
    with_cls = vision_config.model_type == "clip_vision_model"
    strategy: Any = "default" if with_cls and not vlm.vision.prefix else "full"
    config = _config(vlm, image, vision_config, image_id=image_id, strategy=strategy)
    config.architectures, config.dtype = [ARCHITECTURES[config.model_type]], dtype
    config.save_pretrained(folder)
    state = _state(vlm, vision_state, tied=config.tie_word_embeddings)
    save_torch_state_dict({key: value.to(dtype) for key, value in state.items()}, folder, max_shard_size="5GB")
    _write_generation(folder, tokens, text.end_ids)
    (LlavaNextProcessor if image["mode"] == "any_resolution" else LlavaProcessor)(
        _image_processor(image, mean=vlm.vision.mean, std=vlm.vision.std),
        tokens,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(with_cls),
        chat_template=text.chat_template,
        image_token=text.image_token,
    ).save_pretrained(folder)


def _config(vlm: VLM, image: Mapping[str, Any], vision_config: Any, *, image_id: int, strategy: str) -> Any:
    """config.json of the whole model: of LLaVA-NEXT where pictures are cut into tiles, else of LLaVA."""
    assert vlm.vision is not None
    blocks = read_blocks(vlm.vision)
    text_config = text_config_of(vlm.llm.config)
    text_config.dtype = None  # one number format for all parts stands in the whole's config
    tiled = image["mode"] == "any_resolution"
    canvases: dict[str, Any] = {"image_grid_pinpoints": _canvases(image)} if tiled else {}
    config_class: Any = LlavaNextConfig if tiled else LlavaConfig
    return config_class(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=vlm.vision.tokens,
        # The tower is written only up to what is read, so that its last layer is the one.
        vision_feature_layer=-1 if len(blocks) == 1 else list(blocks),
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=text_config.tie_word_embeddings,
        **canvases,
    )


def _write_generation(folder: Path, tokens: Any, end_ids: Sequence[int]) -> None:
    """Write what ends and pads an answer; a tokenizer without padding gets the end token for it."""
    # Batches of transformers need one. What ends an answer does no harm there, since padding is masked.
    pad = tokens.pad_token_id if tokens.pad_token_id is not None else end_ids[-1]
    GenerationConfig(
        bos_token_id=tokens.bos_token_id, eos_token_id=list(dict.fromkeys(end_ids)), pad_token_id=pad
    ).save_pretrained(folder)
    if tokens.pad_token is None:
        tokens.pad_token = tokens.convert_ids_to_tokens(pad)


def _canvases(image: Mapping[str, Any]) -> list[list[int]]:
    """Canvases of LLaVA-NEXT as (height, width)."""
    return [[height, width] for width, height in image.get("tiles", {}).get("pinpoints", PINPOINTS)]


def reload(folder: Path) -> tuple[Any, Any]:
    """Load a written folder with transformers' own classes, in float32; complain about any key too many or few."""
    loader: Any = AutoModelForImageTextToText
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    complain(
        "transformers does not find the weights it expects",
        missing=map(str, info["missing_keys"]),
        left_over=map(str, info["unexpected_keys"]),
        shapes=map(str, info["mismatched_keys"]),
        where=str(folder),
        remedy="this is a defect of the export",
    )
    # The PIL form of the image processor is the one whose arithmetic is mmit's.
    return model.eval(), AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)


def _add_image_token(tokens: Any, image_token: str) -> int:
    """Return the id of the image token, which is added to the tokenizer where it is new."""
    ids = tokens.encode(image_token, add_special_tokens=False)
    if image_token in tokens.get_vocab():
        added = tokens.added_tokens_decoder.get(tokens.convert_tokens_to_ids(image_token))
        if added is None or len(ids) != 1:
            raise ModelError(
                f"the image token '{image_token}' is an ordinary word of the tokenizer's vocabulary",
                where="tokenizer",
                remedy="give another one with --image-token",
            )
        return int(ids[0])
    token = AddedToken(image_token, normalized=False, special=True)
    tokens.add_tokens([token], special_tokens=True)
    return int(tokens.convert_tokens_to_ids(image_token))


def _grow(llm: Any, rows: int) -> None:
    """Give the vocabulary more rows, each the mean of the old ones, so that none can be the likeliest."""
    old = llm.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    llm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            # The mean of all: the row is never looked up, but as a row of the head its logit must not win.
            layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)


def _state(vlm: VLM, vision: Mapping[str, torch.Tensor], *, tied: bool) -> dict[str, torch.Tensor]:
    """All tensors under the names of llava-hf up to transformers 4.51, which later versions and vLLM read too."""
    assert vlm.projector is not None
    ours = {own: theirs for theirs, own in PROJECTOR.items()}
    projector = dict(vlm.projector.state_dict())
    newline = projector.pop("line_end", None)
    parts: dict[str, Mapping[str, torch.Tensor]] = {
        "llm": named_tensors(vlm.llm),
        "vision": vision,
        "projector": {f"{ours[key[:8]]}{key[8:]}": value for key, value in projector.items()},
    }
    state = {NAMES[part] + key: _own(value) for part, tensors in parts.items() for key, value in tensors.items()}
    if newline is not None:
        state["image_newline"] = newline.detach().cpu()
    if tied:
        state.pop("language_model.lm_head.weight", None)
    return state


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU where it is a part of another one, which safetensors does not take."""
    tensor = tensor.detach().cpu().contiguous()
    # safetensors refuses tensors that share memory, and a view would bring its whole storage into the file.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _image_processor(image: Mapping[str, Any], *, mean: Sequence[float], std: Sequence[float]) -> Any:
    """What brings pictures to the tower. Padding there is always of the colour `int(255 * mean)`."""
    height, width = image["size"]
    common: dict[str, Any] = {
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": int(Resampling[image["interpolation"].upper()]),
        "crop_size": {"height": height, "width": width},
    }
    if image["mode"] == "any_resolution":
        canvases = _canvases(image)
        return LlavaNextImageProcessor(size={"shortest_edge": height}, image_grid_pinpoints=canvases, **common)
    if image["mode"] == "pad":
        return LlavaImageProcessor(do_pad=True, size={"shortest_edge": height}, **common)
    if image["mode"] == "crop":
        return CLIPImageProcessor(size={"shortest_edge": height}, **common)
    return CLIPImageProcessor(size={"height": height, "width": width}, do_center_crop=False, **common)
