"""Curves as inline SVG: a few lines over steps, with axes, a legend and gaps where a value is missing.

In: named series of (step, value). Out: SVG text that takes its colours from the page's style. Draws no more points
than a reader can tell apart, and always the highest and the lowest of those it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mmit.text import escape

Series = Sequence[tuple[float, float | None]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 64, 12, 12, 34
POINTS = 600


def thin(series: Series, most: int = POINTS) -> list[tuple[float, float | None]]:
    """At most `most` points and a few: of each stretch the lowest and the highest, in order."""
    if len(series) <= most:
        return list(series)
    # Not every n-th point: a spike of one step would be seen or not by where it happens to stand.
    size = -(-2 * len(series) // most)
    kept: list[tuple[float, float | None]] = []
    for at in range(0, len(series), size):
        stretch = series[at : at + size]
        known = [p for p in stretch if p[1] is not None]
        ends = {min(known, key=_value), max(known, key=_value)} if known else set()
        kept += sorted(ends | {(x, None) for x, y in stretch[:1] if not known})
    return kept


def _value(point: tuple[float, float | None]) -> float:
    assert point[1] is not None
    return point[1]


def smooth(series: Series, share: float = 0.05) -> list[tuple[float, float | None]]:
    """Running mean: each new value counts by `share`."""
    mean: float | None = None
    out: list[tuple[float, float | None]] = []
    for x, y in series:
        if y is not None:
            mean = y if mean is None else mean + share * (y - mean)
        out.append((x, mean))
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    # 1, 2 or 5 times a power of ten, the first that gives no more lines than asked for; rounding must not skip it.
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def figure(title: str, curves: Mapping[str, Series], *, from_zero: bool = True, faint: bool = False) -> str:
    """A <figure> with one line a name, "" where no curve has a value.

    Args:
        from_zero: the vertical axis begins at 0.
        faint: the first curve is drawn thin, behind its running mean.
    """
    points = [(x, y) for curve in curves.values() for x, y in curve if y is not None]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    low = min(0.0, low) if from_zero else low
    # One step, or a value that never changed: an axis needs some length.
    if right == left:
        left, right = left - 0.5, right + 0.5
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def place(x: float, y: float) -> str:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = [_axes(left, right, low, high)]
    for number, curve in enumerate(curves.values()):
        colour = f"c{number % 6}"
        style = f"{colour} faint" if faint and number == 0 else colour
        parts += [f'<polyline class="{style}" points="{line}"/>' for line in _lines(thin(curve), place)]
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    names = "".join(f'<span class="c{n % 6}">{escape(name)}</span>' for n, name in enumerate(curves))
    legend = f'<div class="legend">{names}</div>' if len(curves) > 1 else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{legend}</figure>"


def _lines(points: Series, place: object) -> list[str]:
    """Unbroken stretches; a single point is drawn as a short line."""
    assert callable(place)
    lines: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            lines.append([])
        else:
            lines[-1].append(place(x, y))
    return [" ".join(line if len(line) > 1 else line * 2) for line in lines if line]


def _axes(left: float, right: float, low: float, high: float) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for y in ticks(low, high):
        at = bottom - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(left, right, 6):
        if x == int(x):
            across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
            parts.append(f'<text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle">{x:.0f}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">step</text>')
    return "".join(parts)
