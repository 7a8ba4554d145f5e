"""Pairs and labels about pictures, and the gradient of a preference method on a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F

from mmit.data.chat import chat_format
from mmit.data.loader import MicroBatch, micro_batches
from mmit.data.packing import Sample
from mmit.data.preference import METHODS, mates, mismatch
from mmit.data.preparation import prepare_images
from mmit.models.assemble import assemble
from mmit.models.planning import row_planner
from mmit.models.tuning import apply_tuning
from mmit.records import Image, Record, Text, Turn, write_jsonl
from mmit.train.checkpoint.model import image_preparation
from mmit.train.data.batches import Upload
from mmit.train.data.setup import Encoding, image_loader, open_data
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.objective import Method, Preference
from tests.tiny_run import COLOURS
from tests.tiny_run import two_layers as tiny_config

NAMES = list(COLOURS)


def pair_records(folder: Path, *, count: int = 4, kind: str = "dpo") -> list[Record]:
    """A picture of one colour each; answers of different lengths, the right one chosen, or labelled good."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        right, wrong = NAMES[i % 4], NAMES[(i + 1) % 4] + " or so" * (i % 3)
        path = folder / f"{i}.png"
        PIL.Image.new("RGB", (20 + i, 24), COLOURS[right]).save(path)
        asked = Turn("user", (Image(str(path)), Text("What color is it?" + " Look." * (i % 2))))
        given: dict[str, Any] = {"id": f"r{i}"}
        if METHODS[kind] == "pairs":
            given["rejected"] = Turn("assistant", (Text(wrong),))
        else:
            given["label"] = i % 3 != 1
        answer = right if given.get("label", True) else wrong
        records.append(Record((asked, Turn("assistant", (Text(answer),))), **given))
    return records


def write_pairs(folder: Path, **given: Any) -> Path:
    """Write them as JSONL."""
    write_jsonl(pair_records(folder, **given), folder / "pairs.jsonl")
    return folder / "pairs.jsonl"


class Data:
    """As much of TrainData as `Preference` asks for."""

    def __init__(self, batches: Sequence[MicroBatch] = ()) -> None:
        self._batches, self.prepare = list(batches), lambda batch: Upload(torch.device("cpu"))(batch.tensors)

    def batches(self) -> list[MicroBatch]:
        return self._batches


class Bench:
    """A tiny model that sees, its data, and losses and gradients of a method on any rows of them.

    `model` is another than the tiny one: (vlm, tokenizer, how pictures are brought to it).
    """

    def __init__(self, folder: Path, kind: str, *, count: int = 4, model: Any = None) -> None:
        config = tiny_config(folder)
        self.kind, self.count = kind, count
        if model is not None:
            self.vlm, tokenizer, image = model
        else:
            self.vlm, tokenizer = assemble(config.model.model_dump(), dtype=torch.float32, seed=0, packed=True)
            image = image_preparation(self.vlm.vision, config.model.vision)
        preparation = prepare_images(image, tokens=self.vlm.image_tokens, grid=self.vlm.image_grid)
        path = write_pairs(folder / kind, kind=kind, count=count)
        self.data = open_data(
            [{**config.data.train[0].model_dump(), "path": str(path)}],
            Encoding(chat_format("hf" if model is None else "vicuna_v1", tokenizer), tokenizer),
            cache=folder,
            on_bad=None,
            preparation=preparation,
            max_length=128,
            capacity=4096,
            compares=METHODS[kind],
        )
        self.scan = self.data.scan()
        assert not self.scan.bad, self.scan.bad
        self.load_image = image_loader(preparation)
        self.tune = config.tune.model_dump() | {"llm": {"mode": "full", "lr": 1e-2, "options": {}}}
        if model is None:
            with torch.no_grad():  # a random model's answers are all alike: give them something to tell
                for p in self.vlm.llm.parameters():
                    p.mul_(3.0 if p.dim() > 1 else 1.0)
        # Near what the model gives, so that no loss is flat, and with answers of others that have moved: KTO's estimate
        # is then above the 0 at which it is cut off.
        own = Preference(Method(self.kind), self.vlm)
        found = own.measure(self.engine(), Data(self.batches([list(range(count))])), count)
        torch.manual_seed(1)
        self.reference = found + 0.5 * torch.randn(count, 2) - torch.tensor([0.0, 1.0])

    def batches(self, rows: list[list[int]], **given: Any) -> list[MicroBatch]:
        return list(micro_batches(self.data, self.scan, rows, load_image=self.load_image, **given))

    def engine(self) -> TorchEngine:
        vlm = copy.deepcopy(self.vlm)
        groups = apply_tuning(vlm, self.tune)
        vlm.train()
        return TorchEngine(vlm, groups, device=torch.device("cpu"), precision="fp32")

    def step(
        self, method: Method, rows: list[list[int]], *, planned: bool = False, **given: Any
    ) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
        """(loss, gradients, metrics) of one step over these rows, as the loop makes it; planned ahead or not."""
        engine, data = self.engine(), Data()
        given["plan_row"] = row_planner(engine.model) if planned else None  # type: ignore[arg-type]
        batches = self.batches(rows, **given)
        work = Preference(method, engine.model, self.reference if method.referenced else None)
        work.begin(engine, data, batches)
        whole, loss = sum(batch.loss_weight for batch in batches), 0.0
        for number, batch in enumerate(batches):
            losses = engine.forward_backward(
                data.prepare(batch),
                scale=batch.weight / whole,
                last=number == len(batches) - 1,
                weights=batch.uneven_weights,
                reduce=lambda found, batch=batch: work.losses(found, batch),
            )
            loss += float((losses * batch.loss_weights).sum()) * batch.weight / whole
        names = zip(engine.names, engine.masters, strict=True)
        return loss, {n: torch.zeros_like(m) if m.grad is None else m.grad for n, m in names}, work.metrics(engine)

    def samples(self) -> list[list[Sample]]:
        """The answers of every unit; of labels each with its mismatched one."""
        found = [list(self.data.samples(n)[0]) for n in range(self.count)]
        if METHODS[self.kind] == "labels":
            other = mates(self.count)
            found = [[own[0], mismatch(own[0], found[other[n]][0], max_length=128)] for n, own in enumerate(found)]
        return found

    def alone(self, vlm: Any, number: int, sample: Sample) -> torch.Tensor:
        """Log-probability of one answer in a sequence of its own, by the model's own forward, no row and no packing."""
        image = self.data.record(number).images[0]
        features = vlm.image_embeddings(vlm.encode_images(self.load_image(image, "")))[0]
        words = vlm.llm.get_input_embeddings()
        ids = [t for t in sample.ids]
        slot = ids.index(next(t for t in ids if t < 0))
        before, after = (words(torch.tensor(part)) for part in (ids[:slot], ids[slot + 1 :]))
        embeddings = torch.cat([before, features, after])[None]
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
        logits = vlm.llm(inputs_embeds=embeddings, attention_mask=mask).logits[0].double()
        shift = len(features) - 1
        places = [(i + (shift if i > slot else 0), t) for i, t in enumerate(ids) if sample.weights[i] > 0]
        at, targets = (torch.tensor(column) for column in zip(*places, strict=True))
        return -F.cross_entropy(logits[at - 1], targets, reduction="sum")
