"""Prismatic's run folders of two towers, against its forward pass written out here; imported, trained, moved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mmit
from mmit.cli import app
from mmit.cli.export import make_start
from mmit.data.chat_writer import IMAGE_SLOT
from mmit.data.preparation import prepare_images
from mmit.errors import ModelError
from mmit.interop.export import logits_of
from mmit.interop.foreign import read_foreign
from mmit.models.interop.prismatic import FUSED_TOWERS
from mmit.records import Image, Text, Turn
from mmit.train.checkpoint.model import load_model
from tests.interop.test_llava import parts
from tests.interop.test_prismatic import save, timm_tower
from tests.tiny_run import write_records

SIGLIP, CLIP = "dinosiglip-vit-so-224px", "dinoclip-vit-l-336px"
IDS = [1, 9, 4, 7, 12]


class Prismatic(nn.Module):
    """Its forward pass: each featurizer's second-to-last block on the picture in its own normalisation, joined,
    through the projector, put after the first token of the prompt."""

    def __init__(self, towers: dict[str, Any], projector: nn.Module, llm: Any) -> None:
        super().__init__()
        self.towers, self.projector, self.llm = towers, projector, llm

    @torch.no_grad()
    def forward(self, picture: PIL.Image.Image, ids: list[int]) -> torch.Tensor:
        """Logits (T, V) of a prompt about a picture."""
        shown = picture.convert("RGB").resize((16, 16), PIL.Image.Resampling.BICUBIC)  # resize-naive
        pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
        patches = []
        for tower in self.towers.values():
            mean, std = (torch.tensor(tower.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
            (found,) = tower.get_intermediate_layers((pixels - mean) / std, n={len(tower.blocks) - 2})
            patches.append(found)
        seen = self.projector(torch.cat(patches, dim=2))
        words = self.llm.get_input_embeddings()(torch.tensor([ids]))
        return self.llm(inputs_embeds=torch.cat([words[:, :1], seen, words[:, 1:]], dim=1)).logits[0]


def make(folder: Path, backbone: str, *, trained: bool = False) -> tuple[Path, dict[str, str], Prismatic]:
    """(run folder, options that read it, its forward pass)."""
    _, tokenizer, _ = parts(folder)
    names, _size = FUSED_TOWERS[backbone]
    towers = {part: timm_tower(folder / part, name) for part, name in names.items()}
    llm: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    llm.resize_token_embeddings(len(tokenizer) + 1, pad_to_multiple_of=64)
    width = llm.config.hidden_size
    head = (nn.Linear(32, 128), nn.GELU(), nn.Linear(128, width), nn.GELU(), nn.Linear(width, width))
    reference = Prismatic(towers, nn.Sequential(*head), llm.eval())
    state = {
        "projector": {f"projector.{k}": v for k, v in reference.projector.state_dict().items()},
        "llm_backbone": {f"llm.{k}": v for k, v in llm.state_dict().items()},
    }
    if trained:
        with torch.no_grad():
            for tower in towers.values():
                tower.blocks[0].norm1.bias.add_(0.5)
        own = {f"{part}_featurizer.{k}": v for part, tower in towers.items() for k, v in tower.state_dict().items()}
        state["vision_backbone"] = own
    told = {"vision_backbone_id": backbone, "arch_specifier": "no-align+fused-gelu-mlp"}
    save(folder / "run", state, image_resize_strategy="resize-naive", **told)
    sources = ",".join(f"local-dir:{folder / part}" for part in names)
    return folder / "run", {"chat": "vicuna_v1", "base": str(folder / "base"), "tower": sources}, reference


def picture() -> PIL.Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def compare(found: Any, reference: Prismatic) -> None:
    preparation = prepare_images(found.image, tokens=found.vlm.image_tokens, grid=found.vlm.image_grid)
    talk = (Turn("user", (Image(picture()), Text("x"))),)
    ours = logits_of(found.vlm, [IDS[0], IMAGE_SLOT, *IDS[1:]], talk, preparation=preparation)
    theirs = reference(picture(), IDS)
    assert float(theirs.std()) > 0.01 and not torch.allclose(theirs, theirs[:1])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("backbone", "trained"), [(SIGLIP, False), (SIGLIP, True), (CLIP, False)])
def test_a_folder_gives_prismatics_logits_and_so_does_what_is_imported(
    tmp_path: Path, backbone: str, trained: bool
) -> None:
    out, told, reference = make(tmp_path / "theirs", backbone, trained=trained)
    compare(read_foreign(out, **told), reference)
    make_start(str(out), tmp_path / "start", **told)
    shutil.rmtree(tmp_path / "theirs")  # a start refers to nothing outside
    found = load_model(tmp_path / "start", device="cpu")
    compare(found, reference)
    answer = mmit.load(tmp_path / "start", device="cpu").chat(picture(), "What is it?", max_new_tokens=3)
    assert isinstance(answer, str)


def test_training_starts_from_it_and_its_export_stands_alone(tmp_path: Path) -> None:
    out, told, reference = make(tmp_path / "theirs", SIGLIP)
    data, run = write_records(tmp_path / "data", count=3, text_only=1), tmp_path / "tuned"
    options = [word for name, value in told.items() for word in (f"--{name}", value)]
    options += [f"data.train.0.path={data}", f"run.dir={run}", "train.epochs=null", "train.steps=2"]
    rates = ["tune.llm.mode=lora", "tune.llm.lr=1e-3", "tune.projector.lr=1e-3", "data.workers=0"]
    result = CliRunner().invoke(app, ["train", "--from", str(out), *options, *rates])
    assert result.exit_code == 0, result.output
    compare(load_model(run / "start", device="cpu"), reference)
    tuned = mmit.load(run, device="cpu").chat(picture(), "What is it?", max_new_tokens=8)
    refused = CliRunner().invoke(app, ["export", str(run), "--format", "llava-hf", "--out", str(tmp_path / "hf")])
    assert refused.exit_code != 0 and not (tmp_path / "hf").exists()
    assert "fused" in f"{refused.output}{refused.exception}"
    written = CliRunner().invoke(app, ["export", str(run), "--format", "mmit", "--out", str(tmp_path / "alone")])
    assert written.exit_code == 0, written.output
    shutil.rmtree(tmp_path / "theirs")
    shutil.rmtree(run)
    assert mmit.load(tmp_path / "alone", device="cpu").chat(picture(), "What is it?", max_new_tokens=8) == tuned


def test_a_fused_folder_needs_both_towers(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    told = {"vision_backbone_id": SIGLIP, "arch_specifier": "fused-gelu-mlp", "llm_backbone_id": "x"}
    save(tmp_path / "run", {"projector": {}}, image_resize_strategy="resize-naive", **told)
    with pytest.raises(ModelError, match="names 1 towers"):
        read_foreign(tmp_path / "run", chat="vicuna_v1", base="x", tower="local-dir:/a")
