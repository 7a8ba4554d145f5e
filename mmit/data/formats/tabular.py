"""Tables: CSV and TSV, local parquet files, Hugging Face `datasets` by name, JSON rows of no known format.

Takes a table and a mapping from what a record needs to the table's columns; or the rows are read as those of
another format. pyarrow and datasets are imported only when a table needs them. Never runs a data set's own code,
and guesses no column.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mmit.data.formats.chat import Dialogue, conversation_format, said
from mmit.data.formats.common import Format, Row, Rows, json_rows, one_of, with_input
from mmit.data.formats.pictures import MARKER, base64_image, image_part, images_first, place_images
from mmit.data.formats.transcripts import is_guanaco
from mmit.errors import ConfigError, RecordError, nearest
from mmit.records import Image, Record, short

# What a record can be made of; the values are what the column must hold.
ROLES = {
    "instruction": "what is asked",
    "input": "what it is asked about, after a blank line",
    "output": "the answer; without it records are for generation",
    "system": "a system text",
    "image": "a picture's path, bytes, or the struct that parquet files hold; or a list of them",
    "image_base64": "a picture in base64",
    "id": "the record's id",
}
# A cell may hold a picture in base64; the csv module's own limit is 128 KiB.
_CELL_LIMIT = 1 << 28


def csv_rows(path: str, *, delimiter: str | None = None, encoding: str = "utf-8-sig", quoting: str = "minimal") -> Rows:
    """Yield (line, {column: cell}) of a CSV or TSV file with a header; the line is the one where the row begins.

    A row with more or fewer cells than the header is yielded as its RecordError.

    Args:
        path: the file.
        delimiter: between cells; by default "," and a tab for .tsv and .tab files.
        encoding: of the file.
        quoting: "minimal", or "none" to take quotes as text, for files that do not quote their cells.

    Raises:
        RecordError: the file cannot be read, or is no table from some line on. ConfigError: unknown `quoting`.
    """
    sign = delimiter or ("\t" if path.lower().endswith((".tsv", ".tab")) else ",")
    plain = one_of(quoting, "quoting", ("minimal", "none")) == "none"
    # The limit belongs to the process; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), _CELL_LIMIT))
    line = 0
    try:
        with open(path, encoding=encoding, newline="") as file:
            # Not strict, the reader would take "Yes" he said in an unquoted file for Yes he said.
            quotes: Any = csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
            reader = csv.reader(file, delimiter=sign, quoting=quotes, strict=True)
            for line, row in _cells(reader, path):
                yield line, row
    except OSError as e:
        raise RecordError(f"cannot read: {e.strerror}", where=path, remedy="Check the path.") from e
    except (UnicodeDecodeError, LookupError) as error:
        remedy = "Save the file as UTF-8, or give the option encoding."
        raise RecordError(f"not {encoding}: {short(str(error))}", where=path, remedy=remedy) from error
    except (csv.Error, TypeError) as error:
        problem = f"not a table after line {line}: {short(str(error))}"
        remedy = "Check the delimiter and the quotes; give quoting=none if the file does not quote its cells."
        raise RecordError(problem, where=path, remedy=remedy) from error


def _cells(reader: Any, path: str) -> Rows:
    header: list[str] | None = None
    start = 1
    for cells in reader:
        # A quoted cell may span lines: a row is known by where it begins.
        line, start = start, reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header):
                twice = sorted({name for name in header if header.count(name) > 1})
                remedy = "Rename the columns, so that each has its own name."
                raise RecordError(f"columns come twice: {', '.join(twice)}", where=path, remedy=remedy)
        elif len(cells) != len(header):
            problem = f"the row has {len(cells)} cells where the header has {len(header)}"
            remedy = "Check its quotes and delimiters, or remove the row."
            yield line, RecordError(problem, where=f"{path}:{line}", remedy=remedy)
        else:
            yield line, dict(zip(header, cells, strict=True))


def object_rows(path: str) -> Rows:
    """Yield the rows of JSON or JSONL, each with every key that some row of the file has; the file is read twice.

    So an optional key may be missing in a row, and a mapping to a key that no row has is told at once.
    """
    keys = dict.fromkeys(key for _, row in json_rows(path) if isinstance(row, dict) for key in row)
    for number, row in json_rows(path):
        yield number, (keys | row if isinstance(row, dict) else row)


def parquet_rows(path: str) -> Rows:
    """Yield (row from 1, {column: value}) of a local parquet file, batch by batch."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("parquet needs pyarrow", where=path, remedy="pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            # Batches, since a column of pictures would not fit into memory as a whole.
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except OSError as error:
        raise RecordError(f"cannot read: {short(str(error))}", where=path, remedy="Check the path.") from error
    except pyarrow.ArrowException as error:
        problem = f"not a parquet file: {short(str(error))}"
        raise RecordError(problem, where=path, remedy="Fetch it again, or check its name.") from error


def hf_rows(path: str, *, split: str = "train", config: str | None = None, revision: str | None = None) -> Rows:
    """Yield (row from 1, row) of a Hugging Face data set, streamed; pictures stay encoded.

    Data sets that are defined by a script are refused: their code would run here.

    Args:
        path: its name, a folder of files, or a folder of `Dataset.save_to_disk`.
        split: of its splits.
        config: of its configurations, None for the only one.
        revision: of the hub's repository, None for the newest.

    Raises:
        ConfigError: datasets is not installed, or it cannot load this.
    """
    try:
        import datasets
    except ImportError as error:
        remedy = "pip install datasets, or download the parquet files and import them as parquet."
        raise ConfigError("Hugging Face data sets need the package datasets", where=path, remedy=remedy) from error
    # Version 4 cannot run scripts any more and does not know the argument.
    safe = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    try:
        if os.path.isfile(os.path.join(path, "state.json")):  # what Dataset.save_to_disk writes: one split
            if config or revision or split != "train":
                remedy = "Leave split, config and revision out, or name the folder of another split."
                raise ConfigError("a folder of Dataset.save_to_disk holds one split", where=path, remedy=remedy)
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, config, split=split, revision=revision, streaming=True, **safe)
        # Left encoded: the library would decode every picture, and mmit keeps the bytes as they came.
        for name, feature in (rows.features or {}).items():
            if (kept := _encoded(feature, datasets.Image)) != feature:
                rows = rows.cast_column(name, kept)
        yield from enumerate(rows, 1)
    except (OSError, ValueError, RuntimeError) as error:
        problem = f"cannot load the data set: {short(str(error), 200)}"
        remedy = "Check its name and the options split, config and revision; one with a script must be exported first."
        raise ConfigError(problem, where=path, remedy=remedy) from error


def _encoded(feature: Any, image: Any) -> Any:
    """The feature with pictures left encoded, those in lists (`images`) and structs too."""
    if isinstance(feature, image):
        return image(decode=False)
    if isinstance(feature, dict):
        return {key: _encoded(value, image) for key, value in feature.items()}
    if isinstance(feature, list):
        return [_encoded(value, image) for value in feature]
    inner = getattr(feature, "feature", None)
    if inner is None or (kept := _encoded(inner, image)) == inner:
        return feature
    length = getattr(feature, "length", -1)
    return type(feature)(kept, length=length)


def column_row(row: Row, *, image_root: str = "", columns: Any = None) -> Record:
    """Make a record of a table's row: `columns` maps instruction, input, output, system, image, id to columns.

    It is a mapping, or text such as "instruction=question,output=answer"; a role that it does not name is taken from
    the column of that name, if there is one. Every other column stays in the meta. One picture or several stand where
    "<image>" is in the text, else they open the user's turn.

    Raises:
        ConfigError: a named column is missing. RecordError: a cell is not of its kind.
    """
    names = _columns(columns, row)
    cells = {role: row[name] for role, name in names.items() if not _missing(row[name])}
    text = {role: _text(cells[role], names[role]) for role in cells if role not in ("image", "image_base64")}
    dialogue: Dialogue = [said("system", text["system"])] if "system" in text else []
    dialogue.append(said("user", with_input(text.get("instruction", ""), text.get("input", ""))))
    if "output" in names:
        dialogue.append(said("assistant", text.get("output", "")))
    images = _images(cells.get("image"), image_root)
    if "image_base64" in cells:
        images.append(base64_image(cells["image_base64"], f"column {names['image_base64']}"))
    meta = {key: value for key, value in row.items() if key not in names.values()}
    # Pictures that the text gives a place stand there; as letters beside them its markers would say it twice.
    marked = any(MARKER in turn.text for turn in dialogue)
    turns = place_images(dialogue, images) if marked else images_first(dialogue, images)
    return Record(turns, id=text.get("id", ""), meta=_plain(meta))


def _columns(columns: Any, row: Row) -> dict[str, str]:
    """Return {role: column}, the named ones first, then those that are called like a role."""
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
        columns = {role.strip(): name.strip() for role, _, name in pairs}
    named = dict(columns) if isinstance(columns, Mapping) else {}
    if columns is not None and not isinstance(columns, Mapping):
        problem = f"option columns is '{short(columns)}'"
        raise ConfigError(problem, remedy='Write "instruction=question,output=answer", or a mapping.')
    for role, name in named.items():
        if role not in ROLES:
            raise ConfigError(f"option columns has the role '{short(role)}'", remedy=nearest(str(role), ROLES))
        if not isinstance(name, str):
            raise ConfigError(f"columns.{role} is '{short(name)}'", remedy="Give the name of one column.")
        if name not in row:
            remedy = nearest(str(name), [str(key) for key in row])
            raise ConfigError(f"the table has no column '{short(name)}' (columns.{role})", remedy=remedy)
    taken = set(named.values())
    found = named | {role: role for role in ROLES if role in row and role not in named and role not in taken}
    for name in row:
        # A column that is a role but for its case would be kept in the meta, and a record learned without it.
        role = str(name).strip().lower()
        if role in ROLES and name != role and name not in taken and role not in found:
            remedy = f"Rename it to '{role}' in the header, or map it by the option columns."
            raise ConfigError(f"the column '{name}' is the role {role} but for case or white space", remedy=remedy)
    if not {"instruction", "input", "image", "image_base64"} & found.keys():
        problem = f"cannot tell what is asked: the columns are {', '.join(map(str, row))}"
        remedy = 'Say which column is what: columns="instruction=COLUMN,output=COLUMN,image=COLUMN".'
        name = str(next(iter(row), ""))
        if len(row) == 1 and (sign := next((sign for sign in ";\t|," if sign in name), "")):
            remedy = f"If the cells are separated by '{sign}', give the option delimiter='{sign}'."
        raise ConfigError(problem, remedy=remedy)
    return found


def _missing(value: Any) -> bool:
    """Say whether a cell is empty; a number that is not one stands for a missing value in parquet files."""
    return value is None or value == "" or (isinstance(value, float) and value != value)


def _text(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise RecordError(f"column {name} is '{short(value)}', not text", remedy="Choose another column.")
    return str(value)


def _images(value: Any, root: str) -> list[Image]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    return [image_part(item, root) for item in values]


def _plain(meta: Row) -> Row:
    """Write as text what JSON has no form for (dates, decimals); bytes are refused by name, missing values left out."""
    plain: Row = {}
    for key, value in meta.items():
        if isinstance(value, (bytes, bytearray)) or (isinstance(value, dict) and "bytes" in value):
            problem = f"column {key} holds bytes that no role uses"
            raise RecordError(problem, remedy=f"Give it the role image (columns image={key}), or drop the column.")
        if value is not None and value == value:
            known = isinstance(value, (str, int, float, bool, list, dict))
            plain[str(key)] = _nested(value) if known else str(value)
    return plain


def _nested(value: Any) -> Any:
    """As `_plain`, for what lies in lists and structs."""
    if isinstance(value, dict):
        return {str(key): _nested(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nested(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool, bytes)) else str(value)


def rows_as(formats: Mapping[str, Format]) -> Callable[..., Record]:
    """Return the row function of tables whose rows may be those of another format in `formats`."""

    def table_row(row: Row, *, image_root: str = "", columns: Any = None, as_format: str | None = None) -> Record:
        cells = _present(row)
        if as_format is None and columns is None:
            # A table has every column in every row, so empty cells must not count as keys.
            as_format = _layout(cells, formats)
            # Nor may one change what its row is: a row without its answer is a bad row of the layout of its neighbours.
            if as_format is None and not _MAPPED & cells.keys():
                as_format = _layout({name: cells.get(name, []) for name in row}, formats)
        if as_format is None:
            return column_row(row, image_root=image_root, columns=columns)
        if as_format not in formats:
            remedy = nearest(str(as_format), formats)
            raise ConfigError(f"option as_format is '{short(as_format)}'", remedy=remedy)
        needed = {name: row[name] for name in formats[as_format].detect if name in row}
        record = formats[as_format].row(needed | cells, image_root=image_root)
        return replace(record, meta=_plain(dict(record.meta)))

    return table_row


def _layout(row: Row, formats: Mapping[str, Format]) -> str | None:
    """Return the format of rows that hold turns, or a question and an answer under the names of another format."""
    if isinstance(row.get("conversations"), list):
        return conversation_format([row])[0]
    if is_guanaco(row):
        return "guanaco"
    mapped = any(isinstance(row.get(name), str) for name in _MAPPED) and not {"response", "completion"} & row.keys()
    # Pairs before messages: UltraFeedback's tables hold the chosen conversation under messages as well.
    fits = [] if mapped else [name for name in _COMPARED if row.keys() >= set(formats[name].detect)]
    if fits:
        return fits[0]
    for key, name in (("messages", "messages"), ("conversation", "conversation"), ("texts", "cauldron")):
        if isinstance(row.get(key), list):
            return name
    if mapped:
        return None
    # The format that names most of the columns fits best: dolly's three before instruction and response.
    fits = [name for name in _PAIRS if row.keys() >= set(formats[name].detect)]
    return max(fits, key=lambda name: len(formats[name].detect), default=None)


def _present(row: Row) -> Row:
    """Leave out columns without a value, which a table needs where JSON would have no key."""
    return {key: value for key, value in row.items() if not (value is None or value != value)}


# Columns that a mapping reads as what is asked.
_MAPPED = {"instruction", "input", "image_base64"}
# Formats of two answers to one question, and of a question and an answer, which tables may hold under these names.
_COMPARED = ("preference", "preference_openai")
_PAIRS = (
    "prompt_completion",
    "prompt_response",
    "query_response",
    "question_response",
    "question_answer",
    "instruction_response",
    "dolly",
    "inputs_targets",
    "xlam",
    "glaive",
)
_COLUMNS = f'which column is what, as "instruction=question,output=answer"; of {", ".join(ROLES)}'
_AS = "read the rows as those of another format (llava, messages, ...)"


def table_formats(formats: Mapping[str, Format]) -> dict[str, Format]:
    """Return the formats of tables, whose rows can be read as any of `formats`."""
    row = rows_as(formats)
    options = {"columns": _COLUMNS, "as_format": _AS}
    return {
        "json": Format(
            "JSON or JSONL of any flat objects, keys mapped by name",
            column_row,
            object_rows,
            options={"columns": _COLUMNS},
        ),
        "csv": Format(
            "a CSV or TSV table with a header, columns mapped by name",
            row,
            csv_rows,
            options=options,
            file_options={
                "delimiter": 'what separates cells, default "," (a tab for .tsv)',
                "encoding": "default utf-8-sig",
                "quoting": '"minimal" (default), or "none" where quotes are text',
            },
        ),
        "parquet": Format("a local parquet file", row, parquet_rows, options=options),
        "hf": Format(
            "a Hugging Face data set, by name",
            row,
            hf_rows,
            options=options,
            file_options={
                "split": "default train",
                "config": "name of the data set's configuration",
                "revision": "branch, tag or commit",
            },
        ),
    }


def table_header(path: str) -> list[str]:
    """Return the column names of a CSV, TSV or parquet file."""
    rows: Iterator[tuple[int, Any]] = parquet_rows(path) if is_parquet(path) else csv_rows(path)
    first = next((row for _, row in rows if isinstance(row, dict)), {})
    return [str(name) for name in first]


def is_table(path: str) -> bool:
    """Say whether the name is that of a CSV or TSV file."""
    return os.path.splitext(path)[1].lower() in (".csv", ".tsv", ".tab")


def is_parquet(path: str) -> bool:
    """Say whether the name is that of a parquet file."""
    return os.path.splitext(path)[1].lower() == ".parquet"
