"""Records of a micro-batch side by side: one batch, padded on the right.

Owns the way for models that cannot keep records of one row apart (attention or a state in code of their own).
Takes a row whose nodes are all roots, gives its hidden states or logits back as a row. Padding follows a record, and
these models are causal, so it changes nothing. Refuses nothing; what a node shares with another cannot be told here.

Dimensions: T tokens in the row, K records in it, L the longest of them, S supervised targets, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mmit.models.calls import RowInputs, call
from mmit.models.head import check_rows


def is_flat(nodes: torch.Tensor) -> bool:
    """Whether a row holds several records and none of them shares anything: (K, 3), see `attention_plan.make_plan`."""
    return len(nodes) > 1 and bool((nodes[:, 2] < 0).all())


def run_padded(llm: Any, inputs: RowInputs, *, at: torch.Tensor | None = None) -> torch.Tensor:
    """Run the records of a row through a causal LM, or through its body alone, as one padded batch.

    Args:
        inputs: the row, whose nodes are all roots, one after the other.
        at: (S,) positions whose logits are wanted; None for a body, which has none.

    Returns:
        (S, V) logits, or the body's (T, D) hidden states.

    Raises:
        ModelError: more logits at once than memory can be expected to hold.
    """
    embeddings, positions, nodes, ids = inputs
    # Nodes are on the CPU, so this waits for no device.
    lengths: list[int] = nodes[:, 1].tolist()
    given: dict[str, Any] = {
        "inputs_embeds": pad_sequence(list(embeddings.split(lengths)), batch_first=True),
        "position_ids": pad_sequence(list(positions.split(lengths)), batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones(n, dtype=torch.int64, device=embeddings.device) for n in lengths], batch_first=True
        ),
        "use_cache": False,
        "ids": None if ids is None else pad_sequence(list(ids.split(lengths)), batch_first=True),
    }
    # Left out where a model does not take them: positions start at 0 in every record, and padding comes last.
    optional = ("position_ids", "attention_mask", "use_cache")
    if at is None:
        hidden = call(llm, **given, optional=optional).last_hidden_state
        return torch.cat([states[:n] for states, n in zip(hidden, lengths, strict=True)])
    starts = nodes[:, 0].to(at.device)
    record = torch.searchsorted(starts.contiguous(), at, right=True) - 1
    # A model takes one list of places for the whole batch.
    places, place = (at - starts[record]).unique(return_inverse=True)
    check_rows(len(lengths) * len(places))
    return call(llm, **given, logits_to_keep=places, optional=optional).logits[record, place]
