"""What happened, one JSON object a line: in the run folder for tools, on stderr for people and log collectors."""

import json
import sys
import time
from pathlib import Path
from typing import TextIO

Value = object
_MAX_TEXT = 300


class Events:
    """Appends to `events.jsonl`. A disk that refuses costs the line, never the run."""

    def __init__(self, folder: Path, stream: TextIO | None = None) -> None:
        self._path = folder / "events.jsonl"
        self._stream = stream if stream is not None else sys.stderr

    def emit(self, event: str, **fields: Value) -> None:
        """Writes one line; texts that peers chose are cut and escaped."""
        values = {key: _plain(value) for key, value in fields.items()}
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n"
        try:
            with self._path.open("a") as file:
                file.write(line)
        except OSError as error:
            self._say(json.dumps({"event": "log_lost", "reason": str(error)}) + "\n")
        self._say(line)

    def _say(self, line: str) -> None:
        try:
            self._stream.write(line)
            self._stream.flush()
        except (OSError, ValueError):
            return  # nobody listens on stderr any more


def _plain(value: Value) -> Value:
    return value[:_MAX_TEXT] if isinstance(value, str) else value
