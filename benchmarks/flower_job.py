"""The same job by `fedtune simulate` and by Flower: equal adapters, and what each takes.

    fedtune simulate     one coordinator, clients forked from one process that holds model and data
    Flower, Ray          `fedtune flower run APP local`: nodes inside Ray's actors
    Flower, deployment   a SuperLink and one SuperNode a client, on this machine, each with its resident worker

Everything runs in the environment of `--flower-python ENV/bin/python` (`pip install "fedtune[client,flower]"`). Seconds
are of the whole command, start to end; CPU and memory (peak sum of PSS) are of all processes together, a deployment's
standing programs included. The adapters must be equal byte for byte.
"""

import filecmp
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import _flower
from _processes import adopt_orphans, cpu_seconds, end_descendants, memory
from _table import Row, options, report

from fedtune.config import Config, load

_ROOT = Path(__file__).parents[1]


def main() -> None:
    arguments = options(
        __doc__,
        flower_python={"type": Path, "help": "interpreter of an environment with flwr and fedtune", "required": True},
        config={"type": Path, "default": _ROOT / "simulations" / "flower" / "config.toml", "help": "the job"},
        set={"action": "append", "default": [], "help": "section.key=value, as fedtune takes it"},
    )
    adopt_orphans()
    rows, adapters = [], []
    with _flower.home(arguments.flower_python) as (place, environment):
        environment |= {"OMP_NUM_THREADS": "1", "FEDTUNE_SOCKETS": str(place)}
        for name, command in _ways(place, environment, arguments).items():
            call = command()
            folder = place / f"run-{len(adapters)}"
            wall, cpu, peak = _measured([*call, *_folder(call, folder)], place, environment)
            adapters.append(folder / "final" / "adapter_model.safetensors")
            rounds = [json.loads(file.read_text())["seconds"] for file in sorted(folder.glob("rounds/*/round.json"))]
            sys.stderr.write(f"{name}: {wall:.1f} s, of it rounds {rounds}\n")
            note = f"{len(rounds)} rounds; load {Path('/proc/loadavg').read_text().split()[0]}"
            rows += [
                Row(f"{name}: whole command", wall, "s", note=note),
                Row(f"{name}: a round after the first", sum(rounds[1:]) / (len(rounds) - 1), "s"),
                Row(f"{name}: CPU", cpu, "s"),
                Row(f"{name}: memory, all processes", peak, "MB"),
            ]
        equal = all(filecmp.cmp(adapters[0], other, shallow=False) for other in adapters)
    report("The same job by fedtune simulate and inside Flower", rows, arguments.json)
    if not equal:
        sys.exit("the adapters differ")
    sys.stdout.write("adapters: equal bytes\n")


def _ways(place: Path, environment: dict[str, str], arguments: object) -> dict[str, Callable[[], list[str]]]:
    sets = [part for text in arguments.set for part in ("--set", text)]
    config = load(arguments.config, tuple(arguments.set))
    written = ["fedtune", "flower", "new", "job", "--config", str(arguments.config), *sets]
    subprocess.run(written, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
    nodes = f"num-supernodes={config.simulation.clients} client-resources-num-cpus=1"
    return {
        "fedtune simulate": lambda: ["fedtune", "simulate", str(arguments.config), *sets],
        "Flower, Ray": lambda: ["fedtune", "flower", "run", "job", "local", "--federation-config", nodes],
        "Flower, deployment": lambda: _deployed(place, environment, config),
    }


def _deployed(place: Path, environment: dict[str, str], config: Config) -> list[str]:
    port = _flower.start_superlink(place, environment)
    for index in range(config.simulation.clients):
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
        part = f"partition-id={index} num-partitions={config.simulation.clients}"
        node += ["--port", str(_flower._free_port()), "--node-config", part]
        _flower._start(node, place, environment, f"supernode-{index}")
    with (place / "config.toml").open("a") as stream:
        stream.write(f'\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    return ["fedtune", "flower", "run", "job", "here"]


def _folder(command: list[str], folder: Path) -> list[str]:
    """The run folder, in the command's own words."""
    return ["--run-config", f'run.folder="{folder}"'] if "flower" in command else ["--set", f"run.folder={folder}"]


def _measured(command: list[str], place: Path, environment: dict[str, str]) -> tuple[float, float, float]:
    """Returns wall seconds, CPU seconds of all processes, and the peak of their memory in MB."""
    began, cpu = time.time(), cpu_seconds()
    with memory(lambda _: "") as seen:
        process = _flower._start(command, place, environment, "command")
        while process.poll() is None:
            time.sleep(0.05)
        wall, spent = time.time() - began, cpu_seconds() - cpu
    end_descendants()
    if process.returncode:
        raise RuntimeError((place / "command.log").read_text()[-3000:])
    return wall, spent, seen.total


if __name__ == "__main__":
    main()
