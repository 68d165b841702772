"""Rows of the log as values, and the functions that read and write them. No SQL outside this file and `store`."""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, field

from fedtune.method import Member

Ledger = Mapping[tuple[int, str, str, str], int]
"""(round, client, direction, kind) -> bytes; direction is `up` (towards the coordinator) or `down`."""


@dataclass(frozen=True, slots=True)
class RoundRow:
    """A round as recorded; `phase` is `open` or `closed`."""

    round: int
    attempt: int
    phase: str
    target: int
    selected: tuple[str, ...]
    started: float


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One client's permission to fetch and submit in one round, and what it was admitted as."""

    round: int
    attempt: int
    task_id: str
    member: Member


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """An accepted update; `digest` names its blob."""

    round: int
    client: str
    digest: str
    weight: int
    nbytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A version of the state: its digest, and for each tensor the blob that holds it and the tensor's own digest."""

    version: int
    digest: str
    tensors: Mapping[str, tuple[str, str]]


def read_meta(db: sqlite3.Connection) -> dict[str, str]:
    """Returns all settings of the run."""
    return dict(db.execute("SELECT key, value FROM meta").fetchall())


def write_meta(values: Mapping[str, str]) -> Callable[[sqlite3.Connection], None]:
    """Sets values of the run."""

    def change(db: sqlite3.Connection) -> None:
        db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", list(values.items()))

    return change


def read_round(db: sqlite3.Connection) -> RoundRow | None:
    """Returns the latest round, or None before the first."""
    row = db.execute(
        "SELECT round, attempt, phase, target, selected, started FROM rounds ORDER BY round DESC LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    number, attempt, phase, target, selected, started = row
    return RoundRow(number, attempt, phase, target, tuple(json.loads(selected)), started)


def write_round(row: RoundRow, tasks: Iterable[TaskRow]) -> Callable[[sqlite3.Connection], None]:
    """Opens a round, or starts another attempt at it, together with its tasks."""

    def change(db: sqlite3.Connection) -> None:
        values = (row.round, row.attempt, row.phase, row.target, json.dumps(row.selected), row.started)
        db.execute("INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, NULL)", values)
        db.executemany(
            "INSERT OR REPLACE INTO tasks (round, client, attempt, task_id, rank, alpha, depth) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(t.round, t.member.id, t.attempt, t.task_id, *astuple(t.member)[1:]) for t in tasks],
        )

    return change


def read_tasks(round_number: int) -> Callable[[sqlite3.Connection], dict[str, TaskRow]]:
    """Returns the tasks of a round by client."""

    def change(db: sqlite3.Connection) -> dict[str, TaskRow]:
        rows = db.execute(
            "SELECT attempt, task_id, client, rank, alpha, depth FROM tasks WHERE round = ?", (round_number,)
        )
        return {client: TaskRow(round_number, n, task, Member(client, *rest)) for n, task, client, *rest in rows}

    return change


def keep_plan(client: str, asked: str, member: Member) -> Callable[[sqlite3.Connection], Member]:
    """Returns the plan that was made before for the same `asked`; if there is none, `member`, which is kept."""

    def change(db: sqlite3.Connection) -> Member:
        query = "SELECT rank, alpha, depth FROM plans WHERE client = ? AND asked = ?"
        row = db.execute(query, (client, asked)).fetchone()
        if row is not None:
            return Member(client, *row)
        db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?, ?, ?, ?)", (client, asked, *astuple(member)[1:]))
        return member

    return change


def read_updates(round_number: int) -> Callable[[sqlite3.Connection], dict[str, UpdateRow]]:
    """Returns the accepted updates of a round by client."""

    def change(db: sqlite3.Connection) -> dict[str, UpdateRow]:
        rows = db.execute(
            "SELECT round, client, digest, weight, nbytes, metrics FROM updates WHERE round = ?", (round_number,)
        )
        return {c: UpdateRow(r, c, digest, weight, size, json.loads(text)) for r, c, digest, weight, size, text in rows}

    return change


def find_update(client: str, task_id: str) -> Callable[[sqlite3.Connection], str | None]:
    """Returns the digest of the update that was accepted for a task, of any round, or None."""

    def change(db: sqlite3.Connection) -> str | None:
        row = db.execute(
            "SELECT u.digest FROM tasks t JOIN updates u USING (round, client) WHERE t.task_id = ? AND t.client = ?",
            (task_id, client),
        ).fetchone()
        return None if row is None else str(row[0])

    return change


def write_update(row: UpdateRow, ledger: Ledger) -> Callable[[sqlite3.Connection], None]:
    """Adds an accepted update; an integrity error when there is one of this round and client already."""

    def change(db: sqlite3.Connection) -> None:
        values = (row.round, row.client, row.digest, row.weight, row.nbytes, json.dumps(dict(row.metrics)))
        db.execute("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, 'accepted')", values)
        add_ledger(ledger)(db)

    return change


def read_version(db: sqlite3.Connection) -> VersionRow | None:
    """Returns the latest version of the state, or None in a new run."""
    row = db.execute("SELECT version, digest, tensors FROM versions ORDER BY version DESC LIMIT 1").fetchone()
    if row is None:
        return None
    return VersionRow(row[0], row[1], {name: (blob, leaf) for name, (blob, leaf) in json.loads(row[2]).items()})


def write_version(row: VersionRow) -> Callable[[sqlite3.Connection], None]:
    """Adds a version. Older ones keep their digest but not the list of their blobs."""

    def change(db: sqlite3.Connection) -> None:
        db.execute("UPDATE versions SET tensors = '{}' WHERE version < ?", (row.version,))
        db.execute("INSERT INTO versions VALUES (?, ?, ?)", (row.version, row.digest, json.dumps(dict(row.tensors))))

    return change


def close_round(row: VersionRow, ledger: Ledger, at: float) -> Callable[[sqlite3.Connection], None]:
    """Closes the round that made `row`: the new version, the round's end and its bytes, all or nothing."""

    def change(db: sqlite3.Connection) -> None:
        write_version(row)(db)
        db.execute("UPDATE rounds SET phase = 'closed', closed = ? WHERE round = ?", (at, row.version))
        db.execute("UPDATE updates SET status = 'folded' WHERE round = ?", (row.version,))
        add_ledger(ledger)(db)

    return change


def add_ledger(ledger: Ledger) -> Callable[[sqlite3.Connection], None]:
    """Adds bytes to the ledger."""

    def change(db: sqlite3.Connection) -> None:
        db.executemany(
            "INSERT INTO ledger VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (round, client, direction, kind) DO UPDATE SET bytes = bytes + excluded.bytes",
            [(*key, count) for key, count in ledger.items()],
        )

    return change


def read_ledger(db: sqlite3.Connection) -> list[tuple[int, str, str, str, int]]:
    """Returns every row of the ledger, sorted."""
    rows = db.execute("SELECT round, client, direction, kind, bytes FROM ledger ORDER BY 1, 2, 3, 4")
    return [(int(r), str(c), str(d), str(k), int(b)) for r, c, d, k, b in rows]
