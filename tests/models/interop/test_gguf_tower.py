"""The `mmproj` file of a tower and its projector: names of tensors, keys, and what llama.cpp computes otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit.errors import ModelError
from mmit.models.interop.gguf_tower import FILL, check_tower, tower_keys, tower_tensors
from mmit.models.projectors import build_projector
from mmit.models.vision import build_vision
from tests.models.test_vision import CLIP, SIGLIP

IMAGE: dict[str, Any] = {"mode": "pad", "fill": list(FILL), "interpolation": "bicubic"}


def seeing(tower: dict[str, Any] = SIGLIP, *, depth: int = 2, norm: bool = False, **read: Any) -> Any:
    eye = build_vision("hf", tower, normalize=False, **{"layer": 2, **read})
    shape: dict[str, Any] = {"vision_dim": eye.dim, "llm_dim": 12, "grid": eye.grid, "prefix": eye.prefix}
    projector = build_projector("mlp", depth=depth, norm=norm, **shape)
    return SimpleNamespace(vision=eye, projector=projector, word_embeddings=torch.zeros(5, 12))


class Writer:
    """Keeps what a GGUFWriter is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.told.__setitem__(name.removeprefix("add_").removeprefix("vision_"), value)


def test_a_tower_keeps_every_tensor_but_the_unread_norm() -> None:
    vlm = seeing()
    whole = sum(p.numel() for p in (*vlm.vision.parameters(), *vlm.projector.parameters()))
    assert sum(t.numel() for t in tower_tensors(vlm).values()) == whole


def test_names_are_those_of_llama_cpp_and_linear_layers_are_counted_without_the_gelu() -> None:
    vlm = seeing()
    found, state = tower_tensors(vlm), vlm.projector.state_dict()
    assert torch.equal(found["mm.0.weight"], state["layers.0.weight"])
    assert torch.equal(found["mm.1.bias"], state["layers.2.bias"])
    own = vlm.vision.encoder.state_dict()
    key = next(key for key in own if key.endswith("layers.1.mlp.fc1.weight"))
    assert torch.equal(found["v.blk.1.ffn_up.weight"], own[key])
    assert {name.split(".")[0] for name in found} == {"v", "mm"} and "v.position_embd.weight" in found


def test_the_keys_say_the_blocks_that_run_and_the_projectors_width() -> None:
    writer = Writer()
    tower_keys(writer, seeing({**SIGLIP, "hidden_act": "gelu_pytorch_tanh"}), name="m")
    assert writer.told["block_count"] == 2  # of four: the others are not in the file, and all of it is run
    assert writer.told["projection_dim"] == 12 and writer.told["use_gelu"] is True
    assert (writer.told["image_size"], writer.told["patch_size"]) == (SIGLIP["image_size"], SIGLIP["patch_size"])
    quick = Writer()
    tower_keys(quick, seeing({**SIGLIP, "hidden_act": "quick_gelu"}), name="m")
    assert "use_gelu" not in quick.told


def test_what_llama_cpp_computes_otherwise_is_refused() -> None:
    vlm = seeing()
    check_tower(vlm, IMAGE)
    for made, image, told in (
        (vlm, {**IMAGE, "fill": [0, 0, 0]}, r"trained otherwise \(pad, bicubic, colour \(0, 0, 0\)\)"),
        (vlm, {**IMAGE, "mode": "crop"}, r"trained otherwise \(crop"),
        (seeing(CLIP, select="cls_patch"), IMAGE, "a class token"),
        (seeing({**SIGLIP, "hidden_act": "relu"}), IMAGE, "its activation is relu"),
        (seeing(layer=[1, 2]), IMAGE, "reads one layer"),
        (seeing(depth=3), IMAGE, "not two linear layers"),
        (seeing(norm=True), IMAGE, "not two linear layers"),
    ):
        with pytest.raises(ModelError, match=told) as caught:
            check_tower(made, image)
        assert "--llm-only" in caught.value.remedy
