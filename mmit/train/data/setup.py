"""From the sources of a run to its micro-batches: open, measure, refuse or leave out, order, load.

Owns what has to be known about the data before the first step, and the policy for bad records. Takes plain
arguments, gives `InstructionData`, its `Measurements` and the `RowOrder`. Refuses a run whose records cannot fit its
rows.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.data.chat import ChatFormat, chat_format, encode
from mmit.data.dataset import InstructionData
from mmit.data.loss import Loss
from mmit.data.prefetch import allowed_cores
from mmit.data.sources import Source, SourceSpec, open_source
from mmit.data.store import Store, key_of
from mmit.errors import ConfigError, RecordError, located, nearest
from mmit.io import append, write_atomic
from mmit.plugins import source_hash
from mmit.text import terminal

if TYPE_CHECKING:
    import torch

    from mmit.data.chat_writer import Encoded
    from mmit.data.loader import LoadImage
    from mmit.data.measure import Measurements
    from mmit.data.preparation import ImagePreparation
    from mmit.records import Image, Record

Say = Callable[[Any], None]
BAD_RECORDS = {"train": "bad_records.jsonl", "eval": "bad_records_eval.jsonl"}  # in the run's folder


def check_lengths(*, max_length: int, capacity: int, limit: int | None, virtual: int = 0) -> None:
    """Refuse records longer than a row or than the LLM can take.

    Args:
        max_length: of a record, in tokens. capacity: of a row.
        limit: of the LLM's context, after the `virtual` tokens of a soft prompt have taken their places.

    Raises:
        ConfigError: they may be longer.
    """
    # Refused, not cut: an answer without its end teaches a model not to stop.
    if max_length > capacity:
        raise ConfigError(
            f"max_length={max_length} is more than pack_tokens={capacity}: a record may not fit",
            where="data",
            remedy="raise data.pack_tokens or lower data.max_length",
        )
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"max_length={max_length} is more than the {limit} tokens the LLM was built for"
            + (f" less the {virtual} of the soft prompt" if virtual else ""),
            where="data.max_length",
            remedy=f"set data.max_length={limit} or less",
        )


def cache_folder(given: str | None, *, run_dir: Path) -> Path:
    """Where what was found out about data is kept: `given`, MMIT_CACHE, or a folder of the user's. Makes nothing.

    All runs on the same data share it. Without a home that can be written it is in the run's folder.
    """
    if given is not None:
        return Path(given).expanduser()
    if "MMIT_CACHE" in os.environ:
        return Path(os.environ["MMIT_CACHE"]) / "data"
    # Asked without making it: a forecast or a refused run must leave nothing behind.
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmit" / "data"
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # no such home, or not ours
        pass
    return run_dir / "data"


def chat_of(section: Mapping[str, Any], tokenizer: Any, *, date: str | None = None) -> ChatFormat:
    """Build the chat format; `date` (ISO) is the day of a template that asks for it, None for today.

    Raises ConfigError, placed at model.chat.format.
    """
    given = dict(section)
    with located("model.chat.format"):
        return chat_format(given.pop("format"), tokenizer, date=date, **given)


@dataclass(frozen=True)
class Encoding:
    """How a conversation becomes tokens with loss weights. `loss` is the section data.loss, empty for plain answers."""

    chat: ChatFormat
    tokenizer: Any
    loss: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """Stands for all that decides the tokens and their weights, but for mmit's own code."""
        return key_of(encoding_key(self.chat, self.tokenizer), dict(self.loss))

    def encoder(self) -> Callable[[Record], Encoded]:
        """The function itself; it can be sent to loader processes."""
        loss = Loss(**{k: v for k, v in self.loss.items() if k != "sources"})
        return partial(_encode, self.chat, self.tokenizer, loss)


def open_data(
    sources: Sequence[Mapping[str, Any]],
    encoding: Encoding,
    *,
    cache: Path,
    on_bad: Callable[[RecordError], None] | None,
    key: str = "data.train",
    say: Say = lambda text: None,
    **options: Any,
) -> InstructionData:
    """Open the sources of a run.

    Args:
        sources: per source the keys of a `SourceSpec`.
        cache: see `cache_folder`.
        on_bad: receives rows that are no records and have no number; None raises the first. Others are bad records.
        key: the list of the config that they are from, for messages.
        options: what else `InstructionData` takes (preparation, max_length, capacity, ...).
    """
    keys = ("path", "format", "image_root", "name", "limit", "options")
    opened = []
    for i, source in enumerate(sources):
        with located(f"{key}.{i}"):
            wanted = SourceSpec(**{k: source[k] for k in keys})
            opened.append(open_source(wanted, cache=cache, on_bad=on_bad, say=say, check_rows=False))
    # Held-out sources may lack the names that data.loss.sources weighs: it is written for the training data.
    weights = source_weights(opened, encoding.loss.get("sources", {}), strict=key == "data.train")
    data = InstructionData(opened, encoding.encoder(), key=encoding.key(), source_weights=weights, **options)
    data.own_thought = encoding.chat.own_thought
    return data


def encoding_key(chat: ChatFormat, tokenizer: Any) -> str:
    """Stands for all that decides the tokens of a conversation, but for mmit's own code."""
    # Versions too: a tokenizer library that splits otherwise would make lengths on file wrong without a sign.
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    libraries = [_version(name) for name in ("tokenizers", "transformers", "jinja2")]
    code = source_hash(chat.name, where="model.chat.format") if chat.own else ""
    return key_of(chat.to_json(), code, tokenizer.backend_tokenizer.to_str(), special, libraries)


@lru_cache  # reads and parses a file
def _version(library: str) -> str:
    return metadata.version(library)


def _encode(chat: ChatFormat, tokenizer: Any, loss: Loss, record: Record) -> Encoded:
    return encode(record, chat, tokenizer, loss=loss)


def source_weights(sources: Sequence[Source], given: Mapping[str, float], *, strict: bool = True) -> list[float]:
    """Loss weight of each source; raises ConfigError for the name of none, if `strict`."""
    names = [source.name for source in sources]
    for name in given:
        if strict and name not in names:
            raise ConfigError(f"no source is named '{name}'", where="data.loss.sources", remedy=nearest(name, names))
    return [float(given.get(source.name, 1.0)) for source in sources]


def measure(
    data: InstructionData, *, store: Store, shown: bool, alive: Callable[[], None] = lambda: None
) -> Measurements:
    """Measure all records on all cores, or read what an earlier start found.

    Args:
        shown: draw a progress bar on stderr, if that is a terminal.
        alive: called now and then.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = terminal(stderr=True)
    columns = (TextColumn("measuring the data", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
    with bar:
        task = bar.add_task("", total=len(data))

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            alive()

        return data.scan(workers=allowed_cores(), store=store, progress=progress)


@dataclass(frozen=True)
class BadRecordPolicy:
    """What a config says about records that cannot be used: `run.on_bad_record` and `run.max_bad_fraction`."""

    skip: bool
    max_fraction: float

    def apply(self, scan: Measurements, *, run_dir: Path | None, main: bool, say: Say, part: str = "train") -> None:
        """Refuse the run or leave bad records out; all of them are listed in the run's folder, if there is one.

        Args:
            main: this rank writes the list and says what is left out; every rank raises.
            part: "train" or "eval": the list of the config that the records are from.

        Raises:
            RecordError: a bad record and no leave to skip it, more of them than tolerated, or nothing is left.
        """
        key, listing = f"data.{part}", None if run_dir is None else run_dir / BAD_RECORDS[part]
        listed = "" if listing is None else f", listed in {listing}"
        # Before anything is refused: the list is what a user fixes the data by.
        if main and scan.bad and listing is not None:
            write_atomic(listing, "".join(_line(e) for e in scan.bad))
        if scan.bad and not self.skip:
            first = scan.bad[0]
            more = f" (the first of {len(scan.bad)} bad records{listed})" if len(scan.bad) > 1 else ""
            raise type(first)(first.problem + more, where=first.where, remedy=first.remedy)
        if len(scan.bad) > most_bad(self.max_fraction, scan.records):
            raise RecordError(
                f"{len(scan.bad)} of {scan.records} records are bad, more than run.max_bad_fraction="
                f"{self.max_fraction:g} allows; the first: {scan.bad[0]}",
                where=key if listing is None else str(listing),
                remedy="fix the data, or raise run.max_bad_fraction",
            )
        if scan.bad:
            say(f"{len(scan.bad)} bad records are left out{listed}")
        if not len(scan.length):
            raise RecordError("no usable record is left", where=key, remedy="check the files and formats")


def most_bad(fraction: float, records: int) -> int:
    """How many of `records` may be bad; 0.29 of 100 are 29, though their product in floating point is less."""
    return math.floor(fraction * records + 1e-9 * records)


def note_bad(run_dir: Path, rank: int, error: RecordError, *, part: str = "train") -> None:
    """Add a record that turned out bad while training to the listing.

    Args:
        run_dir: of the run. rank: each has a file of its own, so that none writes into another's.
        error: its place and cause. part: "train" or "eval", which have listings of their own.
    """
    listing = run_dir / BAD_RECORDS[part]
    append(listing if rank == 0 else listing.with_name(f"{listing.stem}-{rank}.jsonl"), _line(error))


def source_names(data: InstructionData) -> list[str]:
    """Names of the sources for metrics: equal ones are numbered."""
    # Metrics are kept by name: two sources of one name would overwrite each other.
    names: list[str] = []
    for source in data.sources:
        name, count = source.name, 1
        while name in names:
            count += 1
            name = f"{source.name} ({count})"
        names.append(name)
    return names


def _line(error: RecordError) -> str:
    return json.dumps({"where": error.where, "problem": error.problem, "remedy": error.remedy}) + "\n"


def image_loader(preparation: ImagePreparation) -> LoadImage:
    """Picture, place -> (C, 3, H, W) uint8, as the tower wants it."""
    return partial(_load_image, preparation)


def _load_image(preparation: ImagePreparation, image: Image, where: str) -> torch.Tensor:
    return preparation.pixels(image, where=where)
