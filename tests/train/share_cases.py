"""What ranks share before the first step, case after case in one gloo group; run by test_sharing.py.

python -m tests.train.share_cases FOLDER, with the launcher's environment. Each rank prints one JSON line a case and
leaves the cache and the projector in FOLDER/RANK-of-RANKS.pt.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch

import mmit.train.engines.world as world_module
from mmit.data.preparation import ImagePreparation
from mmit.errors import ConfigError, ImageError, MmitError, RecordError
from mmit.models.projectors import build_projector
from mmit.models.vision import VisionTower, build_vision
from mmit.records import Image, Record, Text, Turn, write_jsonl
from mmit.train.align import Alignment, align_to_captions
from mmit.train.engines.world import World
from mmit.train.features import CachePlan, FeatureCache, compute_features

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
COUNT, BATCH = 23, 5
decoded: list[str] = []


class Counting(ImagePreparation):
    """Notes what it decodes."""

    def pixels(self, image: Image, *, where: str = "") -> torch.Tensor:
        decoded.append(Path(str(image.source)).name)
        return super().pixels(image, where=where)


EYE = Counting((16, 16), "resize", "bicubic", (0, 0, 0), tokens=4)


def write_pictures(folder: Path) -> dict[str, Image]:
    """Pictures of noise, two of them equal, as their captions name them."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for i in range(COUNT):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i % 22))
        PIL.Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
        made[f"k{i}"] = Image(str(folder / f"{i:02d}.png"))
    turns = [(Turn("user", (image,)), Turn("assistant", (Text("ab"[i % 2]),))) for i, image in enumerate(made.values())]
    write_jsonl([Record(t, id=str(i)) for i, t in enumerate(turns)], folder / "captions.jsonl")
    write_jsonl([Record.triple("Say a.", "a", id="no picture")], folder / "bad.jsonl")
    return made


class Model:
    """What an alignment needs of a composite."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vision = build_vision("hf", CLIP)
        self.projector = build_projector("mlp", vision_dim=8, llm_dim=16, grid=(2, 2)).to(torch.bfloat16)
        self.device = torch.device("cpu")
        self.word_embeddings = torch.nn.Parameter(torch.randn(40, 16))
        table = torch.nn.Embedding.from_pretrained(self.word_embeddings, freeze=False)
        self.llm = SimpleNamespace(get_input_embeddings=lambda: table)


class Bench:
    """The cases, on this rank."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world, self.model = folder, world, Model()
        self.pictures = {f"k{i}": Image(str(folder / "pictures" / f"{i:02d}.png")) for i in range(COUNT)}
        self.own = folder / f"cache-{world.size}"

    def features(self, kind: str, tower: VisionTower | None = None, **options: Any) -> FeatureCache:
        decoded.clear()
        given: dict[str, Any] = {"count": COUNT, "kind": kind, "folder": self.own, "batch": BATCH}
        tower, plan = tower or self.model.vision, CachePlan(**given | options)
        return compute_features(tower, self.pictures.items(), EYE, plan, world=self.world)

    def align(self, captions: str, phases: list[str]) -> None:
        options: dict[str, Any] = {
            "features": None,
            "world": self.world,
            "begin": phases.append,
        }
        plan = Alignment(str(self.folder / "pictures" / captions), epochs=3, lr=1e-2, seed=1)
        tokenizer = lambda text, add_special_tokens: {"input_ids": [ord(text[1]) % 40]}  # noqa: E731
        model = SimpleNamespace(vlm=self.model, tokenizer=tokenizer, folder=self.folder)
        align_to_captions(model, EYE, plan, **options)  # type: ignore[arg-type]


def refused(kind: type[MmitError], work: Any) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    return ""


def report(case: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"case": case, **facts}) + "\n")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    world = World(rank, size, torch.device("cpu"), deepspeed=True, local_rank=rank)
    bench, keys = Bench(folder, world), [f"k{i}" for i in range(COUNT)]
    memory = bench.features("memory").get(keys)
    report("memory", decoded=sorted(decoded))
    written = bench.features("disk").get(keys)
    report("disk, empty", decoded=sorted(decoded), same=torch.equal(written, memory))
    world.barrier()
    read = bench.features("disk").get(keys)
    report("disk, full", decoded=sorted(decoded), same=torch.equal(read, memory))
    if rank:  # a folder of its own for this rank, as where nodes share none: there the features are lost
        bench.own = folder / f"cache-{size}-{rank}"
        shutil.rmtree(bench.own, ignore_errors=True)
    bench.world = World(rank, size, world.device, deepspeed=True)  # each rank is the first of its node
    lost = bench.features("disk").get(keys)
    report("disk, lost on one node", decoded=sorted(decoded), same=torch.equal(lost, memory))
    kept = bench.features("disk").get(keys)
    report("disk, kept on every node", decoded=sorted(decoded), same=torch.equal(kept, memory))
    file = next(bench.own.glob("features-*/features-*.bin"))
    world.barrier()
    if rank == size - 1:
        os.truncate(file, file.stat().st_size - 8)
    cut = bench.features("disk").get(keys)
    report("disk, cut off on one node", decoded=sorted(decoded), same=torch.equal(cut, memory))

    phases: list[str] = []
    world_module.ALIVE = 0.0
    bench.align("captions.jsonl", phases)
    moves = phases[phases.index("word alignment") :]
    report("alignment", phases=moves)
    projector = {name: tensor.clone() for name, tensor in bench.model.projector.state_dict().items()}
    torch.save({"memory": memory, **projector}, folder / f"{rank}-of-{size}.pt")
    report("bad captions", told=refused(RecordError, lambda: bench.align("bad.jsonl", [])))
    begun = time.monotonic()
    if rank == size - 1:  # one rank cannot read a picture
        bench.pictures["k7"] = Image(str(folder / "nowhere.png"))
    report("missing picture", told=refused(ImageError, lambda: bench.features("memory")))
    if rank == size - 1:
        bench.pictures["k7"] = Image(str(folder / "pictures" / "captions.jsonl"))
    report("other bytes", told=refused(MmitError, lambda: bench.features("memory")))
    if rank == size - 1:
        bench.pictures["k7"] = bench.pictures["k1"]
    report("other pictures", told=refused(ConfigError, lambda: bench.features("memory")) if size > 1 else "")
    assert time.monotonic() - begun < 60
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
