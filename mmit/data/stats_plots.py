"""The pictures of `mmit data stats`: lengths, image sizes, roots and objects of prompts, nearest neighbours.

Takes Stats, writes PNG files. Draws with matplotlib's figure objects, never through its global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.errors import MmitError

if TYPE_CHECKING:
    from mmit.data.stats import Stats

MOST_SOURCES = 6  # shown by themselves; the rest are one
_COLOURS = ("#3b6fb6", "#d97b29", "#3f9b57", "#b6473b", "#7d5ba6", "#5f6b76", "#a8adb3")


def plot(stats: Stats, folder: Path) -> list[Path]:
    """Write lengths.png and, where there is something to show, images.png, prompts.png and nearest.png.

    Raises MmitError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)  # drawing takes longer than to find out that it was for nothing
        drawn = {"lengths.png": _lengths(stats)}
        if stats.image_sizes:
            drawn["images.png"] = _images(stats)
        if stats.roots:
            drawn["prompts.png"] = _roots(stats)
        if stats.rouge:
            drawn["nearest.png"] = _nearest(stats)
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=130, facecolor="white")
    except OSError as error:
        raise MmitError(f"cannot write: {error.strerror}", where=str(folder), remedy="Check the folder.") from error
    return [folder / name for name in drawn]


def _figure(columns: int, *, height: float = 3.6, width: float = 5.2) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    # Not pyplot: its global list of figures would keep every picture alive, and it asks for a display.
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lengths(stats: Stats) -> Any:
    whole = stats.whole
    kinds = {"characters of a prompt": "prompts", "characters of an answer": "answers"}
    if whole.tokens:
        kinds["tokens of a sample"] = "tokens"
    figure, axes = _figure(len(kinds))
    # A hundred sources in one stack of bars would have no colours left to be told apart by.
    largest = sorted(stats.sources, key=lambda name: -stats.sources[name].records)
    for axis, (label, kind) in zip(axes, kinds.items(), strict=True):
        values = [np.array(getattr(stats.sources[name], kind), dtype=float) for name in largest[:MOST_SOURCES]]
        names = [_short(name) for name in largest[:MOST_SOURCES]]
        if rest := largest[MOST_SOURCES:]:
            values.append(np.array([v for name in rest for v in getattr(stats.sources[name], kind)], dtype=float))
            names.append(f"{len(rest)} more")
        # Lengths span orders of magnitude; on a logarithmic axis no length (an image without a question) is drawn as 1.
        values = [np.maximum(v, 1) for v in values]
        every = np.concatenate(values)
        low, high = (float(every.min()), float(every.max())) if len(every) else (1.0, 1.0)
        bins = np.unique(np.round(np.geomspace(low, max(high, low + 9) + 1, 40))) - 0.5
        axis.hist(values, bins=bins, stacked=True, color=_COLOURS[: len(values)], label=names)
        axis.set(xscale="log", xlabel=label, ylabel="count")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        # Within a decade or so, the powers of ten alone would leave the axis without numbers.
        axis.xaxis.set_minor_formatter("{x:,.0f}" if high < 20 * low else "")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _images(stats: Stats) -> Any:
    figure, (left, right) = _figure(2)
    sides = np.array(stats.image_sizes, dtype=float)
    left.scatter(sides[:, 0], sides[:, 1], s=9, alpha=0.35, color=_COLOURS[0], linewidths=0)
    top = float(sides.max()) * 1.05
    left.plot([0, top], [0, top], color="#a8adb3", linewidth=0.8, zorder=0)
    left.set(xlabel="width in pixels", ylabel="height in pixels", xlim=(0, top), ylim=(0, top))
    aspect = np.log2(sides[:, 0] / sides[:, 1])
    right.hist(aspect, bins=np.linspace(min(-2, aspect.min()), max(2, aspect.max()), 40), color=_COLOURS[0])
    right.set(xlabel="aspect ratio, width : height", ylabel="images")
    ticks = [t for t in range(-7, 8) if min(-2, aspect.min()) <= t <= max(2, aspect.max())]
    right.set_xticks(ticks, [f"1:{2**-t}" if t < 0 else f"{2**t}:1" for t in ticks])
    return figure


def _roots(stats: Stats) -> Any:
    top = stats.top_roots()[::-1]
    figure, (axis,) = _figure(1, width=9, height=0.32 * len(top) + 1)
    for row, (_, count, objects) in enumerate(top):
        left = 0
        for place, (thing, n) in enumerate(objects):
            axis.barh(row, n, left=left, color=_COLOURS[place], height=0.78, edgecolor="white", linewidth=0.6)
            if n > 0.05 * top[-1][1]:
                axis.text(left + n / 2, row, thing, ha="center", va="center", fontsize=7, color="white", clip_on=True)
            left += n
        axis.barh(row, count - left, left=left, color="#dfe2e6", height=0.78)
    axis.set_yticks(range(len(top)), [root for root, _, _ in top], fontsize=9)
    axis.set(xlabel="prompts, by first word and its commonest objects (heuristic)", ylim=(-0.6, len(top) - 0.4))
    return figure


def _nearest(stats: Stats) -> Any:
    figure, (axis,) = _figure(1)
    axis.hist(stats.rouge, bins=np.linspace(0, 1, 41), color=_COLOURS[0])
    # Self-Instruct keeps a new instruction only below this.
    axis.axvline(0.7, color=_COLOURS[3], linewidth=1, linestyle="--")
    axis.set(xlabel=f"ROUGE-L with the nearest of {len(stats.rouge):,} sampled prompts", ylabel="prompts", xlim=(0, 1))
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"...{name[-29:]}"
