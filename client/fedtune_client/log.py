"""What a client says: one JSON object per line in `client.log`, and short sentences on stderr."""

import json
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TextIO

from fedtune.errors import StorageError, problem


class Log:
    """Writes both; safe to call from any thread."""

    def __init__(self, folder: Path, client: str, human: TextIO | None = None) -> None:
        self._client, self._human = client, human or sys.stderr
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / "client.log").open("a", buffering=1)
        except OSError as error:
            raise StorageError(problem("client.folder", "a writable folder", f"{folder} ({error.strerror})")) from error

    def event(self, event: str, text: str = "", **fields: object) -> None:
        """Notes an event; `text`, when given, is what people read."""
        line = {"time": round(time.time(), 3), "client": self._client, "event": event, **fields}
        with self._lock:
            self._write(self._file, json.dumps(line | ({"text": text} if text else {})))
            if text:
                self._write(self._human, f"{self._client}: {text}")

    def crash(self, error: BaseException) -> None:
        """Notes an error that is a fault of the program, with its traceback in the file only."""
        trace = "".join(traceback.format_exception(error))
        self.event("crash", f"unexpected error: {error!r}. The traceback is in client.log", traceback=trace)

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()

    @staticmethod
    def _write(stream: TextIO, line: str) -> None:
        """Writes one line; a full disk or a closed terminal must not end training."""
        try:
            stream.write(line + "\n")
            stream.flush()
        except (OSError, ValueError):
            return
