"""What the loaders of benchmarks share: a folder that knows what should be in it, and how a question is written down.

In: a benchmark's folder as a user downloaded it. Out: Records that end with the user's turn; their meta has
`reference` (what the metric expects), and where there are any `group` and `choices`. Opens no picture.
A data set of the hub ("hub:owner/name", with "@revision" if wanted) is fetched once into the hub's cache and is then a
folder like any other; code is never fetched, and the cache is read when there is no network.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmit.data.formats.common import json_object, json_rows
from mmit.data.formats.pictures import image_part
from mmit.data.formats.tabular import csv_rows, parquet_rows
from mmit.errors import ConfigError, RecordError
from mmit.eval.questions import CHOICES, REFERENCE
from mmit.records import Image, Record, Text, Turn

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Questions = Iterator[Record]
Columns = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LmmsTask:
    """A task of lmms-eval that asks the same questions: its YAML below the harness's tasks/, the split of ours.

    `data` is the folder in the data root, by default that of the layout's name; `more` are further keys of the YAML.
    """

    yaml: str
    split: str | None = None
    data: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lmms:
    """A benchmark in lmms-eval: its questions as the columns that the tasks read, and the tasks by name."""

    columns: Callable[[Record], Columns]
    tasks: Mapping[str, LmmsTask]


@dataclass(frozen=True, slots=True)
class Layout:
    """All that mmit knows of one benchmark but prompt and metric, which its task's YAML names.

    Attributes:
        read: yields the questions: `(folder, split, **options)`.
        files: a path in the folder ({split} standing for the split) -> what it is.
        get: where the files come from.
        splits: the splits there are, the first being the default.
        options: what each option of `read` does.
        lmms: the same questions in lmms-eval, for `mmit harness overlay`.
    """

    read: Callable[..., Questions]
    files: Mapping[str, str]
    get: str
    splits: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    lmms: Lmms | None = None


class Folder:
    """A benchmark's folder; `at` is the file and row being read, for messages."""

    def __init__(self, path: str | os.PathLike[str], layout: Layout, *, task: str, split: str) -> None:
        self.path, self.layout, self.task, self.split = Path(path), layout, task, split
        self.at = str(path)

    def find(self, *names: str) -> Path:
        """Return the first of `names` (glob patterns too) that exists. Raises ConfigError with all files expected."""
        for name in names:
            found = sorted(self.path.glob(name)) if "*" in name else [self.path / name]
            if found and found[0].exists():
                return found[0]
        raise self.lacks(" or ".join(names))

    def find_all(self, *names: str) -> list[Path]:
        """Return all files of the first glob pattern that has any. Raises as `find`."""
        for name in names:
            found = sorted(self.path.glob(name))
            if found:
                return found
        raise self.lacks(" or ".join(names))

    def lacks(self, what: str) -> ConfigError:
        """Return the error of a folder that is not as expected."""
        there = "" if self.path.is_dir() else ", a folder that does not exist"
        lines = [f"It expects, {self.path} being its folder:"]
        lines += [f"  {name}  ({about})".format(split=self.split) for name, about in self.layout.files.items()]
        lines += [f"How to get them: {self.layout.get}", "--data-root names the folder above."]
        problem = f"task '{self.task}' needs {what} in {self.path}{there}"
        return ConfigError(problem, where=str(self.path), remedy="\n".join(lines))

    def json(self, *names: str, needs: Sequence[str] = ()) -> dict[str, Any]:
        """Read the first of `names` that exists, a JSON object."""
        path = self.find(*names)
        self.at = str(path)
        return json_object(str(path), *needs)

    def rows(self, *names: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, row) of the first of `names` that exists: JSON list, JSONL, TSV, CSV or parquet."""
        yield from self.rows_of(self.find(*names))

    def rows_of(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, row) of a file; a bad row raises."""
        readers: dict[str, Any] = {".tsv": csv_rows, ".csv": csv_rows, ".parquet": parquet_rows}
        for number, row in readers.get(path.suffix, json_rows)(str(path)):
            self.at = f"{path}:{number}"
            if isinstance(row, RecordError):
                raise row
            if not isinstance(row, dict):
                problem = f"found a {type(row).__name__}, not an object"
                raise RecordError(problem, where=self.at, remedy="Fetch the file again.")
            yield number, row

    def picture(self, value: Any, *, root: Path | None = None) -> Image:
        """Return the picture of a file name below `root`, of bytes, or of a parquet file's struct."""
        try:
            return image_part(value, str(root or self.path))
        except RecordError as error:
            raise RecordError(error.problem, where=self.at, remedy=error.remedy) from error

    def question(
        self,
        text: str,
        images: Sequence[Image] = (),
        *,
        id: Any,
        reference: Any,
        group: Any = None,
        choices: Sequence[str] | None = None,
        parts: Sequence[Text | Image] | None = None,
    ) -> Record:
        """Return a question: pictures, then text, or `parts` in their own order.

        Args:
            id: of the question, unlike any other's in the benchmark.
            reference: what the metric compares an answer with.
            group: the type of question, each of which gets a score of its own.
            choices: the possible answers, where they are known.

        Raises:
            RecordError: it has no text, or a picture that is none.
        """
        meta: dict[str, Any] = {"reference": reference}
        if group is not None:
            meta["group"] = str(group)
        if choices is not None:
            meta["choices"] = list(choices)
        content: tuple[Text | Image, ...] = tuple(parts) if parts is not None else (*images, Text(text))
        record = Record((Turn("user", content),), str(id), self.at, None, None, meta)
        record.validate(for_training=False)
        return record


def lettered(options: Sequence[Any]) -> str:
    """Return options one a line: "A. red", "B. blue"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))


def by_letter(options: Sequence[Any]) -> dict[str, str]:
    """Return {"A": first option, ...}."""
    return {letter: str(option) for letter, option in zip(ascii_uppercase, options, strict=False)}


def options_in(row: Mapping[str, Any], names: Sequence[str] = "ABCDEFGH") -> list[str]:
    """Return the cells of the columns `names` up to the first that is missing or empty."""
    found = []
    for name in names:
        cell = row.get(name)
        if cell is None or str(cell).strip() in ("", "nan"):
            break
        found.append(str(cell))
    return found


# --- columns of lmms-eval: what its prompts and scoring read, an image as an mmit Image


def asked(record: Record) -> Columns:
    """Return what every task of lmms-eval reads: id, first image, question."""
    return {"question_id": record.id, "image": record.images[0], "question": record.turns[-1].text}


def with_answer(record: Record) -> Columns:
    """Return the columns of tasks with one answer (GQA, RealWorldQA)."""
    return asked(record) | {"answer": str(record.meta[REFERENCE])}


def with_answers(record: Record) -> Columns:
    """Return the columns of tasks with several people's answers (TextVQA, VizWiz, DocVQA)."""
    return asked(record) | {"answers": list(map(str, record.meta[REFERENCE]))}


def split_options(record: Record) -> tuple[str, list[str]]:
    """Take the options off the end of a question: its text, and the options without their letters.

    Raises RecordError if they are not there, one a line behind their letters.
    """
    rest, options = record.turns[-1].text, list[str]()
    for letter in reversed(record.meta[CHOICES]):
        rest, _, option = rest.rpartition(f"\n{letter}. ")
        options.insert(0, option)
    if f"{rest}\n{lettered(options)}" != record.turns[-1].text:
        problem = "the question does not end with its options"
        raise RecordError(problem, where=record.where, remedy="Choose a task that lists them one a line.")
    return rest, options


PREFIX = "hub:"


def local_folder(folder: str) -> str:
    """Return the folder itself, or the files of the hub's data set that it names. Raises ConfigError."""
    if not folder.startswith(PREFIX):
        return folder
    name, _, revision = folder.removeprefix(PREFIX).partition("@")
    try:
        return snapshot_download(name, repo_type="dataset", revision=revision or None, ignore_patterns=["*.py"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"the hub does not give the data set '{name}': {said[0] if said else type(error).__name__}",
            where=folder,
            remedy="Check the id, the network and (for gated sets) `hf auth login`; or download it to a folder: "
            f"hf download --repo-type dataset {name} --local-dir {Path('FOLDER')}",
        ) from error
