"""FLoRA beside FedAvg-LoRA, centralised training and training alone: one table, one plot, from one configuration.

    python simulations/flora/run.py [--out DIR] [--jobs N] [--set section.key=value ...]

Every arm is an ordinary `fedtune simulate` or `fedtune train` with a few keys changed. Run the same command again to go
on: an arm that is done is not run again, and a simulation that was cut short continues in its round. Other settings
need another --out.
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
    """What an arm gave: figures of base and final adapter on many rows, loss on few (base first), bytes, seconds."""

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


def measure(todo: list[Arm], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Held-out figures of the base and of every final adapter, on more rows than are looked at during a run."""
    path = options.out / "final.json"
    if not path.exists():
        print(f"measuring {len(todo)} adapters on {options.rows} rows", flush=True)
        base = [sys.executable, "-m", "fedtune", "evaluate", str(options.config), "--json"]
        sets = [*options.extra, f"data.held_out_rows={options.rows}", f"run.folder={options.out}", "client.threads=1"]
        changes = [part for change in sets for part in ("--set", change)]

        def some(number: int) -> dict[str, dict[str, float]]:
            adapters = [
                part for arm in todo[number :: options.jobs] for part in ("--adapter", str(options.out / arm.name))
            ]
            own = [*base, *changes, *adapters, *([] if number == 0 else ["--no-base"])]
            return json.loads(subprocess.run(own, check=True, stdout=subprocess.PIPE, text=True).stdout)

        with ThreadPoolExecutor(options.jobs) as pool:
            found = {Path(k).name: v for part in pool.map(some, range(options.jobs)) for k, v in part.items()}
        path.write_text(json.dumps(found, indent=2) + "\n")
    return json.loads(path.read_text())


def row(arm: Arm, report: dict[str, Any], final: dict[str, dict[str, float]]) -> Row:
    """Takes from a report, and from the last measurement, what the table shows."""
    base, figures = final["base"], final[arm.name]
    if arm.command[0] == "train":
        path = [report["held_out"][when]["loss"] for when in ("base", "final")]
        return Row(arm.title, base, figures, path, 0, 0, report["training"]["seconds"])
    rounds = report["rounds"]
    path = [report["held_out"]["base"]["loss"], *(r["held_out"]["loss"] for r in rounds)]
    up, down = (sum(r[key] for r in rounds) for key in ("bytes_up", "bytes_down"))
    return Row(arm.title, base, figures, path, up, down, report["seconds"])


def alone(rows: list[Row]) -> Row:
    """The mean over clients that train alone."""
    figures = {key: fmean(r.figures[key] for r in rows) for key in ("loss", "accuracy")}
    path = [fmean(losses) for losses in zip(*(r.path for r in rows), strict=True)]
    return Row(f"alone, mean of {len(rows)}", rows[0].base, figures, path, 0, 0, sum(r.seconds for r in rows))


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
    """Held-out loss after each round; arms that know no rounds are lines across."""
    figure = Figure(figsize=(8, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for r in rows:
        if r.up:
            axes.plot(range(1, len(r.path)), r.path[1:], marker="o", markersize=4, label=r.title)
    for style, r in zip((":", "--", "-."), (r for r in rows if not r.up), strict=False):
        axes.axhline(r.path[-1], color="#666c74", linestyle=style, linewidth=1.2, label=r.title)
    axes.set(xlabel="round", ylabel="held-out loss, nats per answer token", ylim=(0, None))
    axes.set_title(f"base model: {rows[0].path[0]:.2f}, beyond the scale", fontsize=10, loc="left")
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
    parser.add_argument("--rows", type=int, default=600, help="held-out rows for the table")
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
    final = measure(todo, options)
    rows = [row(arm, reports[arm.name], final) for arm in todo if not arm.name.startswith("alone-")]
    rows.append(alone([row(arm, reports[arm.name], final) for arm in todo if arm.name.startswith("alone-")]))
    (options.out / "table.md").write_text(table(rows))
    (options.out / "results.json").write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    plot(rows, options.out / "plot.png")
    print(table(rows))


if __name__ == "__main__":
    main()
