"""What a round costs on a Flower deployment: Flower's own FedAvg, and fedtune inside Flower, with the same payload.

A SuperLink and its SuperNodes run on this machine, plain HTTP, state in memory (Flower's default). Nothing is trained:
every client gets the shared arrays, adds a constant of its own and sends them back.

    Flower                 FedAvg over one array, its best case; a new process for every message
    Flower, model          the same, and the client needs torch and a model, so every message loads both
    fedtune in Flower      `fedtune.flower`: FedAvg-LoRA over 124 arrays in one packet, a resident worker a SuperNode
    fedtune, model         the same, and the worker holds torch and the model

Everything runs in the environment of `--flower-python ENV/bin/python`, made with
`pip install "fedtune[client,flower]"`. Seconds are per round, means over the rounds after the first, of the quietest
pass. CPU is of all processes together. Memory is the peak sum of PSS over all processes.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import _flower
import _ours
from _measure import Measured, measure
from _processes import adopt_orphans
from _table import Row, options, report

from fedtune.config import load
from fedtune.flower.app import write_app
from fedtune.training.models import resolve_model

PEER, PEER_MODEL, OURS, OURS_MODEL = "Flower", "Flower, model", "fedtune in Flower", "fedtune, model"
CELLS = ((2, 1), (2, 20), (4, 1), (4, 20))
_HERE = Path(__file__).parent
_PEER_MODEL = """
import transformers
from fedtune.training.models import load_model
MODEL = load_model(__import__("pathlib").Path({model!r}), "float32", "cpu")
"""
_OPENING = '''"""Opens the worker; whatever is heavy is imported by the resident worker only."""


def open_worker(config, shared, index, on_step):
    from pathlib import Path

    from fedtune_app import no_worker

    worker = no_worker.open_worker(config, shared, index, on_step)
    if config.data.label:
        from fedtune.training.models import load_model

        worker.model = load_model(Path(config.data.label), "float32", "cpu")
    return worker
'''
_CLIENT = """from fedtune.flower.client import client_app
from fedtune_app.opening import open_worker

app = client_app(open_worker)
"""


def main() -> None:
    arguments = options(
        __doc__,
        flower_python={"type": Path, "help": "interpreter of an environment with flwr and fedtune", "required": True},
        passes={"type": int, "default": 1, "help": "how often everything is measured; the quietest pass counts"},
        cells={"default": "", "help": "only these, as CLIENTSxMEGABYTES, separated by commas"},
        rounds={"type": int, "default": 4, "help": "rounds of a run; the first is not counted"},
        model={"default": "tiny", "help": "the model that clients load"},
    )
    adopt_orphans()
    cells = [tuple(map(int, cell.split("x"))) for cell in arguments.cells.split(",")] if arguments.cells else CELLS
    cells = [(2, 1)] if arguments.quick else cells
    rounds = 3 if arguments.quick else arguments.rounds
    ways = _ways(arguments.flower_python, str(resolve_model(arguments.model)), rounds)
    if arguments.quick:
        ways = {name: ways[name] for name in (PEER, OURS)}
    best: dict[tuple[int, float, str], Measured] = {}
    for number in range(arguments.passes):
        for cell in cells:
            for name, way in ways.items():
                measured = way(*cell)
                what = f"pass {number + 1}: {cell[0]} x {cell[1]:g} MB, {name}, load {os.getloadavg()[0]:.1f}"
                sys.stderr.write(f"{what}: {measured}\n")
                known = best.get((*cell, name))
                best[(*cell, name)] = measured if known is None or measured.cpu_s < known.cpu_s else known
    report("A round on a Flower deployment, without training", [*_rows(best, cells)], arguments.json)


def _ways(python: Path, model: str, rounds: int) -> dict[str, Callable[[int, float], Measured]]:
    return {
        PEER: lambda n, mb: _peer(python, n, mb, rounds, ""),
        OURS: lambda n, mb: _inside(python, n, mb, rounds, ""),
        PEER_MODEL: lambda n, mb: _peer(python, n, mb, rounds, model),
        OURS_MODEL: lambda n, mb: _inside(python, n, mb, rounds, model),
    }


def _peer(python: Path, clients: int, megabytes: float, rounds: int, model: str) -> Measured:
    """Flower's FedAvg."""
    with _flower.home(python) as (place, environment):
        if model:
            client = place / "app" / "roundtrip" / "client.py"
            client.write_text(_PEER_MODEL.format(model=model) + client.read_text())
        _deploy(place, environment, clients)
        command = ["flwr", "run", "app", "here", "--stream"]
        return _flower._run(place, environment, command, clients, megabytes, rounds)


def _inside(python: Path, clients: int, megabytes: float, rounds: int, model: str) -> Measured:
    """fedtune in Flower."""
    with _flower.home(python) as (place, environment):
        toml = _ours.write_config(place, clients, megabytes, rounds, "fedavg-lora")
        write_app(place / "ours", load(toml))
        package = place / "ours" / "fedtune_app"
        (package / "no_worker.py").write_text((_HERE / "_clients.py").read_text())
        (package / "opening.py").write_text(_OPENING)
        (package / "client_app.py").write_text(_CLIENT)
        _deploy(place, environment, clients)
        settings = f'data.label="{model}"'
        command = ["flwr", "run", "ours", "here", "--stream", "--run-config", settings]
        log = place / "run" / "events.jsonl"
        return measure(
            lambda: _flower._start(command, place, environment, "run"),
            lambda: _ours._closed(log),
            rounds,
            lambda line: "worker" if "fedtune.flower.resident" in line else _flower._role(line),
            place,
        )


def _deploy(place: Path, environment: dict[str, str], clients: int) -> None:
    """Starts a SuperLink and the SuperNodes."""
    port = _flower.start_superlink(place, environment)
    for index in range(clients):
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
        node += ["--port", str(_flower._free_port()), "--node-config", f"partition-id={index} num-partitions={clients}"]
        _flower._start(node, place, environment, f"supernode-{index}")
    link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (place / "config.toml").write_text(link)


def _rows(best: dict[tuple[int, float, str], Measured], cells: list[tuple[int, float]]) -> Iterator[Row]:
    for cell in cells:
        work = f"{cell[0]} x {cell[1]:g} MB"
        for ours, peer in ((OURS, PEER), (OURS_MODEL, PEER_MODEL), (OURS_MODEL, OURS)):
            mine, other = best.get((*cell, ours)), best.get((*cell, peer))
            if mine and other:
                for what, unit, get in _FIGURES:
                    yield Row(f"{work}: {what}", get(mine), unit, get(other), note=f"{ours} | {peer}")


_FIGURES: tuple[tuple[str, str, Callable[[Measured], float]], ...] = (
    ("wall", "s/round", lambda m: m.wall_s),
    ("CPU", "s/round", lambda m: m.cpu_s),
    ("memory, all processes", "MB", lambda m: m.total_mb),
    ("memory, server app", "MB", lambda m: m.roles.get("server app", 0.0)),
    ("command to end of round 1", "s", lambda m: m.first_s),
)


if __name__ == "__main__":
    main()
