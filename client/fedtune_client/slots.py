"""Training slots: of all the client processes on a machine only so many compute at the same moment."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_PAUSE_S = 0.05


class Slots:
    """`count` locked files in a folder, shared by processes; the kernel frees a slot when its holder dies.

    Waiters queue for a turnstile, so that only one process at a time looks for a free slot.
    """

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._turnstile = folder / "turnstile"
        self._files = [folder / str(number) for number in range(count)]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Holds a slot, waiting for one as long as it takes."""
        with self._turnstile.open("a") as turnstile:
            fcntl.flock(turnstile, fcntl.LOCK_EX)
            while (slot := self._free()) is None:
                time.sleep(_PAUSE_S)
        try:
            yield
        finally:
            slot.close()

    def _free(self) -> TextIO | None:
        for file in self._files:
            stream = file.open("a")
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                stream.close()
            else:
                return stream
        return None
