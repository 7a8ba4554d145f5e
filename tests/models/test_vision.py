import json

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmit.errors import ModelError
from mmit.models.vision import build_vision

SIZE, BLOCKS = 16, 4  # as in conftest
DIMS = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
CLIP = {"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": 4, **DIMS}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(batch=2, size=SIZE):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def normalised(tower, pixels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.mean, tower.std))
    return (pixels.float() / 255 - mean) / std


def noise(module):
    """Random values everywhere, so that no zero bias or unit scale can hide a mistake."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.2)
    return module


def clip_to_hf(weights):
    """Name open_clip's VisionTransformer weights as transformers does."""
    out = {}
    for key, value in weights.items():
        key = key.replace("transformer.resblocks", "encoder.layers").replace("ln_pre", "pre_layrnorm")
        key = key.replace("ln_post", "post_layernorm").replace("ln_", "layer_norm").replace("attn.", "self_attn.")
        key = key.replace("mlp.c_fc", "mlp.fc1").replace("mlp.c_proj", "mlp.fc2")
        key = key.replace("conv1", "embeddings.patch_embedding")
        if key == "class_embedding":
            out[f"embeddings.{key}"] = value
        elif key == "positional_embedding":
            out["embeddings.position_embedding.weight"] = value
        elif "in_proj_" in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("in_proj_", f"{part}_proj.")] = piece
        elif key != "proj":
            out[key] = value
    return out


def siglip_to_hf(weights):
    """Name timm's SigLIP weights as transformers does, the pooling head left out."""
    out = {}
    for key, value in weights.items():
        key = key.replace("blocks.", "encoder.layers.").replace("patch_embed.proj", "embeddings.patch_embedding")
        key = key.replace("norm1", "layer_norm1").replace("norm2", "layer_norm2").replace("attn.", "self_attn.")
        key = key.replace("self_attn.proj", "self_attn.out_proj")
        if key == "pos_embed":
            out["embeddings.position_embedding.weight"] = value[0]
        elif key.startswith("norm."):
            out[f"post_{key.replace('norm', 'layernorm')}"] = value
        elif ".qkv." in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[key.replace("qkv", f"{part}_proj")] = piece
        elif not key.startswith("attn_pool"):
            out[key] = value
    return out


@pytest.fixture(scope="module", params=["clip", "siglip"])
def both_towers(request, tmp_path_factory):
    """A family, its two-tower model and the folder it is in, as published checkpoints are."""
    text = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, **DIMS}
    vision = CLIP if request.param == "clip" else SIGLIP
    config_class, model_class = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }[request.param]
    torch.manual_seed(0)
    model = noise(model_class(config_class(vision_config=vision, text_config=text))).eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.mark.parametrize("layer", [1, 3, -4, -2, -1])
def test_hf_tower_is_the_hidden_state_of_that_number(both_towers, layer):
    family, model, folder = both_towers
    tower = build_vision("hf", str(folder), layer=layer)
    pixels = pictures()
    states = model.vision_model(normalised(tower, pixels), output_hidden_states=True).hidden_states
    expected = states[layer][:, 1:] if family == "clip" else states[layer]
    torch.testing.assert_close(tower(pixels), expected.detach(), atol=1e-5, rtol=0)
    assert tower.grid == (4, 4) and tower.tokens == 16 and tower.dim == 16


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("layer", "normalize"), [(1, False), (2, False), (-2, False), (-1, False), (-1, True)])
def test_open_clip_equals_hf_at_the_same_layer(quick, layer, normalize, tmp_path):
    """QuickGELU both ways: the same weights under the other activation give other features."""
    name = "tiny-clip-quickgelu" if quick else "tiny-clip"
    model = noise(open_clip.create_model(name))
    torch.save(model.state_dict(), tmp_path / "both.pt")
    save_file(
        {k: v.contiguous() for k, v in clip_to_hf(model.visual.state_dict()).items()},
        tmp_path / "hf.safetensors",
    )
    options = {"layer": layer, "normalize": normalize}
    ours = build_vision("open_clip", name, weights=str(tmp_path / "both.pt"), **options)

    def hf(act):
        config = {**CLIP, "hidden_act": act}
        return build_vision("hf", config, weights=str(tmp_path / "hf.safetensors"), **options)

    pixels = pictures()
    right, wrong = ("quick_gelu", "gelu") if quick else ("gelu", "quick_gelu")
    torch.testing.assert_close(ours(pixels), hf(right)(pixels), atol=1e-5, rtol=0)
    assert (ours(pixels) - hf(wrong)(pixels)).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [1, -2, -1])
def test_siglip_is_the_same_through_open_clip_timm_and_hf(layer, tmp_path):
    model = noise(open_clip.create_model("tiny-siglip"))
    torch.save(model.state_dict(), tmp_path / "both.pt")
    trunk = {key: value.contiguous() for key, value in model.visual.trunk.state_dict().items()}
    save_file(trunk, tmp_path / "timm.safetensors")
    save_file({k: v.contiguous() for k, v in siglip_to_hf(trunk).items()}, tmp_path / "hf.safetensors")
    config = {**SIGLIP, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
    options = {"layer": layer, "normalize": layer == -1}
    towers = [
        build_vision("open_clip", "tiny-siglip", weights=str(tmp_path / "both.pt"), **options),
        build_vision("timm", "tiny_siglip", weights=str(tmp_path / "timm.safetensors"), **options),
        build_vision("hf", config, weights=str(tmp_path / "hf.safetensors"), **options),
    ]
    x = torch.randn(2, 3, SIZE, SIZE)
    first, *others = (tower.encoder(x) for tower in towers)
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-5, rtol=0)


TOWERS = [
    ("open_clip", "tiny-clip"),
    ("open_clip", "tiny-siglip"),
    ("timm", "tiny_siglip"),
    ("timm", "test_vit"),
    ("timm", "test_efficientnet"),
    ("hf", CLIP),
    ("hf", SIGLIP),
]
DEEP = [tower for tower in TOWERS if tower[1] not in ("test_vit", "test_efficientnet")]


@pytest.mark.parametrize(("kind", "name"), DEEP)
def test_layers_above_the_one_that_is_read_neither_run_nor_take_memory(kind, name):
    flops, weights = [], []
    for layer in range(1, BLOCKS + 1):
        tower = build_vision(kind, name, layer=layer)
        with FlopCounterMode(display=False) as counter:
            tower(pictures())
        flops.append(counter.get_total_flops())
        weights.append(sum(weight.numel() for weight in tower.parameters()))
    steps = {above - below for below, above in zip(flops, flops[1:], strict=False)}
    sizes = {above - below for below, above in zip(weights, weights[1:], strict=False)}
    # One block more costs one block more, always the same; head, pooling and text tower are in none of them.
    assert len(steps) == len(sizes) == 1 and min(steps) > 0
    assert flops[0] - min(steps) == 2 * 2 * 16 * (3 * 4 * 4) * 16  # the patch embedding of two pictures


@pytest.mark.parametrize(("kind", "name"), [*TOWERS, ("open_clip", "tiny-resnet")])
def test_frozen_tower_stays_frozen_and_feeds_a_projector(kind, name):
    tower = build_vision(kind, name)
    model = nn.ModuleDict({"eye": tower, "projector": nn.Linear(tower.dim, 8)}).train()
    assert not any(module.training for module in tower.modules())
    before = tower.fingerprint()
    features = tower(pictures(size=tower.image_size[0]))
    assert features.shape == (2, tower.tokens, tower.dim) and tower.tokens == tower.grid[0] * tower.grid[1]
    assert not features.requires_grad and features.grad_fn is None
    model["projector"](features).sum().backward()
    assert model["projector"].weight.grad is not None
    assert all(weight.grad is None and not weight.requires_grad for weight in tower.parameters())
    assert tower.fingerprint() == before  # no batch norm moved


@pytest.mark.parametrize(("kind", "name"), [*TOWERS, ("open_clip", "tiny-resnet")])
def test_unfrozen_tower_trains_every_weight_it_kept(kind, name):
    tower = build_vision(kind, name)
    tower.unfreeze()
    assert tower.training and tower.trainable
    noise(tower)
    (tower(pictures(size=tower.image_size[0])) ** 2).sum().backward()
    assert [key for key, weight in tower.named_parameters() if weight.grad is None] == []
    tower.freeze()
    assert not tower.training and not tower(pictures(size=tower.image_size[0])).requires_grad


@pytest.mark.parametrize("on_meta", [True, False])
def test_measuring_a_timm_encoder_puts_no_stand_in_for_cuda_in_place(on_meta, monkeypatch):
    def refuse(*args):
        raise NotImplementedError

    asked = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: asked.append(1))
    if not on_meta:
        monkeypatch.setattr(torch.func, "functional_call", refuse)
    assert build_vision("timm", "test_efficientnet").tokens
    assert not asked


def test_only_uint8_pictures_of_the_right_size():
    tower = build_vision("hf", CLIP)
    with pytest.raises(ModelError, match="normalises uint8 pixels itself"):
        tower(pictures().float())
    with pytest.raises(ModelError, match=r"\(1, 3, 8, 8\)\nit takes \(B, 3, 16, 16\)"):
        tower(pictures(1, 8))
    assert tower(pictures(0)).shape == (0, 16, 16)


def test_constants_come_from_the_encoder(tmp_path):
    transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)).save_pretrained(tmp_path)
    assert build_vision("hf", str(tmp_path)).mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    facts = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "size": {"height": 9},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    tower = build_vision("hf", str(tmp_path))
    assert (tower.mean, tower.std, tower.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**facts, "rescale_factor": 1 / 127.5}))
    with pytest.raises(ModelError, match="not scaled by 1/255"):
        build_vision("hf", str(tmp_path))
    assert build_vision("hf", SIGLIP).mean == HALF["mean"]
    assert build_vision("timm", "tiny_siglip").std == HALF["std"]
    assert build_vision("open_clip", "tiny-clip").std == pytest.approx((0.269, 0.261, 0.276), abs=1e-3)


def test_a_siglip_file_given_by_path_gets_the_constants_of_siglip():
    from mmit.models.vision_open_clip import _agreed_constants

    assert _agreed_constants("ViT-B-16-SigLIP") == {
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
    }  # fmt: skip


def test_features_of_a_constant_picture_follow_the_constants():
    """A white picture is (1 - mean) / std after normalisation, computed in float32 for a bf16 tower too."""
    tower = build_vision("hf", CLIP, dtype=torch.bfloat16)
    pixels = torch.full((1, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    out = tower(pixels)
    assert out.dtype == torch.bfloat16 == tower.dtype
    expected = [(1 - mean) / std for mean, std in zip(tower.mean, tower.std, strict=True)]
    torch.testing.assert_close(tower._normalise(pixels)[0, :, 0, 0].float(), torch.tensor(expected), atol=0, rtol=2**-8)


@pytest.mark.parametrize(("kind", "name"), TOWERS)
def test_a_bf16_tower_agrees_with_float32_to_bf16_precision(kind, name):
    torch.manual_seed(1)
    full = build_vision(kind, name)
    torch.manual_seed(1)
    half = build_vision(kind, name, dtype=torch.bfloat16)
    pixels = pictures(size=full.image_size[0])
    assert half(pixels).dtype == torch.bfloat16
    gap = (half(pixels).float() - full(pixels)).norm() / full(pixels).norm()
    assert gap < 0.03


@pytest.mark.parametrize(("kind", "name"), [("open_clip", "tiny-clip"), ("timm", "test_vit"), ("hf", CLIP)])
def test_class_token_comes_first_when_it_is_asked_for(kind, name):
    torch.manual_seed(1)
    patches = build_vision(kind, name)
    torch.manual_seed(1)
    both = build_vision(kind, name, select="cls_patch")
    assert both.prefix == 1 and both.tokens == patches.tokens + 1
    pixels = pictures(size=both.image_size[0])
    torch.testing.assert_close(both(pixels)[:, 1:], patches(pixels))


def test_a_stage_is_flattened_row_by_row():
    for layer in (0, 2, -1):
        torch.manual_seed(1)
        tower = build_vision("timm", "test_efficientnet", layer=layer, image_size=64)
        torch.manual_seed(1)
        model = timm.create_model("test_efficientnet").eval()
        pixels = pictures(size=64)
        maps = model.forward_intermediates(normalised(tower, pixels), intermediates_only=True)[layer]
        assert maps.shape[1:] == (tower.dim, *tower.grid)
        torch.testing.assert_close(tower(pixels), maps.permute(0, 2, 3, 1).reshape(2, -1, tower.dim))


def test_a_cast_leaves_the_constants_in_float32():
    """bf16 has 8 bits of mantissa, which tell 0.485 from nothing nearer than 0.486."""
    tower = build_vision("hf", CLIP).to(torch.bfloat16)
    assert tower.dtype == torch.bfloat16 and tower._constants.dtype == torch.float32
    assert tower._constants.flatten().tolist() == torch.tensor([*tower.mean, *tower.std]).tolist()
    assert not any("_constants" in name for name in tower.state_dict())


@pytest.mark.parametrize(("kind", "name"), [("open_clip", "tiny-clip"), ("timm", "tiny_siglip"), ("hf", SIGLIP)])
def test_another_image_size_changes_the_grid(kind, name):
    tower = build_vision(kind, name, image_size=(24, 32))
    assert tower.image_size == (24, 32) and tower.grid == (6, 8) and tower.tokens == 48
    assert tower(torch.zeros(1, 3, 24, 32, dtype=torch.uint8)).shape == (1, 48, 16)
