"""FLoRA beside FedAvg-LoRA, centralised training and training alone: one table, one plot, from one configuration.

    python simulations/flora/run.py [--out DIR] [--jobs N] [--set section.key=value ...]

Every arm is an ordinary `fedtune simulate` or `fedtune train` with a few keys changed. An arm that is done is not run
again, and one that was cut short goes on where it stopped: run the same command again.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedtune.config import Config, load

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Arm:
    """One row of the table: a command and the keys it changes."""

    name: str
    title: str
    command: tuple[str, ...]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What an arm gave: held-out figures of the base and at the end, loss by round, bytes of all rounds, seconds."""

    title: str
    base: dict[str, float]
    figures: dict[str, float]
    path: list[float]
    up: int
    down: int
    seconds: float


def arms(config: Config) -> list[Arm]:
    """All rows; what every client does locally is the same in each of them."""
    steps, clients = config.training.steps * config.rounds.count, config.simulation.clients
    equal = "simulation.ranks=[]"
    simulate = ("simulate",)
    ranks = ",".join(str(rank) for rank in config.simulation.ranks)
    each = f"all ranks {config.method.rank}"

    def training(name: str, title: str, count: int, *options: str) -> Arm:
        return Arm(name, title, ("train", *options), (f"training.steps={count}", "client.threads=1"))

    return [
        Arm("flora-mixed", f"FLoRA, ranks {ranks}", simulate),
        Arm("flora-equal", f"FLoRA, {each}", simulate, (equal,)),
        Arm("fedavg-equal", f"FedAvg-LoRA, {each}", simulate, (equal, "method.name=fedavg-lora")),
        training("central-steps", f"centralised, {steps} steps", steps),
        training("central-rows", f"centralised, {steps * clients} steps", steps * clients),
        *(training(f"alone-{i:02d}", f"client {i} alone", steps, "--index", str(i)) for i in range(clients)),
    ]


def run(arm: Arm, config_file: Path, out: Path, extra: list[str]) -> dict[str, Any]:
    """Runs one arm unless its report is there already; returns the report."""
    folder, result = out / arm.name, out / f"{arm.name}.json"
    if not result.exists():
        print(f"{arm.name}: {arm.title}", flush=True)
        sets = [*extra, *arm.changes, f"run.folder={folder}"]
        options = [part for change in sets for part in ("--set", change)]
        command = [sys.executable, "-m", "fedtune", arm.command[0], str(config_file), *arm.command[1:], *options]
        with (out / f"{arm.name}.log").open("a") as log:
            subprocess.run([*command, "--plain"], check=True, stdout=log, stderr=log)
        result.write_text((folder / "report.json").read_text())
    return json.loads(result.read_text())


def row(arm: Arm, report: dict[str, Any]) -> Row:
    """Takes from a report what the table shows."""
    if arm.command[0] == "train":
        held_out = report["held_out"]
        return Row(arm.title, held_out["base"], held_out["final"], [], 0, 0, report["training"]["seconds"])
    rounds = report["rounds"]
    path = [r["held_out"]["loss"] for r in rounds]
    up, down = (sum(r[key] for r in rounds) for key in ("bytes_up", "bytes_down"))
    return Row(arm.title, report["held_out"]["base"], rounds[-1]["held_out"], path, up, down, report["seconds"])


def alone(rows: list[Row]) -> Row:
    """The mean over clients that train alone."""
    figures = {key: fmean(r.figures[key] for r in rows) for key in ("loss", "accuracy")}
    return Row(f"alone, mean of {len(rows)}", rows[0].base, figures, [], 0, 0, sum(r.seconds for r in rows))


def table(rows: list[Row]) -> str:
    """Markdown, one line an arm."""
    lines = [
        "| | held-out loss | accuracy | up, all clients | down, all clients | training time |",
        "|---|---:|---:|---:|---:|---:|",
        f"| base model | {rows[0].base['loss']:.3f} | {rows[0].base['accuracy']:.3f} | | | |",
    ]
    for r in rows:
        moved = [f"{n / 1e6:.1f} MB" if n else "" for n in (r.up, r.down)]
        figures = f"{r.figures['loss']:.3f} | {r.figures['accuracy']:.3f}"
        lines.append(f"| {r.title} | {figures} | {moved[0]} | {moved[1]} | {r.seconds:.0f} s |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Held-out loss by round; arms that know no rounds are lines across."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for r in rows:
        if r.path:
            axes.plot(range(len(r.path) + 1), [r.base["loss"], *r.path], marker="o", markersize=4, label=r.title)
    for style, r in zip((":", "--", "-."), (r for r in rows if not r.path), strict=False):
        axes.axhline(r.figures["loss"], color="#666c74", linestyle=style, linewidth=1.2, label=r.title)
    axes.set(xlabel="round", ylabel="held-out loss, nats per answer token")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    """Runs what is missing, then writes the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--out", type=Path, default=Path("runs/flora"))
    parser.add_argument("--jobs", type=int, default=2, help="`fedtune train` processes at a time")
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="section.key=value")
    options = parser.parse_args()
    config = load(options.config, tuple(options.extra))
    options.out.mkdir(parents=True, exist_ok=True)
    todo = arms(config)
    federated = [arm for arm in todo if arm.command[0] == "simulate"]
    single = [arm for arm in todo if arm.command[0] == "train"]
    reports = {arm.name: run(arm, options.config, options.out, options.extra) for arm in federated}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = pool.map(lambda arm: run(arm, options.config, options.out, options.extra), single)
        reports |= dict(zip((arm.name for arm in single), found, strict=True))
    rows = [row(arm, reports[arm.name]) for arm in todo if not arm.name.startswith("alone-")]
    rows.append(alone([row(arm, reports[arm.name]) for arm in todo if arm.name.startswith("alone-")]))
    (options.out / "table.md").write_text(table(rows))
    (options.out / "results.json").write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    plot(rows, options.out / "plot.png")
    print(table(rows))


if __name__ == "__main__":
    main()
