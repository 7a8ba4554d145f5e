"""Rows: many records in one sequence, each seeing only itself, with shared prefixes computed once.

Owns the trie that lays tokenised records into one row, the label shift (the only one in mmit) and the plan that
says which records share a row. Takes `Sample`s (ids and loss weights from `data/chat.py`), gives plain tensors.
Refuses to cut: a sample that does not fit a row is an error that names its record.

A row is a forest. Records that begin with the same tokens (the system prompt, the same image) share those tokens;
every token attends to its own node and to the ancestors of that node, nothing else, and its position is its depth.
So a packed row computes exactly what its records would compute alone. Loss weights belong to targets, not to nodes:
records that share tokens and weigh them differently each have targets and weights of their own. Several questions
about one image are the "message trees" of Molmo (arXiv:2409.17146); plain packing is the special case of a forest of
single nodes.

Dimensions: T tokens in the row, S supervised targets, P image tokens in it, K nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mmit.errors import RecordError

Symbol = tuple[int, Hashable]


@dataclass(frozen=True, slots=True)
class Sample:
    """One tokenised record.

    `ids[i] < 0` is an image slot; the slots take `images` in order, keys of the pictures (equal key = same picture),
    and stand for as many image tokens as `widths` says. `weights[i]` is the weight of the loss of predicting token i,
    0 for none. `record` is the position in the data set, for messages and metrics. `share` is that of a choice, see
    `data.choices`.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    images: tuple[Hashable, ...] = ()
    record: int = -1
    widths: tuple[int, ...] = ()
    share: float | None = None

    @property
    def supervised(self) -> tuple[bool, ...]:
        """Which tokens carry loss."""
        return tuple(weight > 0 for weight in self.weights)

    @property
    def length(self) -> int:
        """Tokens it takes, image tokens included."""
        return len(self.ids) - len(self.widths) + sum(self.widths)


@dataclass(slots=True)
class Row:
    """Tensors of one row; see the module docstring for the letters."""

    input_ids: torch.Tensor  # (T,) int64, 0 under image tokens
    positions: torch.Tensor  # (T,) int64, depth in the forest
    image_positions: torch.Tensor  # (P,) int64, where the tokens of each image go, slot by slot
    nodes: torch.Tensor  # (K, 3) int64: first token, length, parent node or -1
    predict_at: torch.Tensor  # (S,) int64, position whose hidden state predicts the target
    targets: torch.Tensor  # (S,) int64, the supervised token ids: those of a weight above 0
    weights: torch.Tensor  # (S,) float32, of their losses
    target_records: torch.Tensor  # (S,) int64, which record asks for it
    images: list[Hashable] = field(default_factory=list)  # the picture of each slot
    records: list[int] = field(default_factory=list)
    unshared_tokens: int = 0  # what the records would take without sharing


class _Node:
    """A piece of the trie: symbols that follow each other without a branch, and what goes on from the last of them."""

    __slots__ = ("children", "parent", "symbols")

    def __init__(self, parent: _Node | None, symbols: list[Symbol]) -> None:
        self.parent, self.symbols = parent, symbols
        self.children: dict[Symbol, _Node] = {}


def _symbols(sample: Sample) -> list[Symbol]:
    """Tokens that must run: everything before the last supervised token (later ones teach nothing)."""
    last = _last_supervised(sample)
    images = zip(sample.widths, sample.images, strict=True)
    return [(t, None) if t >= 0 else _slot(*next(images)) for t in sample.ids[: max(last, 0)]]


def _last_supervised(sample: Sample) -> int:
    """Place of the last token that carries loss, -1 for none."""
    for back, weight in enumerate(reversed(sample.weights), 1):
        if weight > 0:
            return len(sample.weights) - back
    return -1


def _alone_length(sample: Sample) -> int:
    """Tokens that must run of a sample that shares none: those of its `_symbols`."""
    ids = sample.ids[: max(_last_supervised(sample), 0)]
    slots = sum(1 for t in ids if t < 0) if sample.widths else 0
    return len(ids) - slots + sum(sample.widths[:slots])


def _slot(width: int, image: Hashable) -> Symbol:
    """The symbol of an image: minus its tokens, and its key."""
    return -width, image


def _insert(root: _Node, symbols: Sequence[Symbol], share: bool) -> list[tuple[_Node, int]]:
    """Insert a sample; return, for each of its symbols, (node, index in node). Splits nodes where paths part."""
    node, i = root, 0
    path: list[_Node] = []
    while i < len(symbols):
        child = node.children.get(symbols[i]) if share else None
        if child is None:
            leaf = _Node(node, list(symbols[i:]))
            # Without sharing the key must meet nothing, or equal records would fall together.
            node.children[symbols[i] if share else (len(node.children), object())] = leaf
            path.append(leaf)
            break
        n = 0
        while n < len(child.symbols) and i + n < len(symbols) and child.symbols[n] == symbols[i + n]:
            n += 1
        # An image is one symbol and its key, so paths never part inside an image: it is shared whole or not at all.
        if n < len(child.symbols):  # paths part inside the node: keep its head, hang the tail below
            head = _Node(node, child.symbols[:n])
            node.children[symbols[i]] = head
            child.symbols, child.parent = child.symbols[n:], head
            head.children[child.symbols[0]] = child
            child = head
        path.append(child)
        node, i = child, i + n
    return [(p, j) for p in path for j in range(len(p.symbols))]


def trie_length(samples: Sequence[Sample], *, share: bool = True) -> int:
    """Tokens that the samples take in a row of their own."""
    if len(samples) == 1:  # most records: there is nothing to share
        return _alone_length(samples[0])
    # Built for real and not estimated: this length decides whether a record fits a row, and a row that turned out
    # longer could not be cut.
    root = _Node(None, [])
    for s in samples:
        _insert(root, _symbols(s), share)
    total, stack = 0, list(root.children.values())
    while stack:
        node = stack.pop()
        total += sum(-t if t < 0 else 1 for t, _ in node.symbols)
        stack.extend(node.children.values())
    return total


def _integers(values: Sequence[object]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@dataclass(slots=True)
class _Layout:
    """A trie written down as one sequence, node after node."""

    ids: list[int] = field(default_factory=list)  # (T,)
    positions: list[int] = field(default_factory=list)  # (T,)
    image_positions: list[int] = field(default_factory=list)  # (P,)
    images: list[Hashable] = field(default_factory=list)
    nodes: list[tuple[int, int, int]] = field(default_factory=list)
    # (id of node, index of symbol) -> row position of the symbol's last token. It is the last that predicts what
    # follows: behind an image that is the last of its tokens.
    last_at: dict[tuple[int, int], int] = field(default_factory=dict)


def build_row(samples: Sequence[Sample], *, share: bool = True) -> Row:
    """Lay samples into one row.

    Args:
        samples: tokenised records; every one has at least one supervised token that is not its first.
        share: share common prefixes. Off, every record is a node of its own (same loss, more tokens).

    Raises:
        RecordError: a sample has nothing to learn, or its slots and images differ in number.
    """
    root = _Node(None, [])
    symbol_lists = []
    for s in samples:
        _check(s)
        symbol_lists.append(_symbols(s))
        _insert(root, symbol_lists[-1], share)
    laid = _lay_out(root)
    predict_at: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    weights: list[float] = []
    # Asked for only now: a later sample may have split the nodes of an earlier one.
    paths = _paths(root, symbol_lists, share)
    for s, path in zip(samples, paths, strict=True):
        # The label shift: the state at a token's predecessor predicts it, which for the first token of a branch lies in
        # the parent node. Targets belong to samples, so a token that two of them share has a target for each, and a
        # loss is counted as often as it would be in rows of their own.
        for i in range(1, len(s.ids)):
            if s.weights[i] > 0:
                node, j = path[i - 1]
                predict_at.append(laid.last_at[id(node), j])
                targets.append(s.ids[i])
                owners.append(s.record)
                weights.append(float(s.weights[i]))
    return Row(
        input_ids=_integers(laid.ids),
        positions=_integers(laid.positions),
        image_positions=_integers(laid.image_positions),
        nodes=_integers(laid.nodes).reshape(-1, 3),
        predict_at=_integers(predict_at),
        targets=_integers(targets),
        weights=torch.tensor(weights, dtype=torch.float32),
        target_records=_integers(owners),
        images=laid.images,
        records=[s.record for s in samples],
        unshared_tokens=sum(-t if t < 0 else 1 for symbols in symbol_lists for t, _ in symbols),
    )


def _check(sample: Sample) -> None:
    slots = sum(t < 0 for t in sample.ids)
    if not slots == len(sample.images) == len(sample.widths):
        problem = f"{slots} image slots but {len(sample.images)} images and {len(sample.widths)} widths of them"
        raise RecordError(problem, where=f"record {sample.record}")
    # The first token has no predecessor that could predict it, so its weight alone would teach nothing.
    if not any(weight > 0 for weight in sample.weights[1:]):
        raise RecordError("no supervised token: there is nothing to learn from it", where=f"record {sample.record}")


def _lay_out(root: _Node) -> _Layout:
    """Write the trie down depth first, parents before children.

    Depth first, so that all that goes on from a node is one piece behind it: `models.prefix_tree` reads it as a block.
    A token's position is its depth, and not its place in the row: so every branch counts on from its parent, as the
    record would alone.
    """
    laid = _Layout()
    # A stack and no recursion: a row of records that nest in each other would be deeper than Python allows. Children
    # go onto it in reverse, so that they come off, and stand in the row, in the order of the samples.
    stack = [(child, -1, 0) for child in reversed(list(root.children.values()))]
    while stack:
        node, parent, depth = stack.pop()
        start = len(laid.ids)
        for j, (token, image) in enumerate(node.symbols):
            width = 1 if token >= 0 else -token
            if token < 0:
                laid.images.append(image)
                laid.image_positions.extend(range(len(laid.ids), len(laid.ids) + width))
            # 0 under an image token: some id must be there, and its embedding is replaced.
            laid.ids.extend([max(token, 0)] * width)
            laid.last_at[id(node), j] = len(laid.ids) - 1
        length = len(laid.ids) - start
        laid.positions.extend(range(depth, depth + length))
        laid.nodes.append((start, length, parent))
        mine = len(laid.nodes) - 1
        stack.extend((c, mine, depth + length) for c in reversed(list(node.children.values())))
    return laid


def token_keys(sample: Sample) -> list[Hashable]:
    """What identifies each token that must run of a sample: its id, or a picture and the place in it."""
    found: list[Hashable] = []
    for token, image in _symbols(sample):
        found += [token] if token >= 0 else [(image, n) for n in range(-token)]
    return found


def without(row: Row, places: Sequence[int]) -> tuple[Row, torch.Tensor]:
    """Leave tokens of a row out, none of which predicts a target.

    Returns:
        the row, whose nodes no longer fit it, and (P,) bool which of its image tokens it still has.
    """
    stays = torch.ones(len(row.input_ids), dtype=torch.bool)
    stays[torch.tensor(places)] = False
    number = stays.cumsum(0) - 1
    kept = stays[row.image_positions]
    return replace(
        row,
        input_ids=row.input_ids[stays],
        positions=row.positions[stays],
        image_positions=number[row.image_positions[kept]],
        predict_at=number[row.predict_at],
    ), kept


def _paths(root: _Node, symbol_lists: Sequence[list[Symbol]], share: bool) -> list[list[tuple[_Node, int]]]:
    """Where every symbol of every sample ended up, after all splits."""
    if not share:  # one node for each sample, in their order
        return [[(n, j) for j in range(len(n.symbols))] for n in root.children.values()]
    paths = []
    for symbols in symbol_lists:
        node, path = root, list[tuple[_Node, int]]()
        while len(path) < len(symbols):
            node = node.children[symbols[len(path)]]
            path.extend((node, j) for j in range(len(node.symbols)))
        paths.append(path)
    return paths


def plan_rows(
    lengths: np.ndarray, *, capacity: int, order: np.ndarray, shared: int = 0, window: int = 4096
) -> list[list[int]]:
    """Decide which units share a row: a pure function of its arguments.

    The next `window` units of the order lie in a pool. A row starts with the oldest, goes on with the next oldest
    while it is far from full, and is then closed by the single unit or the pair that leaves the least room: with
    thousands to choose from, some pair almost always fits to the token. So rows keep the shuffle's order, and no
    unit waits for more than a pool's length.

    Args:
        lengths: (B,) tokens of each unit; a unit is never split.
        capacity: tokens per row.
        order: unit numbers, each as often as it is wanted.
        shared: tokens that every unit begins with and that a row holds once (the system prompt).
        window: units looked at together.

    Returns:
        rows as lists of unit numbers.
    """
    # What all units share is taken off the capacity once, and off every unit: a row holds it a single time.
    sizes = np.maximum(lengths[order] - shared, 0).tolist()  # by place in the order
    room = capacity - shared
    pool = _Pool(sizes, room, window)
    typical = float(np.mean(sizes)) if sizes else 0.0
    rows: list[list[int]] = []
    while (place := pool.oldest()) is not None:
        row, left = [place], room - pool.take(place)
        # Until about two more units fit, age decides; then fit does. Largest-first would use the long units up together
        # and then have nothing that fits what they leave; age alone leaves part of a typical unit empty in every row.
        while left > 2.5 * typical and (place := pool.oldest(at_most=left)) is not None:
            row.append(place)
            left -= pool.take(place)
        while left > 0 and (closing := pool.best(left)):
            row.extend(closing)
            left -= sum(pool.take(p) for p in closing)
        # Sorted by place: the order inside a row is that of the shuffle, not that in which the gaps were filled.
        rows.append([int(order[p]) for p in sorted(row)])
    return rows


class _Pool:
    """Units waiting for a row, found by age or by size."""

    def __init__(self, sizes: list[int], room: int, window: int) -> None:
        self.sizes, self.room, self.window = sizes, room, window
        self.by_size: dict[int, deque[int]] = {}
        self.count = np.zeros(room + 1, dtype=np.int64)  # waiting, by size; oversized ones never close a row
        self.taken = bytearray(len(sizes))
        self.first = self.filled = self.waiting = 0
        self._refill()

    def _refill(self) -> None:
        while self.waiting < self.window and self.filled < len(self.sizes):
            size = self.sizes[self.filled]
            if size <= self.room:
                self.by_size.setdefault(size, deque()).append(self.filled)
                self.count[size] += 1
            self.filled += 1
            self.waiting += 1

    def oldest(self, at_most: int | None = None) -> int | None:
        """Place of the unit that has waited longest; with `at_most`, among those that old or a little younger."""
        while self.first < self.filled and self.taken[self.first]:
            self.first += 1
        if at_most is None:
            return self.first if self.first < self.filled else None
        # 64 places and no more: the search is in the innermost loop, and a unit that is a little younger will do.
        for place in range(self.first, min(self.first + 64, self.filled)):
            if not self.taken[place] and self.sizes[place] <= at_most:
                return place
        return None

    def take(self, place: int) -> int:
        """Remove a unit; returns its size."""
        size = self.sizes[place]
        self.taken[place] = 1
        self.waiting -= 1
        if size <= self.room:
            self.count[size] -= 1
            queue = self.by_size[size]
            if queue[0] == place:
                queue.popleft()
            else:
                queue.remove(place)
        self._refill()
        return size

    def best(self, left: int) -> tuple[int, ...]:
        """Places of the unit, or of the two, that fill `left` best; () when none fits."""
        # All pairs at once: for each size that waits, the largest other one that still fits beside it. Linear in the
        # room of a row, whatever the number of units in the pool.
        count = self.count[: left + 1]
        present = np.flatnonzero(count)
        if not len(present):
            return ()
        below = np.zeros(left + 1, dtype=np.int64)  # largest size waiting that is <= x
        below[present] = present
        below = np.maximum.accumulate(below)
        partner = below[left - present]
        # A size cannot be its own partner unless two of it wait.
        alone = (partner == present) & (count[present] < 2)
        partner = np.where(alone, np.where(present > 0, below[np.maximum(present - 1, 0)], 0), partner)
        partner = np.where(count[partner] > 0, partner, 0)
        pair = int(np.argmax(present + partner))
        a, b = int(present[pair]), int(partner[pair])
        single = int(present[-1])
        if b == 0 or single >= a + b:
            return (self.by_size[single][0],)
        return (self.by_size[a][0], self.by_size[b][1 if a == b else 0])
