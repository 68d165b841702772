"""How soon the coordinator is ready, and what it holds while it waits; beside Flower's SuperLink.

Seconds from starting the process until it answers (its address is written; the SuperLink's `/health` is 200). Memory
is the resident set two seconds later. The limit is a Python process that only imports grpc.aio and numpy.
The aim is under one second and under 100 MB.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import _flower
import _ours
from _processes import adopt_orphans, descendants
from _table import Row, options, report

IDLE_S = 2.0
BARE = "import grpc.aio, numpy, time; print(flush=True); time.sleep(60)"
Figures = tuple[float, float]


def main() -> None:
    arguments = options(__doc__, flower_python={"type": Path, "help": "interpreter of an environment with flwr"})
    adopt_orphans()
    flower = arguments.flower_python if arguments.flower_python and _flower.version(arguments.flower_python) else None
    ways: dict[str, Callable[[], Figures]] = {"ours": ours, "limit": bare}
    if flower:
        ways["peer"] = lambda: superlink(flower)
    figures: dict[str, list[Figures]] = {name: [] for name in ways}
    for _ in range(2 if arguments.quick else 5):
        for name, way in ways.items():
            figures[name].append(way())
    best = {name: tuple(min(column) for column in zip(*seen, strict=True)) for name, seen in figures.items()}
    peer = best.get("peer", (None, None))
    note = "peer: Flower SuperLink" if flower else "no --flower-python with flwr in it"
    rows = [
        Row("start to ready", best["ours"][0], "s wall", peer[0], best["limit"][0], note),
        Row("resident memory, idle", best["ours"][1], "MB", peer[1], best["limit"][1], note),
    ]
    report("Starting a coordinator", rows, arguments.json)


def ours() -> Figures:
    with _ours.home() as folder:
        config = _ours.write_config(folder, 2, 1, 1, "flora")
        began = time.monotonic()
        _ours.start_server(config)
        return time.monotonic() - began, _idle()


def superlink(python: Path) -> Figures:
    with _flower.home(python) as (folder, environment):
        began = time.monotonic()
        _flower.start_superlink(folder, environment)
        return time.monotonic() - began, _idle()


def bare() -> Figures:
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        ready = time.monotonic() - began
        memory = _idle()
        process.kill()
    return ready, memory


def _idle() -> float:
    time.sleep(IDLE_S)
    return sum(_resident(pid) for pid in descendants())


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
