"""The resident worker: one process per SuperNode and run, `python -m fedtune.flower.resident SOCKET PID`.

Flower starts a new process for every message. This one stays: it holds the model, answers one request after another,
and ends when it is told to, when nobody asked for anything for a while, or when the process PID (the SuperNode's) is
gone. It reads only from its own user: the socket lies in a folder of mode 0700.
"""

import contextlib
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fedtune.config import Config, Shared
from fedtune.errors import FedtuneError, problem
from fedtune.flower.plugin import Plugin
from fedtune.flower.settings import read_identity
from fedtune.flower.station import OpenWorker, Station
from fedtune.flower.visit import BYE, read, send
from fedtune.worker import OnStep, Worker

LOOK_S = 0.5
"""Seconds between looks at whether the worker is still wanted."""


class Resident:
    """Serves one socket until nobody needs it."""

    def __init__(self, path: Path, owner: int) -> None:
        self._path, self._owner, self._born = path, owner, _born(owner)
        self._station: Station | None = None
        self._connection: socket.socket | None = None
        self._idle_s = 900.0

    def serve(self) -> None:
        """Answers requests; returns when the worker is not wanted any more. What it died of stays in its log."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(self._path))
            mine = self._path.stat().st_ino
            listener.listen(8)
            listener.settimeout(LOOK_S)
            try:
                self._loop(listener)
            finally:
                with contextlib.suppress(OSError):
                    if self._path.stat().st_ino == mine:  # not that of a successor
                        self._path.unlink()
        with contextlib.suppress(OSError):
            self._path.with_suffix(".log").unlink()

    def _loop(self, listener: socket.socket) -> None:
        busy = time.monotonic()
        while time.monotonic() - busy < self._idle_s and _born(self._owner) == self._born:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            with connection:
                connection.setblocking(True)
                self._connection = connection
                go_on = self._answer(connection)
            self._connection = None
            if not go_on:
                return
            self._prepare()
            busy = time.monotonic()

    def _answer(self, connection: socket.socket) -> bool:
        """Answers one request; returns False when it was the last."""
        go_on = True
        try:
            connection.sendall(b"\1")
            header, parts = read(connection)
            go_on = header["stype"] != BYE
            if go_on:
                self._work(connection, header, parts)
            else:
                send(connection, {"stype": BYE})
        except (OSError, EOFError, _HungUpError) as error:  # the answer is lost; who asks again gets the same bytes
            sys.stderr.write(f"who asked has hung up: {error!r}\n")
        return go_on

    def _work(self, connection: socket.socket, header: dict[str, Any], parts: list[bytes]) -> None:
        """Has the station answer; whatever the model or the user's own code raises goes to who asked."""
        try:
            station = self._open(header)
            body, station.kept = parts
            stype, answer = station.answer(header["stype"], header["turn"], body)
        except _HungUpError:
            raise
        except Exception as error:
            traceback.print_exc()
            send(connection, {"error": f"{type(error).__name__}: {error}"})
        else:
            send(connection, {"stype": stype}, answer, station.kept)

    def _open(self, header: dict[str, Any]) -> Station:
        if self._station is None:
            self._idle_s = Plugin.read(header["run_config"]).idle_s
            identity = read_identity(header["run_config"], header["node_config"])
            self._station = Station(identity, find_opener(header["opener"]), resident=True, on_step=self._on_step)
        return self._station

    def _prepare(self) -> None:
        """Loads the model while the coordinator waits for the others; a failure is met again by the task."""
        try:
            if self._station:
                self._station.prepare()
        except Exception:
            traceback.print_exc()

    def _on_step(self, step: int, steps: int, loss: float) -> None:
        """Ends training when who asked has hung up, as Flower does with a ClientApp that it has given up."""
        if self._connection:
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            if poll.poll(0):
                raise _HungUpError


class _HungUpError(Exception):
    """Who asked for the work does not want it any more."""


def find_opener(place: list[str] | None) -> OpenWorker:
    """Finds the function that opens model and data: fedtune's own, or the one at `[folder, module, name]`."""
    if place is None:
        return _open_torch
    folder, module, name = place
    if folder not in sys.path:
        sys.path.insert(0, folder)
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise FedtuneError(problem("open_worker", f"a function {name} in {module}", found))
    opener: OpenWorker = found
    return opener


def _open_torch(config: Config, shared: Shared, index: int | None, on_step: OnStep | None) -> Worker:
    """Opens the torch worker; torch is imported only now."""
    from fedtune.training.worker import TorchWorker

    return TorchWorker.open(config, shared, index, on_step)


def _born(pid: int) -> str:
    """Tells a process from a later one of the same number; empty when there is none, or it ended and is a zombie."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        if not stat.exists():
            return "alive"
        state, *others = stat.read_text().rpartition(")")[2].split()
        return "" if state == "Z" else others[18]
    except (OSError, IndexError):
        return ""


def main() -> None:
    """Runs the worker."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    Resident(Path(sys.argv[1]), int(sys.argv[2])).serve()


if __name__ == "__main__":
    main()
