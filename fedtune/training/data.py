"""From `[data]` to rows: which are trained on, by whom, and which are held out.

    read -> check the columns -> draw max_rows -> set the held-out rows aside -> deal the rest out to clients

Everything follows from the configuration and the run's seed, so every process that reads it gets the same answer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedtune.config import Config
from fedtune.config.schema import DataConfig
from fedtune.errors import DataError, problem
from fedtune.training.builtin_data import BUILT_IN
from fedtune.training.partition import split
from fedtune.training.rows import Row, data_files, is_saved_dataset, read_dataset, read_file, read_saved

_ROLES = ("system", "user", "assistant", "tool")

R = TypeVar("R")


def client_rows(config: Config, index: int | None = None) -> list[Row]:
    """Returns the rows one client trains on.

    Args:
        config: `[data]`, `[simulation]` and the seed.
        index: which part of the simulation's partition; None means all rows, as for a client with data of its own.

    Raises:
        DataError: the data are missing or malformed, or cannot be dealt out so.
    """
    if index is None:
        return _parted(config)[0]
    parts = all_client_rows(config)
    if not 0 <= index < len(parts):
        raise DataError(problem("client index", f"0 to {len(parts) - 1}", index, "See simulation.clients"))
    return parts[index]


def own_split(rows: Sequence[R], config: Config) -> tuple[list[R], list[R]]:
    """Splits one client's rows into those it trains on and those it measures its own model on."""
    count = round(len(rows) * config.data.own_held_out)
    if config.data.own_held_out and not 0 < count < len(rows):
        want = f"enough to hold out {config.data.own_held_out:g} of them and train on others"
        raise DataError(problem("rows of this client", want, len(rows), "Change data.own_held_out"))
    held = set(_rng(config, "own held out").permutation(len(rows))[:count].tolist())
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def all_client_rows(config: Config) -> list[list[Row]]:
    """Returns what `client_rows` returns for each client of the simulation, reading the data once."""
    rows, _ = _parted(config)
    data = with_columns(config.data)
    column = {"label": data.label, "natural": data.client_key}.get(config.simulation.partition)
    keys = [row[column] for row in rows] if column else None
    parts = split(len(rows), config.simulation, _rng(config, "partition"), keys)
    return [[rows[i] for i in part] for part in parts]


def held_out_rows(config: Config) -> list[Row]:
    """Returns the rows nobody trains on, at most `held_out_rows` of them.

    Raises:
        DataError: the data are missing or malformed, or none are held out.
    """
    if config.data.held_out_name:
        rows = read(replace(config.data, name=config.data.held_out_name))
    else:
        _, rows = _parted(config)
    if not rows:
        remedy = "Set data.held_out to a fraction above 0, or data.held_out_name to a file"
        raise DataError(problem("held-out rows", "at least one", "none", remedy))
    return _drawn(rows, config.data.held_out_rows, _rng(config, "evaluate"))


def check_files(data: DataConfig) -> None:
    """Raises DataError when `name` or `held_out_name` names a file or folder that is not there; reads nothing."""
    for name in filter(None, (data.name, data.held_out_name)):
        if name not in BUILT_IN and _is_local(name) and not is_saved_dataset(Path(name).expanduser()):
            data_files(Path(name).expanduser())


def with_columns(data: DataConfig) -> DataConfig:
    """Fills in the columns of a built-in data set, where the configuration names none."""
    if data.name not in BUILT_IN:
        return data
    columns = BUILT_IN[data.name].columns
    data = replace(
        data,
        label=data.label or columns.get("label", ""),
        client_key=data.client_key or columns.get("client_key", ""),
    )
    if data.text or data.prompt or data.messages:
        return data
    return replace(
        data,
        text=columns.get("text", ""),
        prompt=columns.get("prompt", ""),
        response=columns.get("response", ""),
    )


def read(data: DataConfig) -> list[Row]:
    """Reads and checks all rows of `data.name`.

    Raises:
        DataError: see `client_rows`; the message names the file, the row and the columns there are.
    """
    if not data.name:
        remedy = f"Name a file, a hub data set, or a built-in one ({', '.join(BUILT_IN)})"
        raise DataError(problem("data.name", "what to train on", "nothing", remedy))
    data = with_columns(data)
    placed = _read(data)
    if not placed:
        raise DataError(problem(f"data.name {data.name!r}", "at least one row", "none"))
    wanted = _columns(data, placed[0][1])
    return [_checked(place, row, wanted, data.messages) for place, row in placed]


def _read(data: DataConfig) -> list[tuple[str, Row]]:
    path = Path(data.name).expanduser()
    if data.name in BUILT_IN and not path.exists():
        return _numbered(data.name, BUILT_IN[data.name].read())
    if path.is_dir() and is_saved_dataset(path):
        return _numbered(data.name, read_saved(path, data.split))
    if _is_local(data.name):
        return [item for file in data_files(path) for item in read_file(file)]
    return _numbered(data.name, read_dataset(data.name, data.split))


def _is_local(name: str) -> bool:
    path = Path(name).expanduser()
    return path.exists() or bool(path.suffix) or name.startswith((".", "/", "~"))


def _numbered(name: str, rows: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(f"{name}, row {number}", row) for number, row in enumerate(rows, 1)]


def _columns(data: DataConfig, first: Row) -> list[str]:
    """Lists the columns every row must have; raises DataError when the configuration does not say what to learn."""
    kinds = [kind for kind in ("text", "prompt", "messages") if getattr(data, kind)]
    if len(kinds) != 1 or bool(data.prompt) != bool(data.response):
        got = ", ".join(f"{k} = {getattr(data, k)!r}" for k in ("text", "prompt", "response", "messages"))
        want = "one of text, prompt with response, or messages to name a column"
        raise DataError(problem("data", want, got, f"{data.name} has the columns {', '.join(map(str, first))}"))
    learned = [data.text, data.prompt, data.response, data.messages]
    return [column for column in (*learned, data.label, data.client_key) if column]


def _checked(place: str, row: Row, wanted: Sequence[str], messages: str) -> Row:
    for column in wanted:
        if row.get(column) is None:
            got = ", ".join(str(name) for name in row)
            raise DataError(problem(place, f"a value in column {column!r}", f"columns {got}" if got else "no columns"))
        if column != messages and not str(row[column]).strip():
            raise DataError(problem(f"{place}, column {column!r}", "some text", "none"))
    return {**row, messages: _messages(place, row[messages])} if messages else row


def _messages(place: str, value: Any) -> list[dict[str, str]]:
    """Reads chat messages, as a list or as the JSON of one; the assistant must say something."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        messages = [{"role": m["role"], "content": m["content"]} for m in found]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(problem(f"{place}, messages", "a list of role and content", repr(value)[:80])) from error
    for message in messages:
        if message["role"] not in _ROLES or not isinstance(message["content"], str):
            raise DataError(problem(f"{place}, messages", f"text by one of {', '.join(_ROLES)}", message))
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise DataError(problem(f"{place}, messages", "a turn of the assistant", "none"))
    return messages


def _parted(config: Config) -> tuple[list[Row], list[Row]]:
    """Splits the rows into those to train on and those held out."""
    data = with_columns(config.data)
    rows = _drawn(read(data), data.max_rows or None, _rng(config, "draw"))
    if data.held_out_name or not data.held_out:
        return rows, []
    rng = _rng(config, "held out")
    groups = BUILT_IN[data.name].groups if data.name in BUILT_IN else ()
    held = _held_groups(rows, data.held_out, groups, rng) if groups else _held_rows(rows, data, rng)
    seen = [{str(rows[i][column]) for i in held} for column in groups]
    kept = [
        row
        for i, row in enumerate(rows)
        if i not in held and not any(str(row[c]) in values for c, values in zip(groups, seen, strict=True))
    ]
    if not kept:
        raise DataError(problem("rows to train on", "at least one", "none", "Lower data.held_out"))
    return kept, [rows[i] for i in sorted(held)]


def _held_rows(rows: list[Row], data: DataConfig, rng: np.random.Generator) -> set[int]:
    """Draws the same fraction of every label."""
    strata: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        strata.setdefault(str(row[data.label]) if data.label else "", []).append(i)
    # Shares are rounded on their running sum, so that many small strata still add up to the fraction asked for.
    held: set[int] = set()
    total = 0
    for name in sorted(strata):
        total += len(strata[name])
        count = max(0, round(total * data.held_out) - len(held))
        held.update(rng.permutation(strata[name])[:count].tolist())
    return held


def _held_groups(rows: list[Row], fraction: float, groups: Sequence[str], rng: np.random.Generator) -> set[int]:
    """Draws whole values of the first of `groups` until they hold the fraction asked for."""
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault(str(row[groups[0]]), []).append(i)
    names = sorted(members)
    held: set[int] = set()
    for k in rng.permutation(len(names)).tolist():
        if len(held) >= fraction * len(rows):
            break
        if len(held) + len(members[names[k]]) <= 1.5 * fraction * len(rows) + 1:
            held.update(members[names[k]])
    return held


def _drawn(rows: list[Row], count: int | None, rng: np.random.Generator) -> list[Row]:
    """Draws `count` rows, in their old order; None and numbers beyond the end mean all."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in np.sort(rng.choice(len(rows), count, replace=False))]


def _rng(config: Config, purpose: str) -> np.random.Generator:
    key = hashlib.sha256(f"fedtune/data/v1 {config.run.seed} {purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
