"""Many clients on one machine: torch is imported once, then one process is forked per client.

The children share the parent's pages until they write to them. The parent stays without threads and without gRPC,
which do not survive a fork; each child runs the ordinary client.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config import Config, load
from fedtune.config.members import member_config, member_ids
from fedtune.errors import FedtuneError

if TYPE_CHECKING:
    from fedtune_client.session import OpenWorker

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
_PATIENCE_S = 5.0
_PR_SET_PDEATHSIG = 1


def start(path: Path, overrides: tuple[str, ...], address: str) -> int:
    """Loads a configuration and hosts its clients with torch; returns the exit code."""
    try:
        config = load(path, overrides)
        return host(config, address or _address(config), preload())
    except FedtuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code


def host(config: Config, address: str, open_worker: "OpenWorker") -> int:
    """Forks one client per member of the simulation and waits for all of them.

    A client that dies is reported, on stderr and in `clients/ID/exit.json`, and not started again: the round goes on
    without it, as it would anywhere. SIGTERM and SIGINT end all clients. Call it in the main thread.

    Args:
        config: the whole configuration; `[client]` is replaced for each member.
        address: of the coordinator.
        open_worker: opens model and data in the child.

    Returns:
        The first exit code that is not 0, or 0; a client killed by signal n counts as 128 + n.
    """
    gc.collect()
    gc.freeze()  # the collector would write to every page, and so copy it
    _check_threads()
    family = _Family(config)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        for index, name in enumerate(member_ids(config)):
            family.add(name, _fork(config, index, address, open_worker))
        return family.wait()
    finally:
        family.end()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        gc.unfreeze()


@dataclass
class _Family:
    """The children and how they ended."""

    config: Config
    alive: dict[int, str] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)

    def add(self, name: str, pid: int) -> None:
        self.alive[pid] = name
        _say("client_started", client=name, pid=pid)

    def wait(self) -> int:
        """Waits until all have ended or a signal says to stop."""
        while self.alive:
            if signal.sigwait(_SIGNALS) != signal.SIGCHLD:
                self.end()
                return 0
            self._reap()
        return next((code for code in self.codes if code), 0)

    def end(self) -> None:
        """Asks all children to leave, and makes those leave that do not."""
        for number, patience_s in ((signal.SIGTERM, _PATIENCE_S), (signal.SIGKILL, _PATIENCE_S)):
            for pid in self.alive:
                os.kill(pid, number)
            until_s = time.monotonic() + patience_s
            while self.alive and time.monotonic() < until_s:
                self._reap()
                time.sleep(0.02)

    def _reap(self) -> None:
        for pid in list(self.alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                self._ended(self.alive.pop(pid), code if code >= 0 else 128 - code)

    def _ended(self, name: str, code: int) -> None:
        self.codes.append(code)
        _say("client_exited", client=name, code=code)
        if code:
            record = json.dumps({"client": name, "code": code, "time": round(time.time(), 3)})
            _write(self.config.run.folder / "clients" / name / "exit.json", record)


def preload() -> "OpenWorker":
    """Imports torch and what comes with it; returns the torch worker's `open`.

    Weights need no loading here: each child maps them from the file, so that all share one copy of its pages.
    """
    import peft  # noqa: F401  # imported for the children's sake
    import transformers  # noqa: F401  # likewise

    from fedtune.training.worker import TorchWorker

    return TorchWorker.open


def _fork(config: Config, index: int, address: str, open_worker: "OpenWorker") -> int:
    """Starts a child; returns its process id in the parent, and never in the child."""
    parent = os.getpid()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = FedtuneError.exit_code
    try:
        _settle(parent)
        code = _client(config, index, address, open_worker)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _settle(parent: int) -> None:
    """Gives a fresh child its own signals, and ties its life to its parent's."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(0)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def _client(config: Config, index: int, address: str, open_worker: "OpenWorker") -> int:
    # gRPC is imported here for the first time: its threads and file descriptors do not survive a fork.
    from fedtune_client.main import run
    from fedtune_client.slots import Slots

    own = member_config(config, index, address)
    (own.client.folder / "exit.json").unlink(missing_ok=True)
    gate = Slots(config.run.folder / "slots", config.simulation.concurrency or os.cpu_count() or 1)
    return run(own, index, open_worker, gate)


def _address(config: Config) -> str:
    """Reads where the coordinator listens: from its run folder, else from the configuration."""
    try:
        return (config.run.folder / "address").read_text().strip() or config.server.address
    except OSError:
        return config.server.address


def _check_threads() -> None:
    """Warns of threads beside a fork: a lock that one of them holds would stay locked in the child for ever."""
    names = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if names:
        _say("threads_before_fork", threads=names)
    if "grpc" in sys.modules:
        _say("grpc_before_fork")


def _say(event: str, **fields: object) -> None:
    """Writes one JSON line to stderr."""
    sys.stderr.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
    sys.stderr.flush()


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    except OSError as error:
        _say("not_written", path=str(path), reason=error.strerror)
