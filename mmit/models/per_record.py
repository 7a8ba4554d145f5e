"""Layers that must be shown one record at a time: running states, convolutions, rotary factors that hang on length.

Such a module of a packed row is run on the records' paths, as a batch padded on the right, and its output is put back
into the row; what records share is computed once for each of them there, and nowhere else. Rotary embeddings whose
factors depend on the length of a sequence (longrope, dynamic NTK) get that of each record. Modules are known by what
they hold, never by a model's name, and keep their weights and names: only their class changes.

Dimensions: T tokens in the row, G paths run together, L the longest of them, B sequences of an ordinary batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mmit.errors import ModelError
from mmit.models.row_state import MIXER, RowState, current_row, running

# Arguments that describe a row as one sequence; a path alone needs none of them.
WHOLE_ROW = ("attention_mask", "mask", "padding_mask", "cache_position", "seq_idx", "cu_seqlens")
_classes: dict[type[nn.Module], type[nn.Module]] = {}


def run_per_record(model: Any) -> None:
    """Change, in place, every module of a model that must be shown one record at a time."""
    # By identity: a module may hang in a model under several names, and is changed once.
    inside = {id(module) for _, module in mixers(model)}
    for module in model.modules():
        if type(module) in _classes.values():
            continue
        if id(module) in inside:
            _change(module, _mixer)
        elif length_types(module):
            _change(module, _rotary)


def mixers(model: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules that mix tokens by other means than attention.

    Such a module holds a convolution over the sequence, as state spaces, gated delta rules and short convolutions do,
    or it is the part with a layer number in a layer that the config calls linear attention.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return [(name, m) for name, m in model.named_modules() if _convolves(m) or _is_linear(m, kinds)]


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1 for child in module.children())


def _is_linear(module: nn.Module, kinds: Sequence[str]) -> bool:
    number = getattr(module, "layer_idx", None)
    if not isinstance(number, int) or not number < len(kinds) or kinds[number] != "linear_attention":
        return False
    return not any(hasattr(m, "layer_idx") for m in module.modules() if m is not module)


def length_types(module: nn.Module) -> set[str]:
    """Kinds of rotary embedding in this module whose factors depend on the length of the sequence."""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return {n for n in names if isinstance(n, str) and (n == "longrope" or "dynamic" in n)}


def rotary_limit(model: nn.Module) -> int | None:
    """Length up to which the rotary factors of all records are the same, None where they always are."""
    limits = [limit for m in model.modules() if length_types(m) for limit in _limits(m)]
    return min(limits, default=None)


def turning_point(model: nn.Module) -> int | None:
    """Length beyond which longrope turns all positions of a sequence anew, None for other rotary embeddings."""
    found = [limit for m in model.modules() if "longrope" in length_types(m) for limit in _limits(m)]
    return min(found, default=None)


def _limits(rotary: Any) -> list[int]:
    given = rotary.config.rope_parameters
    tables = [given] if "rope_type" in given else [t for t in given.values() if isinstance(t, dict)]
    long = [int(t["original_max_position_embeddings"]) for t in tables if t.get("rope_type") == "longrope"]
    return long or [int(rotary.original_max_seq_len)]


def _change(module: nn.Module, make: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    kind = type(module)
    if kind not in _classes:
        _classes[kind] = make(kind)
    # Only the class: weights, buffers, hooks and names stay, so checkpoints and adapters fit as before. One subclass
    # for each class, made once.
    module.__class__ = _classes[kind]


def _mixer(base: type[nn.Module]) -> type[nn.Module]:
    signature = inspect.signature(base.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        row = current_row()
        if row is None:
            return base.forward(self, *args, **kwargs)
        row.calls.append(MIXER)
        # By name: layers call their mixers with positions or keywords, and which argument a mask is must be known.
        bound = signature.bind(self, *args, **kwargs)
        arguments: dict[str, Any] = {k: None if k in WHOLE_ROW else v for k, v in bound.arguments.items()}
        extra = arguments.pop("kwargs", {})
        arguments |= {k: v for k, v in extra.items() if k not in WHOLE_ROW}
        del arguments["self"]
        # A device map may have put this layer on another device than the row's first.
        row = row.on(next(v.device for v in arguments.values() if isinstance(v, torch.Tensor)))
        outs = []
        for batch in row.batches:
            with running(None):  # its paths are a batch like any other
                outs.append(base.forward(self, **{k: _on_paths(v, batch, row) for k, v in arguments.items()}))
        return _back(outs, row)

    # The same name and module: messages, and whoever looks for a class by its name, see the one they know.
    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def _on_paths(value: Any, batch: torch.Tensor, row: RowState) -> Any:
    """A tensor of the row (1, T, ...) as one of the paths (G, L, ...); anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(_on_paths(v, batch, row) for v in value)
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[:2] == (1, len(row.places)):
        return value[0][batch]
    return value


def _back(outs: list[Any], row: RowState) -> Any:
    """Outputs of all batches as one of the row; states that a module returns beside them belong to no token."""
    if isinstance(outs[0], tuple):
        rest = [None] * (len(outs[0]) - 1)
        return (_back([out[0] for out in outs], row), *rest)
    flat = torch.cat([out.flatten(0, 1) for out in outs])
    return flat.index_select(0, row.places)[None]


def _rotary(base: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = _lengths(position_ids, limit=min(_limits(self)), grows=length_types(self) != {"longrope"})
        # Each length by itself over all tokens, and what belongs to it is taken: a row has few different lengths, and
        # the factors of one call hold for all of its tokens.
        out = None
        for length in lengths.unique().tolist():
            mine = lengths == length
            # transformers' own dynamic NTK remembers the longest sequence it has seen and would go on with its factors.
            _fresh(self)
            states = base.forward(self, x, torch.where(mine, position_ids, 0), *args, **kwargs)
            out = states if out is None else _choose(mine, states, out)
        return out

    return type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def _lengths(position_ids: torch.Tensor, *, limit: int, grows: bool) -> torch.Tensor:
    """(B, T) length of the sequence each token is in, as far as factors depend on it."""
    row = current_row()
    if row is None:
        ends = position_ids.amax(-1, keepdim=True) + 1
        low, high = ends, ends
    else:
        low, high = (row.on(position_ids.device).path_lengths[i][None] for i in (0, 1))

    def classes(lengths: torch.Tensor) -> torch.Tensor:
        return lengths.clamp(min=limit) if grows else (lengths > limit).long()

    # A token that several records share has one position and one key, so its factors must be those of all of them.
    found = classes(high)
    if row is not None and not torch.equal(classes(low), found):
        raise ModelError(
            f"records on both sides of {limit} tokens share their beginning in a row, but the model turns its "
            "positions by factors that depend on a record's length",
            remedy="set data.share_prefix=false",
        )
    return found.expand(position_ids.shape)


def _choose(mine: torch.Tensor, these: Any, others: Any) -> Any:
    if isinstance(these, (tuple, list)):
        return type(these)(_choose(mine, a, b) for a, b in zip(these, others, strict=True))
    return torch.where(mine.view(*mine.shape, *[1] * (these.ndim - 2)), these, others)


def _fresh(rotary: Any) -> None:
    """Forget the longest sequence so far, which dynamic NTK would go on with."""
    for name in [n for n in vars(rotary) if n.endswith("max_seq_len_cached")]:
        setattr(rotary, name, rotary.original_max_seq_len)
    for name, buffer in list(rotary.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            rotary.register_buffer(name.replace("original_", ""), buffer.clone(), persistent=False)
