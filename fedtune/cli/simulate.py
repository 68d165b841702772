"""`fedtune simulate`: a whole federation on this machine, as real programs that talk over gRPC."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import duration, err, figure, out, size
from fedtune.cli.options import ConfigPath, Plain, Sets
from fedtune.errors import ConfigError, ModelError, StorageError

if TYPE_CHECKING:
    from fedtune.cli.heldout import HeldOut
    from fedtune.cli.view import RunView
    from fedtune.config import Config
    from fedtune.report.write import JsonObject


def simulate(
    config: ConfigPath,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure held-out loss of the base and of every round.")
    ] = True,
    set_: Sets = None,
    plain: Plain = False,
) -> None:
    """Start a coordinator and all clients of `[simulation]` on this machine, and run all rounds.

    Everything is checked first, and model and data are fetched if they are missing. Ctrl-C stops it cleanly; the same
    command goes on where it stopped. The results, described in docs/results.md, are in `run.folder`.

    Examples:

    * `fedtune simulate config.toml`
    * `fedtune simulate config.toml --set rounds.count=5 --set run.folder=runs/5`
    """
    from fedtune.config import load
    from fedtune.report.folder import storage

    overrides = list(set_ or ())
    loaded = load(config, tuple(overrides))
    with storage(loaded.run.folder):
        _check(loaded)
        run_simulation(loaded, config, overrides, evaluate, plain or not err.is_terminal)


def _check(config: "Config") -> None:
    """Looks at everything that can be wrong, what is cheap first; says what is about to run."""
    from fedtune.cli.prepare import check_counts, check_layers, model_is_here, prepare
    from fedtune.cli.same_run import check_same
    from fedtune.config.unused import unused

    check_counts(config)
    check_same(config)
    here = model_is_here(config)
    if here:
        check_layers(config)
    rows = prepare(config, range(config.simulation.clients))
    if not here:
        check_layers(config)
    err.print(
        f"{config.run.name}: {config.method.name} on {config.model.name}, {len(rows)} clients with {min(rows)} to "
        f"{max(rows)} rows, {config.rounds.count} rounds, results in {config.run.folder}",
        soft_wrap=True,
        markup=False,
    )
    if said := unused(config):
        err.print(f"note: {said}", soft_wrap=True, markup=False)


def run_simulation(config: "Config", path: Path, overrides: list[str], evaluate: bool, plain: bool) -> None:
    """Runs the programs to the end of the run, measures, and writes the report.

    Raises:
        FedtuneError: a program failed in a way that starting it again does not mend; the report of what was reached
            is written all the same.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    from fedtune.cli.heldout import HeldOut
    from fedtune.cli.view import RunView

    view = RunView(config.rounds.count, err, plain)
    held_out = HeldOut(config, lambda n, figures: view.evaluated(n, figures["loss"])) if evaluate else None
    try:
        _supervise(config, path, overrides, view, held_out)
        if held_out:
            with err.status("measuring the last rounds"):
                held_out.finish()
    except (ConfigError, ModelError, StorageError):
        raise  # the folder may hold another run, or cannot be written
    except BaseException:
        _report(config, held_out)
        raise
    _report(config, held_out)
    if held_out and held_out.error:
        raise held_out.error


def _supervise(config: "Config", path: Path, overrides: list[str], view: "RunView", held_out: "HeldOut | None") -> None:
    from fedtune.cli.prepare import for_simulation
    from fedtune.cli.programs import coordinator, host
    from fedtune.cli.same_run import keep_same
    from fedtune.cli.supervise import Supervisor
    from fedtune.report.record import collect, round_folders

    folder, sets = config.run.folder, [*overrides, *for_simulation(config)]

    def closed(number: int, digest: str) -> None:
        if held_out:
            held_out.add(number, digest, folder / "rounds" / f"{number:04d}")

    folder.mkdir(parents=True, exist_ok=True)
    keep_same(config)
    supervisor = Supervisor(folder, coordinator(path, folder, sets), host(path, folder, sets), view, closed)
    if held_out:
        held_out.start()
    if round_folders(folder):
        for record in collect(folder).rounds:
            view.closed_before(record)
            closed(record.round, record.digest)
    supervisor.run()


def _report(config: "Config", held_out: "HeldOut | None") -> None:
    """Writes report.json and report.png from what there is, and prints the table."""
    from fedtune.report import collect, write_report
    from fedtune.report.evaluations import Evaluations
    from fedtune.report.plot import plot_report
    from fedtune.report.write import federated

    folder = config.run.folder
    try:
        record = collect(folder)
    except StorageError:
        return  # nothing was started: there is an error on its way already
    evaluations = held_out.evaluations if held_out else Evaluations.open(folder, config)
    report = federated(record, evaluations, config.run.name)
    write_report(folder, report)
    plot_report(report, folder / "report.png")
    if record.rounds:
        _summary(report, folder)


def _summary(report: "JsonObject", folder: Path) -> None:
    from rich.box import SIMPLE
    from rich.table import Column, Table

    columns = ["round", "held-out", "perplexity", "accuracy", "train", "up", "down", "time"]
    if any(r["own"] for r in report["rounds"]):
        columns.append("clients' own")
    table = Table(*(Column(name, no_wrap=True, justify="right") for name in columns), box=SIMPLE)
    base = report["held_out"]["base"]
    if base:
        table.add_row("base", *_figures(base), "", "", "", "")
    for r in report["rounds"]:
        traffic = size(r["bytes_up"]), size(r["bytes_down"])
        loss = figure(r["train_loss"])
        own = [f"{f['mean']:.4f} ± {f['spread']:.4f}" for f in [r["own"].get("loss")] if f]
        table.add_row(str(r["round"]), *_figures(r["held_out"]), loss, *traffic, duration(r["seconds"]), *own)
    out.print(table)
    done = report["outcome"] == "completed"
    adapter = folder / "final" if done else folder / "rounds" / f"{len(report['rounds']):04d}"
    out.print(f"{report['outcome']}; {duration(report['seconds'])} in rounds", markup=False)
    for name, path in (("adapter", adapter), ("report", folder / "report.json"), ("plot", folder / "report.png")):
        out.print(f"{name + ':':<9} {path}", markup=False, soft_wrap=True)


def _figures(held_out: dict[str, float] | None) -> tuple[str, str, str]:
    held_out = held_out or {}
    return figure(held_out.get("loss")), figure(held_out.get("perplexity"), 2), figure(held_out.get("accuracy"), 3)
