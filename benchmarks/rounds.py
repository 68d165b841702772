"""What a round costs besides training: fedtune's programs beside Flower's simulation and deployment.

Every client gets the shared arrays, adds a constant and sends them back; the coordinator averages. Nothing is trained.

    ours, programs     `python -m fedtune_server` and one real client process a client, gRPC on loopback, SQLite log,
                       every update on disk (fsync) at both ends before it counts, an adapter written every round
    ours, in memory    the same programs, their folders on a memory disk: nearer to what Flower keeps, which is nothing
    ours, one process  `fedtune.simulation.simulate`
    Flower simulation  Ray, FedAvg, one actor a core
    Flower deployment  SuperLink and one SuperNode a client, plain HTTP, FedAvg, state in memory (its default)

Ours moves 124 arrays of a LoRA adapter by FedAvg-LoRA, whose sums are exact; Flower one array of the same size, which
is its best case. Flower runs in an environment of its own: `--flower-python ENV/bin/python`, made with
`pip install "flwr[simulation]>=1.41,<1.43"`; without it those columns are left out.

Seconds are per round, means over the rounds after the first, of the quietest pass. CPU is of all processes together.
Memory is the peak sum of PSS over all processes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import _flower
import _ours
from _measure import Measured
from _processes import adopt_orphans
from _table import Row, options, report

Way = Callable[[int, float, int], Measured]
PROGRAMS, MEMORY, ONE = "ours, programs", "ours, in memory", "ours, one process"
SIMULATION, DEPLOYMENT = "Flower simulation", "Flower deployment"
CELLS = ((2, 1), (4, 1), (10, 1), (50, 1), (2, 20), (4, 20), (10, 20), (50, 20))
SIMULATED = ((10, 1), (50, 1), (10, 20), (50, 20))
DEPLOYED = ((2, 1), (4, 1), (10, 1), (2, 20), (4, 20), (10, 20))
QUICK = {(10, 1): (PROGRAMS, ONE, SIMULATION)}
SHM = Path("/dev/shm")
Results = dict[tuple[int, float], dict[str, Measured]]


def main() -> None:
    arguments = options(
        __doc__,
        flower_python={"type": Path, "help": "interpreter of an environment with flwr"},
        passes={"type": int, "default": 2, "help": "how often everything is measured; the quietest pass counts"},
        cells={"default": "", "help": "only these, as CLIENTSxMEGABYTES, separated by commas"},
    )
    adopt_orphans()
    ways = _ways(arguments.flower_python)
    plan = QUICK if arguments.quick else _plan(arguments.cells)
    results: Results = {cell: {} for cell in plan}
    for number in range(1 if arguments.quick else arguments.passes):
        for cell, names in plan.items():
            for name in (name for name in names if name in ways):
                label = f"pass {number + 1}: {cell[0]} x {cell[1]:g} MB, {name}"
                try:
                    measured = ways[name](*cell, 4 if arguments.quick or cell[1] > 1 else 6)
                except RuntimeError as error:
                    sys.stderr.write(f"{label}: no figure: {error}\n")
                    continue
                sys.stderr.write(f"{label}: {measured}\n")
                best = results[cell].get(name)
                results[cell][name] = measured if best is None or measured.wall_s < best.wall_s else best
    if DEPLOYMENT not in ways:
        sys.stderr.write("no --flower-python with flwr in it: Flower's columns are left out\n")
    report("Overhead of a round without training", [*_rows(results)], arguments.json)


def _ways(flower_python: Path | None) -> dict[str, Way]:
    ways: dict[str, Way] = {PROGRAMS: _ours.programs, ONE: _ours.in_process}
    if os.access(SHM, os.W_OK):
        ways[MEMORY] = lambda *cell: _ours.programs(*cell, folder=str(SHM))
    if flower_python and _flower.version(flower_python):
        ways[SIMULATION] = lambda *cell: _flower.simulation(flower_python, *cell)
        ways[DEPLOYMENT] = lambda *cell: _flower.deployment(flower_python, *cell)
    return ways


def _plan(only: str) -> dict[tuple[int, float], tuple[str, ...]]:
    cells = [tuple(map(int, cell.split("x"))) for cell in only.split(",")] if only else CELLS
    plan = {}
    for cell in cells:
        names = [PROGRAMS]
        names += [MEMORY, ONE, SIMULATION] if cell in SIMULATED else []
        names += [DEPLOYMENT] if cell in DEPLOYED else []
        plan[cell] = tuple(names)
    return plan


def _rows(results: Results) -> Iterator[Row]:
    """Sets each of our ways beside the way of Flower's that does the same job."""
    for (clients, megabytes), ways in results.items():
        work = f"{clients} x {megabytes:g} MB"
        for name, peer in ((PROGRAMS, DEPLOYMENT), (PROGRAMS, SIMULATION), (MEMORY, SIMULATION), (ONE, SIMULATION)):
            if name in ways and (peer in ways or (name, peer) in ((PROGRAMS, DEPLOYMENT), (ONE, SIMULATION))):
                yield from _compare(work, name, ways[name], peer, ways.get(peer))


def _compare(work: str, name: str, ours: Measured, peer: str, other: Measured | None) -> Iterator[Row]:
    note = f"{name} | {peer}" if other else name
    for what, unit, get in _FIGURES:
        yield Row(f"{work}: {what}", get(ours), unit, get(other) if other else None, note=note)


_FIGURES: tuple[tuple[str, str, Callable[[Measured], float]], ...] = (
    ("wall", "s/round", lambda m: m.wall_s),
    ("CPU", "s/round", lambda m: m.cpu_s),
    ("memory, all processes", "MB", lambda m: m.total_mb),
    ("memory, coordinator", "MB", lambda m: m.roles.get("coordinator", 0.0) + m.roles.get("server app", 0.0)),
    ("command to end of round 1", "s", lambda m: m.first_s),
)


if __name__ == "__main__":
    main()
