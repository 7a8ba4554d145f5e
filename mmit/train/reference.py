"""The reference of a preference method: what the model gave its answers before the first step.

Owns one table per data set, (U, 2) log-probabilities, measured once by the model as it begins, whatever of it is then
trained: an adapter, the projector, all weights. So no second model is in memory. The tables lie in every checkpoint: a
run that goes on compares with the same numbers, which its own weights could not give any more.

U units of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmit.errors import CheckpointError
from mmit.train.objective import Method, Preference

if TYPE_CHECKING:
    import torch

    from mmit.models.vlm import VLM
    from mmit.train.data.batches import TrainData
    from mmit.train.engines.base import Engine

FILE = Path("trainer") / "reference.safetensors"
EVAL = "eval"


@dataclass
class References:
    """Tables by the name of their data, "train" and "eval"; none where the method has no reference."""

    method: Method
    vlm: VLM
    tables: dict[str, torch.Tensor]
    contents: dict[str, str]  # hashes of what each table is about

    @classmethod
    def of(
        cls,
        method: Method,
        engine: Engine,
        data: Mapping[str, TrainData | None],
        *,
        vlm: VLM,
        begin: Path | None,
        say: Callable[[Any], None],
    ) -> References:
        """Measure the tables, or read those of the checkpoint `begin`. All ranks call this together.

        Args:
            data: "train" and "eval", each unit once; None where there are none.
            begin: the checkpoint that the run continues, None for a new one.

        Raises:
            CheckpointError: it has none for these data.
        """
        there = {name: held for name, held in data.items() if held is not None}
        contents = {name: _content(held) for name, held in there.items()}
        if not method.referenced:  # ORPO compares the model with nothing but itself
            return cls(method, vlm, {}, contents)
        if begin is not None:  # never measured again: the weights have moved, and the zero of every ratio with them
            return cls(method, vlm, _read(begin, contents), contents)
        at_work, tables = Preference(method, vlm), {}
        for name, held in there.items():
            units = len(held.scan.length)
            say(f"measuring the reference of {units} {name} records once")
            tables[name] = at_work.measure(engine, held, units)
        return cls(method, vlm, tables, contents)

    def at_work(self, name: str) -> Preference:
        """The method on these data."""
        return Preference(self.method, self.vlm, self.tables.get(name))

    def write(self, folder: Path) -> None:
        """Keep the tables in a checkpoint's folder."""
        if self.tables:
            save_file(self.tables, folder / FILE, metadata={"contents": json.dumps(self.contents)})


def _content(data: TrainData) -> str:
    """What the units of a table are: contents of the records, and their order."""
    scan = data.scan
    # Their order too: rows of the table are found by number.
    told = json.dumps([scan.contents, scan.record.tolist(), data.data.compares])
    return hashlib.sha256(told.encode()).hexdigest()


def _read(begin: Path, contents: Mapping[str, str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(begin / FILE, framework="pt") as file:
            told = json.loads((file.metadata() or {})["contents"])
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        problem = f"has no readable reference of a preference run: {error}"
        raise CheckpointError(problem, where=str(begin), remedy="start anew, with run.init_from") from error
    for name, content in contents.items():
        if told.get(name) != content:
            raise CheckpointError(
                f"its reference was measured on other records than those of data.{name}, and the weights it was "
                "measured with are gone",
                where=f"run.resume: {begin}",
                remedy=f"set data.{name} back, or start another run",
            )
    return {name: tables[name] for name in contents}
