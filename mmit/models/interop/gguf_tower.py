"""A vision tower and its projector as the `mmproj` file that llama.cpp's multimodal part reads.

Goes in: a SigLIP vision transformer and an MLP of two layers. Comes out: keys and tensors of llama.cpp's projector type
`janus_pro`. Refuses what it computes otherwise: the shape of pictures first of all, which llama.cpp pads with a colour
of its own; and towers with a class token (CLIP). In the llama.cpp that was tried (llama-cpp-python 0.3.36,
tools/mtmd/models/llava.cpp) the class token stands behind the patches and the first row is left out, so that the LLM
loses a patch and every position is off by one.

N patches, D width, K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from mmit.errors import ModelError
from mmit.models.interop.hf_towers import hf_tower, read_blocks
from mmit.models.projectors import MLP

if TYPE_CHECKING:
    from mmit.models.vlm import VLM


PROJECTOR = "janus_pro"
FILL = (127, 127, 127)  # the colour that llama.cpp pads pictures with for it
# Activations of the tower -> key of the file. What llama.cpp calls gelu is the tanh form, at most 5e-4 off the exact.
ACTIVATIONS = {"quick_gelu": None, "gelu_pytorch_tanh": "add_vision_use_gelu", "gelu": "add_vision_use_gelu"}
OUTER = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
}
BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def check_tower(vlm: VLM, image: Mapping[str, Any]) -> None:
    """Raise ModelError for a tower, projector or preparation of pictures that llama.cpp does not compute.

    Shapes are enough; `image` holds the arguments of `data.preparation.ImagePreparation`.
    """
    assert vlm.vision is not None
    try:
        config, _ = hf_tower(vlm.vision)
    except ModelError as error:
        reason = error.problem.removeprefix("cannot be exported: ")
        _refuse(f"llama.cpp has SigLIP's vision transformer, and of {error.where}: {reason}")
    if config.model_type != "siglip_vision_model":
        problem = "its tower has a class token, around which llama.cpp (as of llama-cpp-python 0.3.36) loses a patch"
        _refuse(problem, "train with a SigLIP tower")
    if config.hidden_act not in ACTIVATIONS:
        _refuse(f"its activation is {config.hidden_act}", f"train a tower with {', '.join(ACTIVATIONS)}")
    if len(read_blocks(vlm.vision)) > 1:
        _refuse("llama.cpp reads one layer of its tower", "train with one layer (model.vision.layer)")
    # The file says nothing of how a picture comes to the tower's size: llama.cpp decides by the projector's type. So a
    # model must have been trained on what it does.
    if image["mode"] != "pad" or tuple(image["fill"]) != FILL or image["interpolation"] != "bicubic":
        shown = f"{image['mode']}, {image['interpolation']}, colour {tuple(image['fill'])}"
        _refuse(
            f"llama.cpp brings pictures to a tower's size by bicubic interpolation and pads them with the colour "
            f"{FILL}, and this model was trained otherwise ({shown})",
            "train with model.vision.fit=pad and the mean colour of SigLIP",
        )
    layers = getattr(vlm.projector, "layers", ())
    norm = getattr(vlm.projector, "norm", None)
    if type(vlm.projector) is not MLP or len(layers) != 3 or not isinstance(norm, torch.nn.Identity):
        _refuse(
            "its projector is not two linear layers with GELU between them", "train with projector kind mlp, depth 2"
        )


def _refuse(problem: str, remedy: str = "") -> NoReturn:
    other = "export the LLM alone with --llm-only, or all of it with --format llava-hf or --format mmit"
    raise ModelError(
        f"gguf cannot hold this model: {problem}",
        where="model.vision",
        remedy=f"{remedy}; or {other}" if remedy else other,
    )


def tower_tensors(vlm: VLM) -> dict[str, torch.Tensor]:
    """Tensors by their names in the file."""
    assert vlm.vision is not None and vlm.projector is not None
    _, state = hf_tower(vlm.vision)
    found: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = _name(key)
        if name is not None:
            found[name] = tensor
    # `mm.0` and `mm.1` count linear layers; `layers.1` here is the GELU between them.
    own = vlm.projector.state_dict()
    for ours, theirs in (("layers.0", "mm.0"), ("layers.2", "mm.1")):
        for leaf in ("weight", "bias"):
            found[f"{theirs}.{leaf}"] = own[f"{ours}.{leaf}"]
    return found


def _name(key: str) -> str | None:
    """Name in the file; None for the norm after all blocks and position ids, which nobody reads."""
    if key in OUTER:
        return OUTER[key]
    stem, leaf = key.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{leaf}"
    # Features are read before the final norm, and positions are counted by whoever reads the file.
    if stem == "post_layernorm" or key == "embeddings.position_ids":
        return None
    number, inner = stem.removeprefix("encoder.layers.").split(".", 1)
    return f"v.blk.{number}.{BLOCK[inner]}.{leaf}"


def tower_keys(writer: Any, vlm: VLM, *, name: str) -> None:
    """Write the keys of tower and projector."""
    assert vlm.vision is not None
    config, _ = hf_tower(vlm.vision)
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR)
    writer.add_vision_projection_dim(vlm.word_embeddings.shape[1])
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    # Blocks above the layer that is read are not in the file: llama.cpp runs all that it finds.
    writer.add_vision_block_count(max(read_blocks(vlm.vision)))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(list(vlm.vision.mean))
    writer.add_vision_image_std(list(vlm.vision.std))
    method = ACTIVATIONS[config.hidden_act]
    if method is not None:
        getattr(writer, method)(True)
