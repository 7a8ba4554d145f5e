"""Plans rows for a simulated mix of 665,000 records with lengths like LLaVA-1.5's; prints one JSON. See --help.

576 image tokens in 94 % of the records, log-normal text. Measures the seconds of planning an epoch, the fill of its
rows, and for 8 ranks the largest over the mean predicted cost of a step: rows dealt by cost, and every 8th row in turn.
Costs are those of CLIP-L/14-336 and a 7B LLM (32 layers of 4,096), packed and with one record a row.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from mmit.data.packing import plan_rows
from mmit.data.row_order import SEGMENT, Duration, RowOrder, imbalance

LLM, WIDTH, LAYERS, TOWER = 6.5e9, 4096, 32, 0.3e9  # weights, attention width, layers, weights


def imbalances(row_order: RowOrder, costs: np.ndarray, *, ranks: int) -> dict[str, list[float]]:
    """Mean, 99th percentile and largest of max/mean over full steps, dealt and in turn."""
    dealt, turns = [], []
    for step in range(row_order.steps - 1):
        rows = [row_order.row(step * row_order.rows_per_step + i) or [] for i in range(row_order.rows_per_step)]
        cost = [float(costs[row].sum()) for row in rows]
        dealt.append(imbalance(cost, ranks))
        turns.append(max(sum(cost[r::ranks]) for r in range(ranks)) * ranks / sum(cost))
    facts = lambda x: [round(float(v), 4) for v in (np.mean(x), np.quantile(x, 0.99), np.max(x))]  # noqa: E731
    return {"dealt": facts(dealt), "in_turn": facts(turns)}


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--rows-per-step", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=8)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(5.0, 0.7, args.records), 20, 1400).astype(np.int64)
    pictures = (rng.random(args.records) < 0.94).astype(np.int64)
    lengths, order = text + 576 * pictures, rng.permutation(args.records)
    costs = lengths + 6 * LAYERS * WIDTH / (4 * LLM) * lengths**2 + pictures * (2 * TOWER * 576 / (4 * LLM))

    def packed(epoch: int, begin: int, end: int) -> list[list[int]]:
        return plan_rows(lengths, capacity=args.capacity, order=order[begin:end])

    def alone(epoch: int, begin: int, end: int) -> list[list[int]]:
        return [[unit] for unit in order[begin:end].tolist()]

    start, begun = time.perf_counter(), time.process_time()
    rows = [row for begin in range(0, args.records, SEGMENT) for row in packed(0, begin, begin + SEGMENT)]
    seconds, busy = time.perf_counter() - start, time.process_time() - begun
    assert sorted(unit for row in rows for unit in row) == list(range(args.records))
    report = {
        "records": args.records,
        "capacity": args.capacity,
        "rows": len(rows),
        "fill": round(float(lengths.sum()) / (len(rows) * args.capacity), 4),
        "plan_seconds": round(seconds, 2),
        "plan_cpu_seconds": round(busy, 2),
        "max_over_mean_cost": {"ranks": args.ranks, "rows_per_step": args.rows_per_step, "of": "mean, p99, max"},
    }
    for name, rows_of in (("packed", packed), ("one record a row", alone)):
        row_order = RowOrder(rows_of, Duration(args.rows_per_step, epochs=1.0), units=args.records)
        report["max_over_mean_cost"][name] = imbalances(row_order, costs, ranks=args.ranks)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
