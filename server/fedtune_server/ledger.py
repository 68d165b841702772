"""Every byte, by round, client, direction and kind.

Counted are the bytes of serialized messages and of payload frames; what HTTP/2 and TLS add around them is not. Payload
of accepted updates is recorded in the same transaction as the update; the rest is added to the log as rounds close.
"""

import csv
import io
import threading
from collections import Counter
from pathlib import Path

from fedtune_server.blobs import storage_error
from fedtune_server.records import Ledger

UP, DOWN = "up", "down"
CONTROL, PAYLOAD = "control", "payload"
Key = tuple[int, str, str, str]


class Book:
    """The ledger in memory: all that is recorded, and what still waits to be. Safe to use from any thread."""

    def __init__(self, rows: list[tuple[int, str, str, str, int]]) -> None:
        self._lock = threading.Lock()
        self._all: Counter[Key] = Counter({row[:4]: row[4] for row in rows})
        self._fresh: Counter[Key] = Counter()

    def count(self, round_number: int, client: str, direction: str, kind: str, nbytes: int) -> None:
        """Adds bytes that are recorded with the next `take`."""
        with self._lock:
            self._fresh[round_number, client, direction, kind] += nbytes
            self._all[round_number, client, direction, kind] += nbytes

    def recorded(self, ledger: Ledger) -> None:
        """Adds bytes that a transaction of their own has recorded already."""
        with self._lock:
            self._all.update(ledger)

    def take(self) -> Ledger:
        """Returns what waits to be recorded, and forgets that it waits."""
        with self._lock:
            fresh, self._fresh = self._fresh, Counter()
            return fresh

    def give_back(self, ledger: Ledger) -> None:
        """Takes back what could not be recorded."""
        with self._lock:
            self._fresh.update(ledger)

    def total(self, direction: str, round_number: int | None = None) -> int:
        """Sums one direction, of one round or of the run."""
        return sum(n for (r, _, d, _), n in self._rows() if d == direction and round_number in (None, r))

    def totals(self) -> dict[tuple[str, str], int]:
        """Sums by direction and kind."""
        sums: Counter[tuple[str, str]] = Counter()
        for (_, _, direction, kind), nbytes in self._rows():
            sums[direction, kind] += nbytes
        return dict(sums)

    def write_csv(self, path: Path) -> None:
        """Writes all rows, sorted, replacing the file at once; raises StorageError when the disk refuses."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["round", "client", "direction", "kind", "bytes"])
        writer.writerows([*key, nbytes] for key, nbytes in self._rows())
        write_atomically(path, text.getvalue())

    def _rows(self) -> list[tuple[Key, int]]:
        with self._lock:
            return sorted(self._all.items())


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small text file at once; raises StorageError when the disk refuses."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(text)
        draft.replace(path)
    except OSError as error:
        raise storage_error(path, error) from error
