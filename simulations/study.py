"""Runs a study: the arms of one configuration over several seeds, then a table and plots.

    python simulations/study.py simulations/NAME [--arms FILE] [--out DIR] [--only ARM ...] [--jobs N] [--set KEY=VALUE]

A study is a folder with `config.toml`, which every arm starts from, and `arms.toml`, which says what each arm changes
and what is drawn. Every arm is an ordinary `fedtune simulate` or `fedtune train`. Run the same command again to go on:
an arm that is done is not run again, and a simulation that was cut short continues in its round. Other settings need
another --out. `--one-process` runs them as the plain loop instead (`oneprocess.py`): the same bits, without programs.

`arms.toml`:

    rows = 600                      # held-out rows for the table; during a run `data.held_out_rows` are looked at
    set = []                        # for all arms
    [[arm]]
    name = "flora"                  # of its folder
    title = "FLoRA"                 # in table and plots
    set = ["method.name=flora"]
    seeds = [0, 1, 2]               # `run.seed` of each repetition; it draws clients, held-out rows and all else
    command = "simulate"            # or "train": all rows in one place
    each_client = true              # with "train": every client alone on its rows; the table shows their mean
    variants = ["iid"]              # in which of the variants below it is run; none means all
    [[variant]]                     # every arm is run in each variant: a row of its own, named ARM-VARIANT
    name = "iid"
    title = "equal shares"
    set = ["simulation.partition=iid"]
    [[plot]]
    file = "bytes.png"
    x = "bytes"                     # of one client, up and down; or "up", "round", "seconds"
    arms = ["flora"]                # none means all
    below = true                    # by how much the loss fell, each seed beside its own base
"""

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from threading import Event
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedtune.config import Config, load
from fedtune.errors import FedtuneError

LABELS = {
    "round": "round",
    "bytes": "bytes of one client, up and down",
    "up": "bytes one client sent",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Arm:
    """One row of the table: a command, the keys it changes, and the seeds it is repeated with."""

    name: str
    title: str
    set: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    command: str = "simulate"
    each_client: bool = False
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plot:
    """One picture: held-out loss against `x`, a line an arm; or how far it lies below the base's."""

    file: str
    x: str
    arms: tuple[str, ...] = ()
    log: bool = False
    below: bool = False

    def heights(self, row: "Row") -> list[float]:
        """What is drawn at the base and after each round."""
        return [row.path[0] - loss for loss in row.path] if self.below else row.path


@dataclass(frozen=True)
class Job:
    """One command of one arm and seed."""

    arm: Arm
    seed: int
    index: int = -1

    @property
    def name(self) -> str:
        """Of its folder and its report."""
        return f"{self.arm.name}-s{self.seed}" + (f"-c{self.index:02d}" if self.index >= 0 else "")


@dataclass(frozen=True)
class Row:
    """What one seed of an arm gave.

    Attributes:
        base, figures: of the base and of the final adapter, on many rows.
        path: held-out loss at the base and after each round, on few rows.
        up, down: bytes after each round, of all clients together.
        seconds: after each round.
        own: loss of clients' own models on their own rows, a mean; None where none was measured.
    """

    arm: str
    seed: int
    base: dict[str, float]
    figures: dict[str, float]
    path: list[float]
    up: list[int]
    down: list[int]
    seconds: list[float]
    clients: int
    own: float | None = None


class Study:
    """A folder's arms, run into another folder."""

    def __init__(self, folder: Path, arms_file: str, out: Path, extra: list[str], only: list[str]) -> None:
        about = tomllib.loads((folder / arms_file).read_text())
        arms = [_built(Arm, arm) for arm in about["arm"]]
        if strangers := set(only) - {arm.name for arm in arms}:
            raise SystemExit(f"--only: expected names of {arms_file}, got {sorted(strangers)}")
        arms = [arm for arm in arms if not only or arm.name in only]
        variants = [_built(Arm, variant) for variant in about.get("variant", [])]
        self.arms = [_varied(arm, v) for v in variants for arm in arms if not arm.variants or v.name in arm.variants]
        self.arms = self.arms or arms
        self.plots = [_built(Plot, plot) for plot in about.get("plot", [])]
        self.rows: int = about["rows"]
        self.file, self.out, self.extra = folder / "config.toml", out, [*about.get("set", []), *extra]
        self.clients = self._config(self.extra).simulation.clients

    def jobs(self) -> list[Job]:
        """Every command there is to run, the first seed of all arms before the second of any."""
        pairs = [(arm, seed) for arm in self.arms for seed in arm.seeds]
        pairs.sort(key=lambda pair: pair[0].seeds.index(pair[1]))
        return [Job(arm, seed, i) for arm, seed in pairs for i in (range(self.clients) if arm.each_client else (-1,))]

    def run(self, job: Job, one_process: bool = False) -> None:
        """Runs one command unless its report is there already."""
        result = self.out / f"{job.name}.json"
        note, settings = self.out / f"{job.name}.settings", "\n".join([*self._sets(job), "", self.file.read_text()])
        if result.exists():
            if note.exists() and note.read_text() != settings:
                raise SystemExit(f"{job.name}: {note} has other settings; name another --out, or remove {result}")
            return
        note.write_text(settings)
        print(f"{job.name}: {job.arm.title}", flush=True)
        folder = self.out / job.name
        if one_process:
            import oneprocess  # beside this file; it needs torch, which the programs import for themselves

            config = self._config([*self._sets(job), f"run.folder={folder}"])
            oneprocess.run(config, job.arm.command, job.index, folder, result, self.rows)
            return
        sets = [*self._sets(job), f"run.folder={folder}"]
        index = ["--index", str(job.index)] if job.index >= 0 else []
        with (self.out / f"{job.name}.log").open("a") as log:
            command = _fedtune(job.arm.command, self.file, sets, *index, "--plain")
            code = subprocess.run(command, check=False, stdout=log, stderr=log).returncode
        if code:
            said = Path(log.name).read_text().strip().splitlines()[-3:]
            raise SystemExit("\n".join([f"{job.name}: ended with code {code}; its log is {log.name}:", *said]))
        result.write_text((folder / "report.json").read_text())

    def measure(self, job: Job) -> dict[str, dict[str, float]]:
        """Figures of the base and of a job's final adapter, on more rows than are looked at during a run."""
        path = self.out / f"{job.name}.final.json"
        if not path.exists():
            print(f"{job.name}: measuring on {self.rows} rows", flush=True)
            sets = [*self._sets(job), f"data.held_out_rows={self.rows}", f"run.folder={self.out}", "client.threads=1"]
            adapter = ("--adapter", str(self.out / job.name))
            command = _fedtune("evaluate", self.file, sets, *adapter, "--json")
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{job.name}: measuring ended with code {done.returncode}; the reason is above")
            found = json.loads(done.stdout)
            path.write_text(json.dumps({"base": found["base"], "final": found[adapter[1]]}, indent=2) + "\n")
        return json.loads(path.read_text())

    def row(self, job: Job) -> Row:
        """Takes from a report, and from the last measurement, what table and plots show."""
        report, final = json.loads((self.out / f"{job.name}.json").read_text()), self.measure(job)
        clients = self._config(self._sets(job)).simulation.clients
        if job.arm.command == "train":
            path = [report["held_out"][when]["loss"] for when in ("base", "final")]
            seconds, own = [report["training"]["seconds"]], report["training"].get("own_loss")
            return Row(job.arm.name, job.seed, final["base"], final["final"], path, [], [], seconds, clients, own)
        rounds = report["rounds"]
        path = [report["held_out"]["base"]["loss"], *(r["held_out"]["loss"] for r in rounds)]
        up, down = (_sums(r[key] for r in rounds) for key in ("bytes_up", "bytes_down"))
        seconds = _sums(r["seconds"] for r in rounds)
        own = rounds[-1].get("own", {}).get("loss", {}).get("mean")
        return Row(job.arm.name, job.seed, final["base"], final["final"], path, up, down, seconds, clients, own)

    def _sets(self, job: Job) -> list[str]:
        return [*self.extra, *job.arm.set, f"run.seed={job.seed}"]

    def _config(self, sets: Iterable[str]) -> Config:
        return load(self.file, tuple(sets))


def mean_of(rows: list[Row]) -> Row:
    """Joins clients that train alone, with the same seed, into one row of their means; any other row is alone."""
    figures = {key: fmean(r.figures[key] for r in rows) for key in rows[0].figures}
    path = [fmean(losses) for losses in zip(*(r.path for r in rows), strict=True)]
    seconds = [sum(s) for s in zip(*(r.seconds for r in rows), strict=True)]
    first = rows[0]
    own = None if first.own is None else fmean(r.own for r in rows if r.own is not None)
    return Row(first.arm, first.seed, first.base, figures, path, first.up, first.down, seconds, first.clients, own)


def table(arms: list[Arm], rows: list[Row]) -> str:
    """Markdown, one line an arm: mean and standard deviation over seeds; bytes of one client over the whole run.

    "Below base" is how far the loss fell, each seed beside its own base: seeds differ in their held-out rows, too.
    """
    owned = any(r.own is not None for r in rows)
    lines = [
        f"| | seeds | held-out loss | below base | accuracy |{' own rows |' * owned} up, a client | down, a client | "
        "seconds |",
        f"|---|---:|---:|---:|---:|---:|---:|---:|{'---:|' * owned}",
        f"| base model | | {_spread(list({r.seed: r.base['loss'] for r in rows}.values()))} | | "
        f"{_accuracy(list({r.seed: r.base for r in rows}.values()))} |{' |' * owned} | | |",
    ]
    for arm in arms:
        mine = [r for r in rows if r.arm == arm.name]
        moved = [_size(fmean(r[-1] / n for r, n in rs)) if rs else "" for rs in _traffic(mine)]
        loss, accuracy = _spread([r.figures["loss"] for r in mine]), _accuracy([r.figures for r in mine])
        loss += f" | {_spread([r.base['loss'] - r.figures['loss'] for r in mine])}"
        seconds = f"{fmean(r.seconds[-1] for r in mine):.0f}"
        own = [r.own for r in mine if r.own is not None]
        accuracy += f" | {_spread(own) if own else ''}" * owned
        lines.append(f"| {arm.title} | {len(mine)} | {loss} | {accuracy} | {moved[0]} | {moved[1]} | {seconds} |")
    return "\n".join(lines) + "\n"


def draw(plot: Plot, arms: list[Arm], rows: list[Row], path: Path) -> None:
    """Held-out loss against rounds, bytes or seconds: a line for the mean over seeds, a band from least to most."""
    figure = Figure(figsize=(10, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dashes = iter((":", "--", "-.") * 9)
    for arm in (a for a in arms if not plot.arms or a.name in plot.arms):
        mine = [r for r in rows if r.arm == arm.name]
        if not mine[0].up:
            level = fmean(plot.heights(r)[-1] for r in mine)
            axes.axhline(level, color="#666c74", linestyle=next(dashes), linewidth=1.2, label=arm.title)
            continue
        x = [fmean(values) for values in zip(*(_x(plot.x, r) for r in mine), strict=True)]
        losses = list(zip(*(plot.heights(r)[1:] for r in mine), strict=True))
        (line,) = axes.plot(x, [fmean(v) for v in losses], marker="o", markersize=3, label=arm.title)
        line.set_linestyle("-" if len(axes.lines) <= 10 else "--")  # the ten colours come again
        axes.fill_between(x, [min(v) for v in losses], [max(v) for v in losses], color=line.get_color(), alpha=0.15)
    base = fmean(r.path[0] for r in rows)
    label = "held-out loss, nats per token" + " below the base model" * plot.below
    axes.set(xlabel=LABELS[plot.x], ylabel=label)
    highest = max(height for line in axes.lines for height in line.get_ydata())
    axes.set_ylim(*((0, None) if plot.below else (0, min(base * 1.05, highest * 1.15))))
    if plot.x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if plot.log:
        axes.set_xscale("log")
    axes.set_title(f"base model: {base:.2f}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    figure.savefig(path)


def _built(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _varied(arm: Arm, variant: Arm) -> Arm:
    title, sets = f"{arm.title}, {variant.title}", (*variant.set, *arm.set)
    return replace(arm, name=f"{arm.name}-{variant.name}", title=title, set=sets)


def _fedtune(command: str, file: Path, sets: Iterable[str], *rest: str) -> list[str]:
    options = [part for change in sets for part in ("--set", change)]
    return [sys.executable, "-m", "fedtune", command, str(file), *options, *rest]


def _sums(values: Iterable[float]) -> list[Any]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(type(value)(total))
    return sums


def _x(x: str, row: Row) -> list[float]:
    if x == "bytes":
        return [(up + down) / row.clients for up, down in zip(row.up, row.down, strict=True)]
    if x == "up":
        return [up / row.clients for up in row.up]
    return row.seconds if x == "seconds" else [float(n) for n in range(1, len(row.path))]


def _traffic(rows: list[Row]) -> tuple[list[tuple[list[int], int]], list[tuple[list[int], int]]]:
    return [(r.up, r.clients) for r in rows if r.up], [(r.down, r.clients) for r in rows if r.down]


def _spread(values: list[float], digits: int = 3) -> str:
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def _accuracy(figures: list[dict[str, float]]) -> str:
    return _spread([f["accuracy"] for f in figures]) if "accuracy" in figures[0] else ""


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def main() -> None:
    """Runs what is missing, then writes `table.md`, `results.json` and the plots into --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, metavar="simulations/NAME")
    parser.add_argument("--arms", default="arms.toml", metavar="FILE", help="in the study's folder")
    parser.add_argument("--out", type=Path, help="default: runs/NAME, or runs/NAME-ARMS for another --arms")
    parser.add_argument("--only", nargs="*", default=[], metavar="ARM")
    parser.add_argument("--seeds", nargs="*", type=int, metavar="N", help="just these of an arm's seeds")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--one-process", action="store_true", help="arms as plain loops, one after another, in here")
    parser.add_argument("--set", action="append", default=[], dest="extra", metavar="KEY=VALUE")
    options = parser.parse_args()
    name = options.study.resolve().name + options.arms.removeprefix("arms").removesuffix(".toml")
    out = options.out or Path("runs") / name
    out.mkdir(parents=True, exist_ok=True)
    study = Study(options.study, options.arms, out, options.extra, options.only)
    jobs = [job for job in study.jobs() if options.seeds is None or job.seed in options.seeds]
    _each(lambda job: study.run(job, options.one_process), jobs, options.jobs)
    rows = _each(study.row, jobs, options.jobs)
    alike = [[r for r, j in zip(rows, jobs, strict=True) if (j.arm, j.seed) == key] for key in _keys(jobs)]
    joined = [mean_of(group) for group in alike]
    text = table(study.arms, joined)
    (out / "table.md").write_text(text)
    (out / "results.json").write_text(json.dumps([asdict(r) for r in joined], indent=2) + "\n")
    for plot in study.plots:
        draw(plot, study.arms, joined, out / plot.file)
    print(text)


def _each(work: Callable[[Job], Any], jobs: list[Job], at_a_time: int) -> list[Any]:
    """Does the work for each job, until one fails: what failed is told now and not after all the other arms."""
    failed = Event()

    def unless_one_failed(job: Job) -> Any:
        if failed.is_set():
            raise CancelledError
        try:
            return work(job)
        except FedtuneError as error:
            failed.set()
            raise SystemExit(f"{job.name}: {error}") from error
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(unless_one_failed, jobs))


def _keys(jobs: list[Job]) -> list[tuple[Arm, int]]:
    return list(dict.fromkeys((job.arm, job.seed) for job in jobs))


if __name__ == "__main__":
    main()
