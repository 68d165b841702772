"""`fedtune init`: a commented configuration to start from."""

import csv
import json
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.console import out
from fedtune.errors import ConfigError, problem

_BY_HAND = "Write the file with `fedtune init`, then set data.name and data.text (or prompt and response) by hand"


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("config.toml"),
    demo: Annotated[bool, typer.Option("--demo", help="The built-in model and data; this is the default.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Your own JSONL, CSV or Parquet file; its columns are looked up.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a commented configuration with every key and its default.

    Examples:

    * `fedtune init`
    * `fedtune init my.toml --data notes.jsonl`
    """
    from fedtune.config.template import demo as demo_values
    from fedtune.config.template import own_data, template

    if demo and data:
        raise ConfigError("--demo and --data: expected one of the two, got both")
    if path.exists() and not force:
        raise ConfigError(
            problem(str(path), "a file that is not there yet", "one that is", "Add --force to replace it")
        )
    values = own_data(data, guess_columns(data)) if data else demo_values()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template(values, str(path)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(problem(str(path), "a file that can be written", error.strerror)) from error
    out.print(
        f"Wrote {path}. Next: [bold]fedtune doctor {path}[/], then [bold]fedtune simulate {path}[/]", soft_wrap=True
    )


def guess_columns(file: Path, remedy: str = _BY_HAND) -> dict[str, str]:
    """Says which columns of `file` hold what, from their names: keys of `[data]` such as `{"text": "body"}`.

    Args:
        file: its suffix is one of `READERS`.
        remedy: what to do when names do not tell.

    Raises:
        ConfigError: the file cannot be read, or its columns have names that say nothing.
    """
    names = _columns(file)
    for key in ("messages", "text"):
        if key in names:
            return {key: key}
    for prompt, response in _PAIRS:
        if prompt in names and response in names:
            return {"prompt": prompt, "response": response}
    if len(names) == 1:
        return {"text": names[0]}
    want = "a column named messages or text, or a pair such as prompt and response"
    raise ConfigError(problem(f"columns of {file}", want, ", ".join(names), remedy))


_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)


def _columns(file: Path) -> list[str]:
    try:
        return READERS[file.suffix.lower()](file)
    except KeyError as error:
        raise ConfigError(problem(str(file), "a .jsonl, .csv or .parquet file", file.suffix or "no suffix")) from error
    except ImportError as error:
        remedy = "pip install pyarrow, or write the rows as JSONL or CSV"
        raise ConfigError(problem(str(file), "pyarrow to read it", "not installed", remedy)) from error
    except (OSError, ValueError, StopIteration, csv.Error) as error:
        raise ConfigError(problem(str(file), "a file with at least one row", error)) from error


def _jsonl(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig") as stream:
        row = json.loads(next(line for line in stream if line.strip()))
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__} where an object should be")
    return list(row)


def _csv(file: Path) -> list[str]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        return next(csv.reader(stream))


def _parquet(file: Path) -> list[str]:
    from pyarrow import parquet

    return list(parquet.read_schema(file).names)


READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}
