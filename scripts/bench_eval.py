"""`mmit eval` against one question at a time through Hugging Face's `generate`: the same model, the same answers.

In: a run. Out: JSON with seconds per question of both, their ratio, how many answers are equal, and what was computed.
Questions are neighbours in data order, as an evaluation takes them, from a seeded place; the two take turns. The other
way is transformers' own: batch 1, KV cache, greedy, each picture through the tower for each of its questions.

    python scripts/bench_eval.py runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmit.data.chat import encode
from mmit.errors import MmitError, ModelError
from mmit.eval.runner import CHUNK, Arm, How, evaluate
from mmit.eval.tasks import Item, load_task, task_items
from mmit.generate import Model, as_prompt, load


@torch.inference_mode()
def one_by_one(model: Model, item: Item, limit: int) -> tuple[str, int]:
    """Answer a question alone; return the answer and the length of its prompt in tokens."""
    vlm, parts, images = model.vlm, [], iter(item.prompt.images)
    table = vlm.llm.get_input_embeddings()
    for token in encode(as_prompt(item.prompt).turns, model.chat_format, model.tokenizer, generate=True).ids:
        if token >= 0:
            parts.append(table(torch.tensor([token], device=vlm.device)))
            continue
        assert model.preparation is not None
        pixels = model.preparation.pixels(next(images), where=item.id).to(vlm.device)
        if len(pixels) > 1:
            problem = f"{len(pixels)} crops of one picture, which this comparison does not lay out"
            raise ModelError(problem, where=item.id, remedy="Take a model that sees pictures whole.")
        parts.append(vlm.image_embeddings(vlm.encode_images(pixels))[0])
    embeddings = torch.cat(parts)[None]
    out = vlm.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=vlm.device),
        max_new_tokens=limit,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(model.end_ids),
        pad_token_id=model.end_ids[0],
    )
    return model.tokenizer.decode(out[0], skip_special_tokens=True).strip(), embeddings.shape[1]


def at_once(model: Model, task: Any, items: Sequence[Item], batch_size: int) -> tuple[dict[str, str], float]:
    """Evaluate questions as `mmit eval` does, files and score included; return the answers and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        how = How(batch_size=batch_size, progress=False)
        result = evaluate(model, task, Arm("bench"), out_dir=folder, items=items, how=how)
        seconds = time.perf_counter() - start
        rows = [json.loads(line) for line in Path(result.path).read_text("utf-8").splitlines()[1:]]
    return {row["id"]: row["answer"] for row in rows}, seconds


def measure(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """Let both ways answer in turns."""
    task = load_task(options.task, data_root=options.data_root)
    every = task_items(task.model_copy(update={"sample": None}))
    block = min(CHUNK * options.batch_size, len(every))
    draw = random.Random(options.seed)
    seconds, asked, equal, tokens = {"mmit": 0.0, "one by one": 0.0}, {"mmit": 0, "one by one": 0}, 0, 0
    at_once(model, task, every[: options.batch_size], options.batch_size)  # both are warm when the clock starts
    one_by_one(model, every[0], task.max_new_tokens)
    used = model.usage.prefill_tokens, model.usage.unshared_tokens, model.usage.pictures
    different = []
    for _ in range(options.rounds):
        start = draw.randrange(len(every) - block + 1)
        items = every[start : start + block]
        answers, took = at_once(model, task, items, options.batch_size)
        seconds["mmit"] += took
        asked["mmit"] += len(items)
        for item in draw.sample(items, min(options.questions, len(items))):
            begin = time.perf_counter()
            answer, length = one_by_one(model, item, task.max_new_tokens)
            seconds["one by one"] += time.perf_counter() - begin
            asked["one by one"] += 1
            tokens += length
            equal += answer == answers[item.id]
            if answer != answers[item.id]:
                different.append({"id": item.id, "mmit": answers[item.id], "one by one": answer})
    usage = model.usage
    each = {way: seconds[way] / asked[way] for way in seconds}
    return {
        "task": task.name,
        "questions": asked,
        "seconds_per_question": {way: round(value, 5) for way, value in each.items()},
        "times_faster": round(each["one by one"] / each["mmit"], 2),
        "extrapolated_seconds": {way: round(value * len(every)) for way, value in each.items()},
        "extrapolated_to": len(every),
        "equal_answers": f"{equal} of {asked['one by one']}",
        "different": different[:20],
        "tokens_run_per_question": {
            "mmit": round((usage.prefill_tokens - used[0]) / asked["mmit"], 2),
            "mmit, unshared": round((usage.unshared_tokens - used[1]) / asked["mmit"], 2),
            "one by one": round(tokens / asked["one by one"], 2),
        },
        "pictures_run_per_question": {
            "mmit": round((usage.pictures - used[2]) / asked["mmit"], 4),
            "one by one": 1.0,
        },
        "batch_size": options.batch_size,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison as JSON; return 1 if an answer differs or the ratio is below `--least`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a run or checkpoint")
    parser.add_argument("--task", default="easy_vqa")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--questions", type=int, default=150, help="asked one by one in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--least", type=float, default=0.0, help="ratio below which the exit code is 1")
    options = parser.parse_args(arguments)
    try:
        found = measure(load(options.run, device=options.device), options)
    except MmitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2))
    return int(bool(found["different"]) or found["times_faster"] < options.least)


if __name__ == "__main__":
    sys.exit(main())
