"""Measure what the data layer promises, paired in one run; prints a table and one JSON. Takes about three minutes.

    python scripts/bench_data.py

1. shard -> RGB tensor, one process, crc checked, against webdataset + PIL: the same tars, in turns, medians.
2. Start-up (seconds, memory) on an index of a million rows, in a fresh process.
3. Resume in a fresh process at 10 % and 90 % of the first epoch of a million and in the eighth: order, rows, record.
4. Planning of packed rows, and the linter's text checks: records a minute on one core.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# What a fresh process does from a cold start to its first record; memory is this process's own.
START = """
import json, resource, sys, time
begin = time.perf_counter()
from mmit.data.shards.reader import open_shards
source = open_shards(sys.argv[1])
size, row = len(source), source.index.samples[len(source) // 2]
source.index.members[int(row["member"])]
seconds = time.perf_counter() - begin
status = open("/proc/self/status").read()
rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
print(json.dumps({"rows": size, "seconds": round(seconds, 3), "rss_mb": round(rss, 1)}))
"""
RESUME = """
import json, sys, time
import numpy as np
from mmit.data.measure import Measurements
from mmit.data.shards.reader import open_shards
from mmit.train.data.order import Ordering, make_row_order
def asked(epochs, steps=None):
    mixing = {"scheme": "weights", "cap": None, "temperature": 2.0}
    return Ordering([1.0], mixing, seed=1, capacity=2048, rows_per_step=8, epochs=epochs, steps=steps)
def row_order_of(known):
    return make_row_order(scan, asked(10), known=known)
size = len(open_shards(sys.argv[1]))
lengths = np.random.default_rng(0).integers(100, 700, size)
zeros = np.zeros(size, np.int64)
scan = Measurements(np.arange(size), zeros, zeros, lengths, zeros)
facts = {"segment": 0, "first_row": 0, "rows": 1, "epochs": 10}
facts |= make_row_order(scan, asked(None, steps=1))[1]
found, segments = {}, -(-size // 65536)
for name, share in (("at_10_percent", 0.1), ("at_90_percent", 0.9), ("in_epoch_8", 7.5)):
    begin = time.perf_counter()
    source = open_shards(sys.argv[1])
    segment = int(share * segments)
    row_order, _ = row_order_of({**facts, "segment": segment, "first_row": segment * 10000, "rows": 10**7})
    (first, *_) = row_order.row(segment * 10000 + 77)
    source.key(first)
    found[name + "_s"] = round(time.perf_counter() - begin, 3)
print(json.dumps(found))
"""


def picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG with structure and some noise, so that its size is that of a photograph."""
    import PIL.Image

    width, height = size
    coarse = PIL.Image.fromarray(rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8))
    noise = PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
    out = io.BytesIO()
    PIL.Image.blend(coarse.resize(size, PIL.Image.Resampling.BICUBIC), noise, 0.06).save(out, "JPEG", quality=90)
    return out.getvalue()


def build(folder: Path, *, number: int, size: tuple[int, int]) -> None:
    """Write `number` captioned pictures as shards."""
    from mmit.data.shards.writer import build_shards
    from mmit.records import Record

    rng = np.random.default_rng(0)
    pictures = [picture(rng, size) for _ in range(min(number, 64))]
    records = (
        Record.triple("What is shown?", f"picture {i}", images=[pictures[i % len(pictures)]]) for i in range(number)
    )
    build_shards(records, folder, max_bytes=64 << 20)


def with_mmit(folder: Path) -> Iterator[object]:
    """Yield tensors, every record parsed and every byte checked."""
    from mmit.data.decode import decode_rgb
    from mmit.data.shards.reader import open_shards

    source = open_shards(folder)
    for number in range(len(source)):
        for image in source[number].images:
            assert isinstance(image.source, bytes)
            yield decode_rgb(image.source)


def with_mmit_shuffled(folder: Path) -> Iterator[object]:
    """The same in random order, which webdataset cannot do."""
    from mmit.data.decode import decode_rgb
    from mmit.data.mixture import epoch_order
    from mmit.data.shards.reader import open_shards

    source = open_shards(folder)
    for number in epoch_order([len(source)], [1.0], seed=0, epoch=0).tolist():
        for image in source[number].images:
            assert isinstance(image.source, bytes)
            yield decode_rgb(image.source)


def with_webdataset(folder: Path) -> Iterator[object]:
    """webdataset's own decoder to uint8 tensors (PIL inside), JSON parsed, nothing checked."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("torchrgb8"):
        yield sample["0.jpg"]


def rate(read: Callable[[Path], Iterator[object]], folder: Path) -> tuple[float, float]:
    """Samples per second, and per second of processor time, of one pass."""
    begin, busy = time.perf_counter(), time.process_time()
    number = sum(1 for _ in read(folder))
    return number / (time.perf_counter() - begin), number / (time.process_time() - busy)


def throughput(scratch: Path, *, number: int, size: tuple[int, int], rounds: int) -> dict[str, object]:
    """Run the readers in turns on the same tars."""
    import torch

    folder = scratch / f"shards-{size[0]}x{size[1]}"
    build(folder, number=number, size=size)
    ours, theirs = next(with_mmit(folder)), next(with_webdataset(folder))
    assert torch.equal(ours, theirs)  # type: ignore[arg-type]
    readers = {"mmit": with_mmit, "webdataset": with_webdataset, "mmit_shuffled": with_mmit_shuffled}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            found[name].append(rate(read, folder))
    report: dict[str, object] = {"picture": f"{size[0]}x{size[1]}", "samples": number}
    # Processor time as well, since another program on the machine disturbs it less.
    for which, unit in enumerate(("per_second", "per_cpu_second")):
        ratios = [a[which] / b[which] for a, b in zip(found["mmit"], found["webdataset"], strict=True)]
        report[unit] = {
            **{name: round(statistics.median(value[which] for value in values)) for name, values in found.items()},
            "ratio": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return report


def million_rows(folder: Path, rows: int) -> None:
    """Write an index of `rows` samples without their tars' contents, two members each."""
    from mmit.data.shards.index import MEMBER, SAMPLE, Part, write_index

    per_shard, parts = 10_000, []
    for number in range(-(-rows // per_shard)):
        count = min(per_shard, rows - number * per_shard)
        samples, members = np.zeros(count, SAMPLE), np.zeros(2 * count, MEMBER)
        samples["member"], samples["members"], samples["images"] = np.arange(count) * 2, 2, 1
        samples["key"], samples["key_size"], samples["chars"] = np.arange(count) * 9, 9, 100
        members["start"], members["lead"], members["size"] = np.arange(2 * count) * 2048, 512, 1000
        keys = "".join(f"{number * per_shard + i:09d}" for i in range(count)).encode()
        size = 2 * count * 2048 + 1024
        part = Part(f"shard-{number:06d}.tar", size, 0, samples, members, bytearray(keys), {"": 0}, {"json": 0})
        with open(folder / part.name, "wb") as file:
            file.truncate(size)  # a hole: takes no room
        parts.append(part)
    write_index(parts, folder)


def planning(units: int) -> dict[str, object]:
    """Rows of 2,048 tokens from `units` records of 100 to 700."""
    from mmit.data.packing import plan_rows

    lengths = np.random.default_rng(0).integers(100, 700, units)
    begin = time.process_time()
    rows = plan_rows(lengths, capacity=2048, order=np.random.default_rng(1).permutation(units))
    seconds = time.process_time() - begin
    fill = float(lengths.sum()) / (2048 * len(rows))
    return {"records": units, "records_per_minute": round(units / seconds * 60), "fill": round(fill, 4)}


def linting(rows: int) -> dict[str, object]:
    """The text checks of `mmit data check`, reading included."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("bench_lint.py")), "--rows", str(rows)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


def show(report: dict[str, Any]) -> None:
    """Print each promise beside what was measured."""
    lines = [
        (f"tensors/s, {t['picture']}, mmit : webdataset", ">= 1.3", "{mmit} : {webdataset} = {ratio}".format(**per))
        for t in report["throughput"]
        for per in [t["per_second"]]
    ]
    start, resume = report["start_up"], report["resume"]
    lines += [
        (f"start-up on {start['rows']:,} rows", "< 3 s, < 200 MB", f"{start['seconds']} s, {start['rss_mb']} MB"),
        ("resume", "< 2 s anywhere", ", ".join(f"{value} s {name[:-2]}" for name, value in resume.items())),
        ("linter, records a minute", ">= 100,000", f"{report['lint']['rows_per_minute']:,}"),
        ("planning, records a minute", "", f"{report['planning']['records_per_minute']:,}"),
    ]
    for what, promised, found in lines:
        print(f"{what:44} {promised:18} {found}")


def fresh(code: str, folder: Path) -> dict[str, object]:
    """Run code in a new interpreter."""
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--lint-rows", type=int, default=50_000)
    args = parser.parse_args()
    import torch
    import webdataset

    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "python": platform.python_version(),
        "webdataset": webdataset.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sizes = [(64, 64), (336, 336), (640, 480)]
        report["throughput"] = [
            throughput(scratch, number=args.samples, size=size, rounds=args.rounds) for size in sizes
        ]
        rows = scratch / "million"
        rows.mkdir()
        million_rows(rows, args.rows)
        report["index_bytes_per_row"] = round(sum(f.stat().st_size for f in rows.glob("index*/*")) / args.rows, 1)
        report["start_up"] = fresh(START, rows)
        report["resume"] = fresh(RESUME, rows)
    report["planning"] = planning(200_000)
    report["lint"] = linting(args.lint_rows)
    show(report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
