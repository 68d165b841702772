"""Runs fedtune's programs on this machine and measures them; and the same rounds in one process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from _measure import Measured, measure
from _processes import end_descendants

from fedtune.testing import toy_base

LAYERS, WIDTH = 31, 256
_BYTES_A_RANK = LAYERS * WIDTH * 14  # A and B of q_proj (w x w) and v_proj (w/2 x w), float32
_HERE = Path(__file__).parent
_ROLES = {"fedtune_server": "coordinator", "_clients.py": "client", "_inprocess.py": "coordinator"}


def rank_of(megabytes: float) -> int:
    """Rank whose update comes nearest to `megabytes` (within 0.01 % for 1 and 20)."""
    return round(megabytes * 1e6 / _BYTES_A_RANK)


def programs(clients: int, megabytes: float, rounds: int, method: str = "fedavg-lora", folder: str = "") -> Measured:
    """Runs `python -m fedtune_server` and one client process a client, over gRPC on loopback.

    All of them keep what they must not lose below `folder` (the temporary folder of the system when empty).
    """
    with home(folder) as place:
        address = start_server(write_config(place, clients, megabytes, rounds, method))
        command = [str(_HERE / "_clients.py"), "run.toml", address]
        log = place / "run" / "events.jsonl"
        return measure(lambda: _spawn(place, "clients", command), lambda: _closed(log), rounds, _role, place)


def in_process(clients: int, megabytes: float, rounds: int) -> Measured:
    """Runs the same rounds as one loop in one process, without sockets and without a log."""
    with home() as place:
        write_config(place, clients, megabytes, rounds, "fedavg-lora")
        command = [str(_HERE / "_inprocess.py"), "run.toml"]
        log = place / "rounds.jsonl"
        return measure(lambda: _spawn(place, "simulation", command), lambda: _closed(log), rounds, _role, place)


@contextmanager
def home(parent: str = "") -> Iterator[Path]:
    """Yields a temporary folder; every process started meanwhile is ended, and the folder removed."""
    with tempfile.TemporaryDirectory(prefix="fedtune-", dir=parent or None) as folder:
        try:
            yield Path(folder)
        finally:
            end_descendants()


def write_config(home: Path, clients: int, megabytes: float, rounds: int, method: str) -> Path:
    """Writes a base model and a configuration; returns the latter."""
    toy_base(home / "base", layers=LAYERS, width=WIDTH)
    text = f"""
[run]
folder = "{home}/run"
[model]
name = "{home}/base"
[method]
name = "{method}"
rank = {rank_of(megabytes)}
[rounds]
count = {rounds}
min_clients = {clients}
[server]
address = "127.0.0.1:0"
[simulation]
clients = {clients}
"""
    (home / "run.toml").write_text(text)
    return home / "run.toml"


def start_server(config: Path, patience_s: float = 30.0) -> str:
    """Starts a coordinator; returns its address once it is ready."""
    process = _spawn(config.parent, "server", ["-m", "fedtune_server", "run.toml"])
    until = time.monotonic() + patience_s
    while time.monotonic() < until and process.poll() is None:
        with suppress(FileNotFoundError):
            return (config.parent / "run" / "address").read_text().strip()
        time.sleep(0.002)
    raise RuntimeError(f"the coordinator did not start: {(config.parent / 'server.log').read_text()}")


def _spawn(home: Path, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (home / f"{name}.log").open("wb") as log:
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _closed(log: Path) -> list[float]:
    """Lists when each round closed."""
    with suppress(FileNotFoundError):
        events = map(json.loads, log.read_text().splitlines())
        return [float(event["time"]) for event in events if event["event"] == "round_closed"]
    return []


def _role(command: str) -> str:
    return next((role for word, role in _ROLES.items() if word in command), "")
