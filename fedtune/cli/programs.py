"""The programs of a simulation as subprocesses, each with its log in the run folder.

COORDINATOR  python -m fedtune_server CONFIG       coordinator.log
HOST         python -m fedtune_client.host CONFIG  clients.log
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.cli.complaints import errors

_PATIENCE_S = 10.0


@dataclass
class Program:
    """One program of the run; `code` is None while it runs, negative when a signal ended it.

    Attributes:
        begin: where the lines of its last start begin in its log, in bytes.
    """

    name: str
    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    begin: int = 0

    def start(self) -> None:
        """Starts the program, or starts it again. It does not see Ctrl-C, and ends when this process is gone."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        leash = [sys.executable, "-m", "fedtune.cli.leash", sys.executable, "-m"]
        with self.log.open("ab") as log:
            self.begin = log.tell()
            self.process = subprocess.Popen(
                [*leash, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """Exit code."""
        return self.process.poll() if self.process else None

    @property
    def crashed(self) -> bool:
        """Whether it ended in a way that starting it again may mend: by a signal, or by an error nobody foresaw."""
        return self.code is not None and (self.code < 0 or self.code == 1 or self.code > 128)

    def stop(self) -> None:
        """Asks the program to leave, waits, and makes it leave."""
        if self.process is None or self.code is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait(self, seconds: float) -> int | None:
        """Waits for the end for at most so long; returns the exit code, or None."""
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.code

    def last_words(self) -> str:
        """Returns what the program complained of since its start: its errors, else the last line of its log."""
        try:
            data = self.log.read_bytes()[self.begin :]
        except OSError:
            return "no log"
        lines = data.decode(errors="replace").strip().splitlines()
        if named := errors(lines):
            return "\n".join(named)
        return _message(lines[-1]) if lines else "an empty log"


def coordinator(config: Path, folder: Path, sets: list[str]) -> Program:
    """Prepares the coordinator of a simulation."""
    return Program("coordinator", ["fedtune_server", str(config), *_flags(sets)], folder / "coordinator.log")


def host(config: Path, folder: Path, sets: list[str]) -> Program:
    """Prepares the clients of a simulation."""
    return Program("clients", ["fedtune_client.host", str(config), *_flags(sets)], folder / "clients.log")


def _flags(sets: list[str]) -> list[str]:
    return [part for change in sets for part in ("--set", change)]


def _message(line: str) -> str:
    """Takes the reason out of a JSON log line."""
    try:
        event: dict[str, Any] = json.loads(line)
        return str(event.get("reason") or event.get("message") or line)
    except (ValueError, AttributeError):
        return line
