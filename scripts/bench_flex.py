"""Compares mmit's attention over packed rows with torch's FlexAttention over a block mask of the same nodes, on a CPU.

Rows are those of bench_plans.py; heads those of SmolLM2-135M. Prints for each row the largest error of both against
float64 attention with a dense mask, and milliseconds of processor time of a forward pass of both and of the block mask,
which a row needs once. FlexAttention has no backward pass on a CPU. It is compiled, which takes a minute.
"""

from __future__ import annotations

import argparse

import torch
from bench_plans import milliseconds, rows
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mmit.models.attention import forest_attention
from mmit.models.attention_plan import make_plan

HEADS, KEY_HEADS, SIZE = 9, 3, 64


def visible(nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) the node of each token, and (K, K) whether a node sees another."""
    above = torch.eye(len(nodes), dtype=torch.bool)
    for number, (_, _, parent) in enumerate(nodes.tolist()):
        if parent >= 0:
            above[number] |= above[parent]
    return torch.repeat_interleave(torch.arange(len(nodes)), nodes[:, 1]), above


def block_mask(owner: torch.Tensor, above: torch.Tensor) -> BlockMask:
    """What FlexAttention skips by."""

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return above[owner[query], owner[key]] & (query >= key)

    return create_block_mask(seen, None, None, len(owner), len(owner), device="cpu")


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048])
    parser.add_argument("--seconds", type=float, default=0.5, help="of processor time for each figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    flex = torch.compile(flex_attention)
    print("| tokens, shared | error, mmit | error, flex | mmit | flex | its block mask |\n|---|---|---|---|---|---|")
    for tokens in args.tokens:
        for name, nodes in rows(tokens).items():
            owner, above = visible(nodes)
            dense = above[owner][:, owner].tril()
            torch.manual_seed(0)
            q, k, v = (torch.randn(1, count, len(owner), SIZE) for count in (HEADS, KEY_HEADS, KEY_HEADS))
            exact = torch.nn.functional.scaled_dot_product_attention(
                q.double(), k.double(), v.double(), attn_mask=dense, enable_gqa=True
            )
            plan, mask = make_plan(nodes), block_mask(owner, above)
            with torch.no_grad():
                ways = (
                    lambda q=q, k=k, v=v, plan=plan: forest_attention(q, k, v, plan, SIZE**-0.5).transpose(1, 2),
                    lambda q=q, k=k, v=v, mask=mask: flex(q, k, v, block_mask=mask, enable_gqa=True),
                )
                errors = [f"{float((way() - exact).abs().max()):.1e}" for way in ways]
                times = [milliseconds(way, args.seconds) for way in ways]
            times.append(milliseconds(lambda owner=owner, above=above: block_mask(owner, above), args.seconds))  # type: ignore[misc]
            cells = [*errors, *(f"{ms:.0f} ms" for ms in times)]
            print(f"| {len(owner):,}, {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
