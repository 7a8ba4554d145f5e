"""prismatic-vlms' run folders, made here under the names of its code from tiny random models, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mmit.cli import app
from mmit.errors import ModelError
from mmit.interop.foreign import is_foreign, read_foreign
from mmit.models.interop.hf_towers import hf_tower
from mmit.models.interop.prismatic import TOWERS
from mmit.models.vision import build_vision
from mmit.train.checkpoint.model import load_model
from tests.interop.test_llava import parts
from tests.tiny_run import write_records

CLIP, SIGLIP = "clip-vit-l-336px", "siglip-vit-so400m"
TINY = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 16}


def timm_tower(folder: Path, name: str) -> Any:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {**TINY, "mlp_ratio": 2}
    model: Any = timm.create_model(name.split(".")[0], **sizes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    config = {"pretrained_cfg": {**model.pretrained_cfg, "input_size": (3, 16, 16)}}
    save_for_hf(model, str(folder), model_config=config, model_args=sizes, safe_serialization=True)
    return model.eval()


def save(out: Path, state: dict[str, Any], **changes: Any) -> None:
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    told = {"model_id": "tiny", "llm_backbone_id": "vicuna-v15-7b", "vision_backbone_id": CLIP}
    told |= {"arch_specifier": "no-align+gelu-mlp", "image_resize_strategy": "letterbox", **changes}
    (out / "config.json").write_text(json.dumps({"model": told, "seed": 7}))
    torch.save({"model": state}, out / "checkpoints" / "latest-checkpoint.pt")


def make(folder: Path, **changes: Any) -> tuple[Path, dict[str, Any], dict[str, Any], nn.Module, Any, Any]:
    """(run folder, parts of its checkpoint, options that read it, projector, timm's tower, the LLM)."""
    _, tokenizer, _ = parts(folder)
    tower = timm_tower(folder / "eye", TOWERS[changes.get("vision_backbone_id", CLIP)])
    llm: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    llm.resize_token_embeddings(len(tokenizer) + 1, pad_to_multiple_of=64)
    width = llm.config.hidden_size
    layers: Any = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width))
    if "linear" in changes.get("arch_specifier", ""):
        layers = nn.Linear(16, width)
    state = {
        "projector": {f"projector.{k}": v for k, v in layers.state_dict().items()},
        "llm_backbone": {f"llm.{k}": v for k, v in llm.state_dict().items()},
    }
    save(folder / "run", state, **changes)
    told = {"chat": "vicuna_v1", "base": str(folder / "base"), "tower": f"local-dir:{folder / 'eye'}"}
    return folder / "run", state, told, layers, tower, llm.eval()


@torch.no_grad()
def compare(found: Any, layers: nn.Module, tower: Any, llm: Any) -> None:
    """Image tokens as Prismatic computes them, and logits over them."""
    eye = found.vlm.vision
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    normal = (pixels / 255 - torch.tensor(eye.mean).view(3, 1, 1)) / torch.tensor(eye.std).view(3, 1, 1)
    (patches,) = tower.get_intermediate_layers(normal, n={len(tower.blocks) - 2})
    tokens = layers(patches)
    torch.testing.assert_close(found.vlm.projector(eye(pixels)), tokens, atol=1e-5, rtol=0)
    ours = found.vlm.llm(inputs_embeds=tokens).logits
    torch.testing.assert_close(ours, llm(inputs_embeds=tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "pad"),
        ({"vision_backbone_id": SIGLIP, "arch_specifier": "linear", "image_resize_strategy": "resize-naive"}, "resize"),
        ({"vision_backbone_id": "dinov2-vit-l"}, "pad"),
    ],
)
def test_a_run_folder(tmp_path: Path, changes: dict[str, Any], mode: str) -> None:
    out, _, told, *reference = make(tmp_path, **changes)
    assert is_foreign(out)
    found = read_foreign(out, **told)
    compare(found, *reference)
    assert found.image["mode"] == mode
    start = tmp_path / "start"
    options = [word for name, value in told.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(app, ["import-model", str(out), str(start), *options])
    assert result.exit_code == 0, result.output
    compare(load_model(start, device="cpu"), *reference)


def test_training_starts_from_it(tmp_path: Path) -> None:
    out, _, told, *reference = make(tmp_path)
    data, run = write_records(tmp_path / "data", count=3, text_only=1), tmp_path / "tuned"
    options = [word for name, value in told.items() for word in (f"--{name}", value)]
    options += [f"data.train.0.path={data}", f"run.dir={run}", "train.epochs=null", "train.steps=2"]
    rates = ["tune.llm.mode=lora", "tune.llm.lr=1e-3", "tune.projector.lr=1e-3", "data.workers=0"]
    result = CliRunner().invoke(app, ["train", "--from", str(out), *options, *rates])
    assert result.exit_code == 0, result.output
    compare(load_model(run / "start", device="cpu"), *reference)
    written = CliRunner().invoke(app, ["export", str(run), "--format", "llava-hf", "--out", str(tmp_path / "written")])
    assert written.exit_code == 0, written.output


def test_a_trained_tower_is_used_and_an_untrained_llm_comes_from_the_base(tmp_path: Path) -> None:
    out, state, told, layers, tower, _ = make(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        tower.norm_pre.bias.add_(1.0)
    own = {f"featurizer.{k}": v for k, v in tower.state_dict().items()}
    save(out, {"projector": state["projector"], "vision_backbone": own})
    compare(read_foreign(out, **told), layers, tower, base)
    del own["featurizer.cls_token"]
    save(out, {"projector": state["projector"], "vision_backbone": own})
    with pytest.raises(ModelError, match="1 missing: cls_token"):
        read_foreign(out, **told)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"arch_specifier": "no-align+gelu-mlp-3"}, "did you mean 'gelu-mlp'"),
        ({"arch_specifier": "no-align+fused-gelu-mlp"}, "layers.0|left over|missing"),
        ({"vision_backbone_id": "dinosiglip-vit-so-384px"}, "with another colour"),
        ({"vision_backbone_id": "siglip-vit-so400"}, "siglip-vit-so400m"),
        ({"vision_backbone_id": SIGLIP}, "was trained with vit_so400m_patch14_siglip_224"),
        ({"vision_backbone_id": "clip-vit-b"}, "resize-naive"),
        ({"image_resize_strategy": "corner-pad"}, "image_resize_strategy is 'corner-pad'"),
        ({"arch_specifier": "linear"}, r"left over: .*0\.2\.weight|left over: layers"),
    ],
)
def test_what_mmit_does_not_compute_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    out, state, told, *_ = make(tmp_path)
    save(out, state, **changes)
    with pytest.raises(ModelError, match=f"(?s){problem}"):
        read_foreign(out, **told)


def test_bad_checkpoints_and_bases_are_told(tmp_path: Path) -> None:
    out, state, told, *_ = make(tmp_path)
    with pytest.raises(ModelError, match="(?s)'vicuna-v15-7b'.*--base"):
        read_foreign(out, **{**told, "base": None})
    words = state["llm_backbone"]["llm.model.embed_tokens.weight"]
    more = torch.cat([words, words, words])
    for parts_of, problem in (
        ({"llm_backbone": {}}, "holds no projector"),
        ({**state, "action_head": {}}, "left over: action_head"),
        ({**state, "projector": {**state["projector"], "projector.4.weight": words}}, r"left over: layers\.4\.weight"),
        ({**state, "llm_backbone": {"llm.model.embed_tokens.weight": more}}, f"{len(more)} word embeddings"),
        ({**state, "llm_backbone": {"llm.model.embed_tokens.weight": words}}, "missing: "),
    ):
        save(out, parts_of)
        with pytest.raises(ModelError, match=problem):
            read_foreign(out, **told)
    (out / "checkpoints" / "latest-checkpoint.pt").unlink()
    with pytest.raises(ModelError, match="holds no checkpoints/latest-checkpoint.pt"):
        read_foreign(out, **told)


def test_the_names_of_towers_are_timms() -> None:
    tagged = timm.list_pretrained()
    assert not [name for name in TOWERS.values() if name not in tagged]


def test_a_clip_tower_of_timm_is_one_of_transformers(tmp_path: Path) -> None:
    timm_tower(tmp_path / "eye", TOWERS[CLIP])
    eye = build_vision("timm", f"local-dir:{tmp_path / 'eye'}", layer=-2)
    config, _ = hf_tower(eye)
    assert (config.model_type, config.hidden_act, config.num_hidden_layers) == ("clip_vision_model", "quick_gelu", 2)
