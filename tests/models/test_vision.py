import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmit.errors import ModelError
from mmit.models.vision import build_vision

SIZE, BLOCKS = 16, 4  # as in conftest
DIMS = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
CLIP = {"model_type": "clip_vision_model", "image_size": SIZE, "patch_size": 4, **DIMS}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pictures(batch=2, size=SIZE):
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)


def noise(module):
    """Random values everywhere, so that no zero bias or unit scale can hide a mistake."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.2)
    return module


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


def test_only_uint8_pictures_of_the_right_size():
    tower = build_vision("hf", CLIP)
    with pytest.raises(ModelError, match="normalises uint8 pixels itself"):
        tower(pictures().float())
    with pytest.raises(ModelError, match=r"\(1, 3, 8, 8\)\nit takes \(B, 3, 16, 16\)"):
        tower(pictures(1, 8))
    assert tower(pictures(0)).shape == (0, 16, 16)


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
