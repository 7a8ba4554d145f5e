"""Plans of attention made ahead of the forward pass, where rows are built.

Owns what must be known of a model to plan its rows in another process: plain values, read once before the first row.
The plan is that of the row as the model runs it, with a soft prompt in its place. Refuses nothing: of a row that needs
no plan there is none, and a part that is missing is made in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmit.models.attention_plan import RowPlan
from mmit.models.padded import is_flat
from mmit.models.per_record import rotary_limit
from mmit.models.varlen import runs_on
from mmit.models.virtual import PREFIX, prompted_nodes, virtual_tokens

if TYPE_CHECKING:
    import torch

    from mmit.models.vlm import VLM


@dataclass(frozen=True)
class RowPlanner:
    """Nodes of a row -> its plan.

    Attributes:
        prompt: tokens of the soft prompt, 0 for none.
        repeated: each record of a row that shares nothing has a prompt of its own.
        padded: records of such a row run side by side, without a plan.
        segments: for a variable-length kernel. buckets: for attention elsewhere.
    """

    prompt: int = 0
    repeated: bool = False
    padded: bool = False
    segments: bool = False
    buckets: bool = True

    def __call__(self, nodes: torch.Tensor) -> RowPlan | None:
        """(K, 3) first token, length, parent (or -1) of each node, on the CPU; None where no plan is needed."""
        flat = is_flat(nodes)
        nodes = prompted_nodes(nodes, self.prompt, repeated=self.repeated and flat)
        if len(nodes) == 1 or (self.padded and flat):
            return None
        plan = RowPlan(nodes.tolist())
        # Asked for, and so made: what is not made here would be in the forward pass.
        _ = (self.buckets and plan.buckets, self.segments and plan.segments)
        return plan


def repeats_prompt(llm: Any, *, padded: bool) -> bool:
    """Whether a soft prompt stands in front of every record of a row that shares nothing, not once in front of all."""
    # Where factors hang on a record's length, a prompt that all records share would need several.
    return padded or rotary_limit(llm) is not None


def row_planner(vlm: VLM) -> RowPlanner:
    """The planner of a tuned composite, on the device and in the number format that it runs in."""
    fused = runs_on(vlm.device, vlm.word_embeddings.dtype)
    prefixes = (getattr(module, PREFIX, None) for module in vlm.llm.modules())
    # Keys of a prefix join the softmax of their layer, which no variable-length kernel does; with a gate they do not.
    joined = any(prefix is not None and prefix.gate is None for prefix in prefixes)
    return RowPlanner(
        prompt=virtual_tokens(vlm.llm),
        repeated=repeats_prompt(vlm.llm, padded=vlm.padded),
        padded=vlm.padded,
        segments=fused and not joined,
        buckets=not fused or joined,
    )
