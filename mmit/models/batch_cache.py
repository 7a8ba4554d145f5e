"""Keys and values of a batch that is being decoded: prompts of several lengths, which join and leave between steps.

Owns the buffers. A prompt has a place of the batch, and its tokens end where all others' end: padding is on the left,
so that distances between columns are distances between tokens, which sliding windows hang on. A step writes one
column; whoever joins or leaves moves no other prompt while there is room.

Dimensions: B prompts, T tokens in a row, L longest prompt, KV key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from mmit.models.sending import send

ROOM = 64  # tokens by which buffers grow


class GrowingLayer(DynamicLayer):
    """A layer of the cache: buffers (places, KV, columns, D) with room to spare, of which a part is in use."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # transformers would make the tensors at the first update, and then grow them by concatenation, a copy of
        # everything at each token.
        self.lazy_initialization(keys, values)
        self._buffers = [keys, values]
        self._show(len(keys), 0, length)

    def _show(self, places: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Use the first places, and the columns from `begin` to `end`."""
        self._begin, self._end = begin, end
        keys, values = (buffer[:places, :, begin:end] for buffer in self._buffers)
        self.keys, self.values, self._places = keys, values, places
        return keys, values

    def _renew(self, places: int, *, left: int, right: int) -> None:
        """Copy what is in use into buffers with room for `places`, and for columns on either side."""
        used, width = self._places, self._end - self._begin
        for number, old in enumerate(self._buffers):
            shape = (places, old.shape[1], left + width + right, old.shape[3])
            new = old.new_zeros(shape)  # zeros: the mask hides padding, and it must be finite
            new[:used, :, left : left + width] = old[:used, :, self._begin : self._end]
            self._buffers[number] = new
        self._show(used, left, left + width)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states and return all; transformers' interface, whose further arguments are not read.

        Args:
            key_states: (B, KV, new, D) of the tokens that are added.
            value_states: (B, KV, new, D) as well.

        Returns:
            keys and values (B, KV, T, D) of all T tokens so far.
        """
        new = key_states.shape[-2]
        # A copy of all buffers every ROOM tokens, in place of one at every token.
        if self._end + new > self._buffers[0].shape[2]:
            self._renew(len(self._buffers[0]), left=0, right=new + ROOM)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: len(states), :, self._end : self._end + new] = states
        return self._show(len(key_states), self._begin, self._end + new)

    def put(self, place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace the last tokens of one place of the batch by (KV, n, D) states."""
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[place, :, self._end - states.shape[1] : self._end] = states.to(buffer)

    def join(self, other: GrowingLayer) -> None:
        """Put the prompts of another layer behind those of this one."""
        # Ends meet: a prompt's last token stands in the last column, whatever its length, so that those who join can be
        # of any.
        used, width = self._places, other._end - other._begin
        places, room = used + other._places, len(self._buffers[0])
        if places > room or width > self._end:
            # More places than asked for, so that those who join one by one are not all copied each time.
            more = room if places <= room else places + places // 2
            self._renew(more, left=max(0, width - (self._end - self._begin)), right=ROOM)
        begin = self._end - width
        for buffer, theirs in zip(self._buffers, other._buffers, strict=True):
            if begin < self._begin:  # what others have left there; hidden, but it must be finite
                buffer[:used, :, begin : self._begin] = 0
            # Padding of the new prompts, left of their tokens: the mask hides it, but NaN times a weight of zero would
            # still be NaN.
            buffer[used:places, :, self._begin : self._end] = 0
            buffer[used:places, :, begin : self._end] = theirs[: other._places, :, other._begin : other._end]
        self._show(places, min(self._begin, begin), self._end)

    def keep(self, places: Sequence[int], width: int) -> None:
        """Keep some places, in this order, and the last `width` columns. A place that stays costs nothing."""
        moved = [(new, old) for new, old in enumerate(places) if new != old]
        if moved:
            target, source = send(torch.tensor(moved).T.contiguous(), self._buffers[0].device)
            for buffer in self._buffers:
                # Only places that change are copied: whoever stays where it was costs nothing.
                window = buffer[:, :, self._end - width : self._end]
                window.index_copy_(0, target, window.index_select(0, source))
        self._show(len(places), self._end - width, self._end)


def batch_cache(caches: Sequence[Cache], paths: Sequence[Sequence[Sequence[int]]]) -> Cache:
    """Copy every prompt's path out of its row's cache; empties the row caches as it goes.

    Args:
        caches: of rows, (1, KV, T, D) in each layer.
        paths: for each row, the positions in it of each prompt's tokens.
    """
    # The row's cache holds a shared prefix once; the batch holds it for every prompt, because decoding attends to plain
    # rectangles.
    batch, width = sum(map(len, paths)), max(len(path) for row in paths for path in row)
    indices = []
    for row in paths:
        longest = max(map(len, row))
        # Padding repeats the row's first token: the mask hides it, and it is finite.
        indices.append(torch.tensor([[0] * (longest - len(path)) + list(path) for path in row]))
    layers: list[Any] = []
    moved: dict[torch.device, list[torch.Tensor]] = {}  # the indices, flat, on each device that holds layers
    for number in range(len(caches[0].layers)):
        buffers = []
        for name in ("keys", "values"):
            first = getattr(caches[0].layers[number], name)
            buffer = first.new_zeros(batch, first.shape[1], width + ROOM, first.shape[3])
            begin = 0
            if first.device not in moved:
                moved[first.device] = [send(index.flatten(), first.device) for index in indices]
            for cache, index, flat in zip(caches, indices, moved[first.device], strict=True):
                states = getattr(cache.layers[number], name)[0]  # (KV, T, D)
                n, longest = index.shape
                picked = states.index_select(1, flat).unflatten(1, (n, longest))
                buffer[begin : begin + n, :, width - longest : width] = picked.transpose(0, 1)
                begin += n
            buffers.append(buffer)
        for cache in caches:
            cache.layers[number] = DynamicLayer()  # `reset` of transformers 5.17 keeps the memory
        layers.append(GrowingLayer(buffers[0], buffers[1], width))
    return Cache(layers=layers)
