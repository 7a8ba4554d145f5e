"""Importers: the data files of the field become Records.

FORMATS has an entry for each format: how its file is cut into rows, and a small function row -> Record. `import_file`
runs one over a file, `detect_format` tells which. Never opens a picture, but for the size in its header where boxes are
in pixels; never fixes a broken row. What a Record has no place for goes into its meta. Nothing is downloaded, except by
the format "hf", which is there to do it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from mmit.data.formats import captions, chat, instruct, mimicit, multimodal, pairs, tabular, transcripts, vqa
from mmit.data.formats.chat import llava, messages, mmit_row, sharegpt
from mmit.data.formats.common import SHARED_OPTIONS, Format, Rows
from mmit.data.formats.detect import detect
from mmit.data.formats.easyvqa import easy_vqa, easy_vqa_captions
from mmit.data.formats.instruct import alpaca
from mmit.data.formats.keys import kept_keys
from mmit.data.formats.packed import unpacked
from mmit.errors import ConfigError, ImageError, RecordError, nearest
from mmit.plugins import FORM, calling, is_spec, own_function, own_object, own_options, source_hash, takes_any_keyword
from mmit.records import OnBad, Record, short

__all__ = [
    "FORMATS",
    "VERSION",
    "Format",
    "alpaca",
    "detect_format",
    "easy_vqa",
    "easy_vqa_captions",
    "find_format",
    "format_code",
    "format_options",
    "import_file",
    "llava",
    "messages",
    "mmit_row",
    "row_reader",
    "sharegpt",
]

# Raised whenever a row may be read differently than before: conversions are made again.
VERSION = 6
_ROW_FORMATS: dict[str, Format] = {
    **chat.FORMATS,
    **instruct.FORMATS,
    **captions.FORMATS,
    **multimodal.FORMATS,
    **mimicit.FORMATS,
    **vqa.FORMATS,
    **pairs.FORMATS,
    **transcripts.FORMATS,
}
# Tables last: their formats name the row formats that a mapping of columns leads to.
FORMATS: dict[str, Format] = {**_ROW_FORMATS, **tabular.table_formats(_ROW_FORMATS)}


def find_format(format: str) -> Format:
    """Return the entry of FORMATS, or what `module:name` of the user's own stands for.

    That is a function (row, *, image_root, **options) -> Record for JSON lists and JSONL, or a `Format`. Raises
    ConfigError for an unknown name, and for what cannot be imported or called so.
    """
    if format in FORMATS:
        return FORMATS[format]
    if not is_spec(format):
        remedy = f"{nearest(format, FORMATS)}, or {FORM} of your own"
        raise ConfigError(f"unknown data format '{format}'", remedy=remedy)
    found = own_object(format, where="format", expects="a function (row, *, image_root, **options) -> Record")
    if isinstance(found, Format):
        return found
    function = own_function(format, positional=("row",), keywords=("image_root",), gives="Record", where="format")
    first = next(iter(own_options(function, ())), "")
    # A function of the user's own has no entry to say what it is, so its docstring does.
    about = (function.__doc__ or format).strip().splitlines()[0]
    options = {name: "" for name in own_options(function, ("image_root", first))}

    def make(row: Any, **given: Any) -> Record:
        with calling(format, where="", remedy="Check the row, or the function.", kind=RecordError):
            record = function(row, **given)
        if not isinstance(record, Record):
            problem = f"{format} returned a {type(record).__name__}"
            raise ConfigError(problem, where="format", remedy="A data format returns a mmit.Record.")
        return record

    return Format(about, make, options=_AnyOption(options) if takes_any_keyword(function) else options)


class _AnyOption(dict[str, str]):
    """Options of a function that takes keyword arguments of any name."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)


def format_code(format: str) -> str:
    """A hash of the code of a format of the user's own; "" for one of FORMATS, whose code is mmit's.

    Raises ConfigError as `find_format` does.
    """
    if format in FORMATS:
        return ""
    find_format(format)
    return source_hash(format, where="format")


def import_file(
    path: str | os.PathLike[str],
    format: str,
    *,
    on_bad: OnBad | None = None,
    **options: Any,
) -> Iterator[Record]:
    """Yield the records of a file in one of FORMATS.

    JSON lists, JSONL and tables are streamed; a file that is one JSON object has to be loaded whole.

    Args:
        path: the file; it may be packed.
        format: a key of FORMATS, or `module:name` of the user's own.
        on_bad: takes a bad row, which is left out, for the caller to count; None raises the first.
        options: those that the format documents, and those of `row_reader` (image_root, source, licence,
            check_images, kept).

    Raises:
        RecordError: a bad row, naming file and row; a file that cannot be read, with `on_bad` too.
        ConfigError: unknown format or option.
    """
    read = row_reader(path, format, **options)
    entry = find_format(format)
    file_options = {key: value for key, value in options.items() if key in entry.file_options}
    return _import(_rows(os.fspath(path), entry, file_options), read, on_bad=on_bad)


def _rows(path: str, entry: Format, options: Mapping[str, Any]) -> Rows:
    """Cut a file into rows, unpacked where it is packed; errors name the file that was given."""
    with unpacked(path) as file:
        try:
            for number, row in entry.rows(file, **options):
                yield number, _of_file(row, file, path) if isinstance(row, RecordError) else row
        except (RecordError, ConfigError) as error:
            raise _of_file(error, file, path) from error


def _of_file(error: Any, file: str, path: str) -> Any:
    return type(error)(error.problem, where=error.where.replace(file, path), remedy=error.remedy)


def row_reader(
    path: str | os.PathLike[str],
    format: str,
    *,
    image_root: str | os.PathLike[str] | None = None,
    source: str | None = None,
    licence: str | None = None,
    check_images: bool = False,
    kept: Counter[str] | None = None,
    **options: Any,
) -> Callable[[Any, int], Record]:
    """Return the function (row, line or position) -> Record of a file in one of FORMATS.

    It raises RecordError naming file and row for a bad row, and for one that is its RecordError already; ConfigError
    for an option that cannot work.

    Args:
        path: of the file, for messages.
        format: a key of FORMATS, or `module:name` of the user's own.
        image_root: where relative image paths start; None takes the file's folder.
        source, licence: noted where a row states none of its own, by default the path and the format's licence; with
            the source goes the row's line, or its position in a list.
        check_images: every image file must exist.
        kept: counts the keys that stay in the meta unread.
        options: those that the format documents.
    """
    entry, name = find_format(format), os.fspath(path)
    _check_names(format, entry, options, where=name)
    row_options = {key: value for key, value in options.items() if key in entry.options or key in SHARED_OPTIONS}
    folder = "" if format == "hf" else os.path.dirname(name)  # what "hf" is given may be a name, not a path
    root = folder if image_root is None else os.fspath(image_root)
    owned = licence or entry.licence

    def build(row: Any, number: int) -> Record:
        if isinstance(row, RecordError):
            raise row
        if not isinstance(row, dict):
            remedy = f"Each row must be a JSON object: {entry.about}."
            raise RecordError(f"found a {type(row).__name__}, not an object", remedy=remedy)
        record = entry(row, image_root=root, **row_options)
        # What a row states goes before what is said of the file, and that before what is known of the format.
        told: dict[str, Any] = {} if record.licence or not owned else {"licence": owned}
        if not record.source and record.row is None:
            told |= {"source": source or name, "row": number}
        record = replace(record, **told) if told else record
        record.validate(for_training=None)
        if check_images:
            _check_images(record)
        if kept is not None:
            kept.update(kept_keys(record))
        return record

    return partial(_read_row, build, name)


def _read_row(build: Callable[[Any, int], Record], name: str, row: Any, number: int) -> Record:
    try:
        return build(row, number)
    except RecordError as error:
        raise _at(error, f"{name}:{number}", row) from error
    except ConfigError as error:
        # An option that cannot work is wrong for every row: not a bad record to be left out.
        raise ConfigError(error.problem, where=error.where or name, remedy=error.remedy) from error


def _check_names(format: str, entry: Format, options: Iterable[str], *, where: str) -> None:
    for option in options:
        known = format_options(format)
        if option not in known and option not in entry.options:
            problem = f"the format {format} has no option '{option}'"
            remedy = nearest(option, known) if known else "It has no options: leave them out."
            raise ConfigError(problem, where=where, remedy=remedy)


def _import(
    rows: Iterator[tuple[int, Any]], read: Callable[[Any, int], Record], *, on_bad: OnBad | None
) -> Iterator[Record]:
    for number, row in rows:
        try:
            record = read(row, number)
        except RecordError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield record


def _at(error: RecordError, place: str, row: Any) -> RecordError:
    """Say in which file and row `error` arose; the place inside the row, ": turn 2", is kept."""
    name = short(row["id"]) if isinstance(row, dict) and row.get("id") else ""
    inside = error.where.removeprefix("record") if error.where.startswith("record:") else ""
    where = f"{place} ({name}){inside}" if name else place + inside
    return type(error)(error.problem, where=where, remedy=error.remedy)


def _check_images(record: Record) -> None:
    paths = [image.source for image in record.images if isinstance(image.source, str)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        names = ", ".join(short(path, 60) for path in missing[:3]) + (", ..." if len(missing) > 3 else "")
        remedy = "Fetch the files, or set image_root to the folder that the paths start at."
        raise ImageError(f"{len(missing)} image files are missing: {names}", remedy=remedy)


def detect_format(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return (name in FORMATS, the reason); RecordError if the file's keys fit none.

    Told from the ending of the name for tables, else from the keys of the first row or of the one object that the
    file is. LLaVA and ShareGPT rows look alike, so the first 1000 rows are searched for images, speakers and ids.
    """
    with unpacked(os.fspath(path)) as file:
        try:
            return detect(file, FORMATS)
        except RecordError as error:
            raise _of_file(error, file, os.fspath(path)) from error


def format_options(format: str) -> Mapping[str, str]:
    """Return {option: what it does} of a format; ConfigError for an unknown one."""
    entry = find_format(format)
    return {**entry.file_options, **entry.options, **({} if entry.own else SHARED_OPTIONS)}
