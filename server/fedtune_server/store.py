"""The durable log of a run: one SQLite file, one writer thread, many changes a commit.

Callers hand over functions of a connection. The writer takes all that are waiting, runs them in one transaction,
each within a savepoint of its own, commits (synchronous=FULL: the disk has it), and only then answers. What was
answered survives kill -9 and power cuts; what was not may be asked again.
"""

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from fedtune.errors import StorageError, problem

T = TypeVar("T")
Change = Callable[[sqlite3.Connection], T]
_Item = tuple[Callable[[sqlite3.Connection], Any], "Future[Any]"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rounds (
    round INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, phase TEXT NOT NULL, target INTEGER NOT NULL,
    selected TEXT NOT NULL, started REAL NOT NULL, closed REAL);
CREATE TABLE IF NOT EXISTS tasks (
    round INTEGER, client TEXT, attempt INTEGER NOT NULL, task_id TEXT NOT NULL, rank INTEGER NOT NULL,
    alpha REAL NOT NULL, depth INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (round, client)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tasks_by_id ON tasks (task_id);
CREATE TABLE IF NOT EXISTS plans (
    client TEXT PRIMARY KEY, asked TEXT NOT NULL, rank INTEGER NOT NULL, alpha REAL NOT NULL, depth INTEGER NOT NULL
    ) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS updates (
    round INTEGER, client TEXT, digest TEXT NOT NULL, weight INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    metrics TEXT NOT NULL, status TEXT NOT NULL, PRIMARY KEY (round, client)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS versions (version INTEGER PRIMARY KEY, digest TEXT NOT NULL, tensors TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (
    round INTEGER, client TEXT, direction TEXT, kind TEXT, bytes INTEGER NOT NULL,
    PRIMARY KEY (round, client, direction, kind)) WITHOUT ROWID;
"""


class Store:
    """A SQLite file and the thread that owns it."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file; raises StorageError when that fails or the file is damaged."""
        self._path = path
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.executescript(SCHEMA)
            _upgrade(self._connection)
        except sqlite3.Error as error:
            raise self._error(error) from error
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def submit(self, change: Change[T]) -> "Future[T]":
        """Queues a change; the future is done when it is durable, and holds a StorageError when the disk refused."""
        future: Future[T] = Future()
        self._queue.put((change, future))
        return future

    def call(self, change: Change[T]) -> T:
        """Runs one change and waits for it; raises StorageError when the disk refuses."""
        return self.submit(change).result()

    async def commit(self, change: Change[T]) -> T:
        """Waits for a change on the event loop. A caller that is cancelled stops waiting; the change is made anyway.

        Raises:
            StorageError: the disk refused.
        """
        return await asyncio.shield(asyncio.wrap_future(self.submit(change)))

    def close(self) -> None:
        """Finishes what is queued and closes the file."""
        self._queue.put(None)
        self._thread.join()
        self._connection.close()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    last = True
                    break
                batch.append(item)
            self._commit([item for item in batch if item[1].set_running_or_notify_cancel()])
            if last:
                return

    def _commit(self, batch: list[_Item]) -> None:
        """One transaction for all; a change that raises is undone alone."""
        answers: list[tuple[Future[Any], Any, BaseException | None]] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            answers = [self._apply(change, future) for change, future in batch]
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._rollback()
            failure = self._error(error)
            answers = [(future, None, failure) for _, future in batch]
        for future, value, problem_met in answers:
            if problem_met is None:
                future.set_result(value)
            else:
                future.set_exception(problem_met)

    def _apply(self, change: Change[Any], future: "Future[Any]") -> tuple["Future[Any]", Any, BaseException | None]:
        self._connection.execute("SAVEPOINT change")
        try:
            value = change(self._connection)
        except sqlite3.OperationalError:
            raise  # the disk: the whole transaction is lost
        except Exception as error:
            self._connection.execute("ROLLBACK TO change")
            self._connection.execute("RELEASE change")
            return future, None, error
        self._connection.execute("RELEASE change")
        return future, value, None

    def _rollback(self) -> None:
        if self._connection.in_transaction:
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                return  # SQLite has rolled back by itself

    def _error(self, error: sqlite3.Error) -> StorageError:
        remedy = "Free some space and check that the folder can be written; what was acknowledged is safe"
        if any(word in str(error) for word in ("malformed", "not a database")):
            remedy = "The file was damaged; restore it from a backup, or start a new run folder"
        return StorageError(problem(str(self._path), "a database that takes writes", error, remedy))


def _upgrade(db: sqlite3.Connection) -> None:
    """Adds the columns that runs of earlier versions lack."""
    if "depth" not in {row[1] for row in db.execute("PRAGMA table_info(tasks)")}:
        db.execute("ALTER TABLE tasks ADD COLUMN depth INTEGER NOT NULL DEFAULT 0")
