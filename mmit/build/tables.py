"""Small tables cut out of the package vega-datasets, as text and as charts drawn by matplotlib.

A row is a window of four to seven neighbours of one published series (Seattle's weather by day, Iowa's electricity by
year, the price of wheat by five years, losses in the Crimea by month), whose highest and lowest values stand out by
5 %. So every answer is known from the table. The last fifth of each series is of the split "test". Reads the
package's files without importing it.
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from functools import cache
from typing import Any

import PIL.Image

from mmit.build.package_data import package_file, png
from mmit.errors import RecordError

ROWS = {"train": 2_000, "test": 400}
KINDS = ("bar", "horizontal bar", "line")
_STANDS_OUT = 0.05
_SIZE = (320, 240)  # pixels
Series = tuple[str, list[tuple[str, float]]]  # title, (name, value) in order of time


def tables(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields) of tables as text.

    Fields: table (lines of "name: value"), title, names, values (texts), highest and lowest (names), number.

    Raises ConfigError without the package, RecordError for a damaged file.
    """
    for row, fields in _windows(split, "tables"):
        listed = zip(fields["names"], fields["values"], strict=True)
        text = "\n".join(f"{name}: {value}" for name, value in listed)
        yield row, {"table": f"{fields['title']}\n{text}", **fields}


def charts(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row, fields) of charts; like `tables`, with image and kind (bar, horizontal bar, line) for the table."""
    for row, fields in _windows(split, "charts"):
        kind = random.Random(fields["id"]).choice(KINDS)
        yield row, {"image": png(_drawn(kind, fields)), "kind": kind, **fields}


def _windows(split: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    every = [_part(series, split) for series in _all_series()]
    for row in range(1, ROWS[split] + 1):
        rng = random.Random(f"{name}|{split}|{row}")
        while True:
            title, points = rng.choice(every)
            count = rng.randint(4, 7)
            start = rng.randrange(len(points) - count + 1) if len(points) >= count else 0
            window = points[start : start + count]
            if len(window) == count and _is_clear([value for _, value in window]):
                break
        order = sorted(window, key=lambda point: point[1])
        yield (
            row,
            {
                "id": f"vega-{name}/{split}/{row}",
                "title": title,
                "names": [point for point, _ in window],
                "values": [f"{value:g}" for _, value in window],
                "highest": order[-1][0],
                "lowest": order[0][0],
                "number": count,
            },
        )


def _part(series: Series, split: str) -> Series:
    title, points = series
    cut = len(points) * 4 // 5
    return title, points[cut:] if split == "test" else points[:cut]


def _is_clear(values: list[float]) -> bool:
    """All different, and both ends stand out by a share of the largest."""
    order = sorted(values)
    gap = _STANDS_OUT * order[-1]
    different = len({f"{value:g}" for value in values}) == len(values)
    return different and order[-1] - order[-2] >= gap and order[1] - order[0] >= gap and gap > 0


@cache
def _all_series() -> tuple[Series, ...]:
    found: list[Series] = []
    weather = _csv("seattle-weather.csv")
    days = [date.fromisoformat(row["date"].replace("/", "-")) for row in weather]
    for column, title in (
        ("precipitation", "Rain in Seattle (mm)"),
        ("temp_max", "Highest temperature in Seattle (°C)"),
        ("wind", "Wind in Seattle (m/s)"),
    ):
        points = [
            (f"{day.day} {day:%b} {day.year}", float(row[column])) for day, row in zip(days, weather, strict=True)
        ]
        found.append((title, points))
    by_source: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in _csv("iowa-electricity.csv"):
        by_source[row["source"]].append((row["year"][:4], float(row["net_generation"])))
    found += [(f"Electricity in Iowa: {source} (GWh)", points) for source, points in by_source.items()]
    wheat = _json("wheat.json")
    found.append(("Price of a quarter of wheat (shillings)", [(row["year"], float(row["wheat"])) for row in wheat]))
    crimea = _json("crimea.json")
    for column in ("wounds", "other", "disease"):
        points = [(f"{date.fromisoformat(row['date']):%b %Y}", float(row[column])) for row in crimea]
        found.append((f"British deaths in the Crimea: {column}", points))
    return tuple(found)


def _text(name: str) -> str:
    return package_file("vega_datasets", f"_data/{name}", pip="vega-datasets").read_text(encoding="utf-8")


def _csv(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(_text(name).splitlines()))


def _json(name: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(_text(name))
        return rows
    except ValueError as error:
        remedy = "pip install --force-reinstall vega-datasets"
        raise RecordError(f"is not JSON: {error}", where=name, remedy=remedy) from error


def _drawn(kind: str, fields: dict[str, Any]) -> PIL.Image.Image:
    """Draw a chart whose marks carry their values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0] / 100, _SIZE[1] / 100), dpi=100)
    left = 0.26 if kind == "horizontal bar" else 0.15
    axes = figure.add_axes((left, 0.24, 0.96 - left, 0.64))  # a layout engine would take twice as long
    names, values = fields["names"], [float(value) for value in fields["values"]]
    if kind == "line":
        axes.plot(names, values, "o-")
        for name, value, text in zip(names, values, fields["values"], strict=True):
            axes.annotate(text, (name, value), textcoords="offset points", xytext=(0, 4), ha="center", fontsize=7)
        axes.margins(y=0.2)
        axes.set_ylim(bottom=min(0.0, *values))
    else:
        bars = axes.bar(names, values) if kind == "bar" else axes.barh(names, values)
        axes.bar_label(bars, labels=fields["values"], fontsize=7)
        axes.margins(x=None if kind == "bar" else 0.15, y=0.15 if kind == "bar" else None)
    axes.set_title(fields["title"], fontsize=8)
    axes.tick_params(labelsize=7)
    if kind != "horizontal bar":
        axes.tick_params(axis="x", labelrotation=30)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return PIL.Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
