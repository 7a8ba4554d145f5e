"""Photographs of solar cells with their defects, of the package elpv-dataset (CC-BY-NC-SA-4.0: no commercial use).

2,624 cells of 44 modules by electroluminescence, 300 x 300 grey pixels, each judged by experts (Buerhop-Lutz et al.,
2018). Reads the package's files without importing it. Neighbours in its table may come from one module, so whole blocks
of it are of the split "test", a fifth in all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from mmit.build.package_data import package_file
from mmit.errors import RecordError
from mmit.records import Image

PIP = "elpv-dataset"
BLOCK = 32  # neighbours that stay in one split
KINDS = {"mono": "monocrystalline", "poly": "polycrystalline"}


def cells(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row in the package's table, fields) in random order.

    Fields: image, probability (0 to 1, in thirds, that the cell is defective), defective (yes above one half, no),
    kind (monocrystalline, polycrystalline).

    Raises ConfigError without the package, RecordError for a damaged table.
    """
    table = package_file("elpv_dataset", "data/labels.csv", pip=PIP)
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if ((number - 1) // BLOCK % 5 == 4) != (split == "test"):
            continue
        try:
            name, told, kind = line.split()
            probability = float(told)
            fields = {
                "image": Image(str(table.parent / name)),
                "id": f"elpv/{split}/{number}",
                "probability": round(probability, 2),
                "defective": "yes" if probability > 0.5 else "no",
                "kind": KINDS[kind],
            }
        except (ValueError, KeyError) as error:
            remedy = f"pip install --force-reinstall {PIP}"
            raise RecordError(
                f"is no line of name, probability and kind: {error}", where=f"{table}:{number}", remedy=remedy
            ) from error
        rows.append((number, fields))
    random.Random(f"cells|{split}").shuffle(rows)  # the table goes module by module
    yield from rows
