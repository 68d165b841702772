"""`events.jsonl`: one JSON object a line, read as it grows; a last line that is half written is left for later."""

import json
from pathlib import Path
from typing import Any, TypeAlias

Event: TypeAlias = dict[str, Any]


class Tail:
    """Reads what was added to a file of lines since the last look."""

    def __init__(self, path: Path, from_end: bool = False) -> None:
        """Starts at the beginning of `path`, or at its end; the file need not exist yet."""
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> list[Event]:
        """Returns the new events; lines that are not JSON objects are passed over."""
        return [event for line in self.lines() if (event := _parse(line))]

    def lines(self) -> list[bytes]:
        """Returns the new lines; one that is half written is left for later."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


def read_events(path: Path) -> list[Event]:
    """Returns all events of a file; an empty list when there is none."""
    return Tail(path).read()


def _parse(line: bytes) -> Event | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None
