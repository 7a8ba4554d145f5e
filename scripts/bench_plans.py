"""Processor milliseconds that plans of attention cost the training process; prints a Markdown table. See --help.

Rows of 2,048 and 4,096 tokens that share nothing, a system prompt, or images under many questions. For each: its plan
made in the training process, and the same plan made by a loader's worker, of which the training process then takes
what the worker sent. Of both, the part that a CPU reads, with the masks that the training process makes in any case,
and the part that a kernel on CUDA reads; nothing runs on one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import torch

from mmit.models.attention_plan import AttentionPlan, RowPlan
from mmit.models.planning import RowPlanner

IMAGE, QUESTION, RECORD = 576, 42, 512  # tokens


def trees(roots: int, beginning: int, branches: int, length: int) -> torch.Tensor:
    """(K, 3) nodes of `roots` beginnings, each with branches; none where `branches` is 0."""
    nodes: list[list[int]] = []
    start = 0
    for _ in range(roots):
        root = len(nodes)
        nodes.append([start, beginning, -1])
        start += beginning
        for _ in range(branches):
            nodes.append([start, length, root])
            start += length
    return torch.tensor(nodes)


def rows(tokens: int) -> dict[str, torch.Tensor]:
    """Rows of about so many tokens."""
    return {
        "nothing shared": trees(tokens // RECORD, RECORD, 0, 0),
        "a system prompt": trees(1, 32, tokens // RECORD, RECORD - 32),
        "one image": trees(1, IMAGE, (tokens - IMAGE) // QUESTION, QUESTION),
        "10 questions an image": trees(tokens // (IMAGE + 10 * QUESTION), IMAGE, 10, QUESTION),
    }


def used(plan: RowPlan | None) -> AttentionPlan:
    """The plan as the first layer finds it: on a CPU with the masks of its buckets."""
    assert plan is not None
    placed = AttentionPlan(plan)
    if "buckets" in vars(plan):
        for number in range(len(placed.buckets)):
            placed.mask(number)
    return placed


def milliseconds(work: Callable[[], object], least: float) -> float:
    """Processor time of the process for one call, over at least so many seconds of it."""
    work()
    begin, count = time.process_time(), 0
    while time.process_time() - begin < least:
        work()
        count += 1
    return (time.process_time() - begin) / count * 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="of processor time for each figure")
    least = parser.parse_args().seconds
    torch.set_num_threads(1)
    print("| tokens, shared | nodes | CPU: made here | by a worker | kB | CUDA: made here | by a worker | kB |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in (2048, 4096):
        for name, nodes in rows(tokens).items():
            cells = []
            for planner in (RowPlanner(), RowPlanner(buckets=False, segments=True)):
                # As a pool of processes sends it; the pipe between them, which copies the bytes twice more, is left
                # out.
                sent = bytes(ForkingPickler.dumps(planner(nodes)))
                made = milliseconds(lambda planner=planner, nodes=nodes: used(planner(nodes)), least)  # type: ignore[misc]
                taken = milliseconds(lambda sent=sent: used(ForkingPickler.loads(sent)), least)  # type: ignore[misc]
                cells += [f"{made:.2f} ms", f"{taken:.2f} ms", f"{len(sent) / 1000:.0f}"]
            print(f"| {tokens:,}, {name} | {len(nodes)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
