"""Reading rows: JSONL, CSV and Parquet files, folders of them, data sets of the hub or on disk."""

import csv
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from fedtune.errors import DataError, problem
from fedtune.hub import hub_answers, no_connection, offline, unreachable

Row: TypeAlias = dict[str, Any]

_CSV_LIMIT = threading.Lock()
_MAX_FIELD = 2**31 - 1  # characters; what a C long holds everywhere
_FORMATS = "JSONL (.jsonl), CSV (.csv) or Parquet (.parquet)"


def data_files(path: Path) -> list[Path]:
    """Returns the file, or every data file of a folder in order of name.

    Raises:
        DataError: there is no such file or folder, or no data file in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(problem("data.name", "a file or a folder", f"{str(path)!r}, which does not exist"))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _READERS)
    if not files:
        raise DataError(problem(str(path), f"a folder with {_FORMATS} files", "none"))
    return files


def read_file(file: Path) -> list[tuple[str, Row]]:
    """Reads a file: each row with the place it stands at, for messages.

    Raises:
        DataError: the file is of another format, damaged or empty.
    """
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(problem(str(file), _FORMATS, file.suffix or "no ending"))
    rows = [(f"{file}, row {number}", row) for number, row in reader(file)]
    if not rows:
        raise DataError(problem(str(file), "at least one row", "none"))
    return rows


def read_dataset(name: str, split: str) -> list[Row]:
    """Reads a data set that the `datasets` library knows: of the hub, or saved on disk.

    Raises:
        DataError: the library is not installed, or there is no such data set or split.
        UnavailableError: the hub cannot be reached, and the data set was not fetched before.
    """
    try:
        import datasets.config
    except ImportError as error:
        remedy = "pip install 'fedtune[hub]', or name a file"
        raise DataError(problem(f"data.name {name!r}", "a file, or the datasets library", "neither", remedy)) from error
    answers = hub_answers()
    try:
        # Left to itself the library tries an unreachable hub for most of a minute before it looks on the disk.
        with nullcontext() if answers else offline(datasets.config):
            found = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises its own, its HTTP library's, pyarrow's and the system's errors
        if not answers or no_connection(error):
            raise unreachable(f"data.name {name!r}", "Name a file, a folder or a built-in data set") from error
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        want = "a file, a folder, a built-in data set or one of the hub"
        raise DataError(problem(f"data.name {name!r}", want, said)) from error
    return [dict(row) for row in found]


def is_saved_dataset(path: Path) -> bool:
    """Says whether a folder was written by `datasets`' save_to_disk."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved(path: Path, split: str) -> list[Row]:
    """Reads a folder written by `datasets`' save_to_disk; raises DataError when it cannot be read."""
    try:
        import datasets

        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            found = found[split]
    except (ImportError, OSError, KeyError, ValueError) as error:
        raise DataError(problem(str(path), f"a saved data set with split {split!r}", error)) from error
    return [dict(row) for row in found]


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(problem(f"{file}, row {number}", "a JSON object", error)) from error
        if not isinstance(row, dict):
            raise DataError(problem(f"{file}, row {number}", "a JSON object", type(row).__name__))
        yield number, row


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    """Reads fields of any length; the module's limit is the process's, so one file is read at a time."""
    with _CSV_LIMIT:
        before = csv.field_size_limit(_MAX_FIELD)
        try:
            yield from list(_csv_rows(file))
        finally:
            csv.field_size_limit(before)


def _csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), "")):
            remedy = "Save it with commas, or as JSONL"
            raise DataError(
                problem(f"{file}, line 1", "commas between columns", f"{names[0]!r}, with {other!r}", remedy)
            )
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                got = "more fields" if None in row else "fewer fields"
                raise DataError(problem(f"{file}, row {number}", f"{len(reader.fieldnames or [])} fields", got))
            yield number, dict(row)
    except csv.Error as error:
        raise DataError(problem(f"{file}, line {reader.line_num}", "CSV", error)) from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(problem(str(file), "pyarrow to read it", "not installed", "pip install pyarrow")) from error
    try:
        yield from enumerate(parquet.read_table(file).to_pylist(), 1)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(problem(str(file), "a Parquet file", error)) from error


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(problem(str(file), "a UTF-8 text file", error)) from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
