"""`fedtune train`: the same training in one place, to compare with."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import duration, err, figure, out
from fedtune.cli.options import ConfigPath, Plain, Sets

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.report.write import JsonObject
    from fedtune.training.centralised import Trained
    from fedtune.worker import OnStep

Figures = dict[str, dict[str, float] | None]


def train(
    config: ConfigPath,
    index: Annotated[
        int | None, typer.Option(help="Train on the part of simulated client INDEX alone, with its rank.", min=0)
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Measure held-out loss before and after.")
    ] = True,
    set_: Sets = None,
    plain: Plain = False,
) -> None:
    """Train one adapter on all the data in one place, with the loop that clients use.

    It is what a federation is compared with: all data together, or with `--index` one client's data alone. One round of
    a federation of one client gives the same bits. The adapter goes to `run.folder`/final, which
    must not be the folder of a federation.

    Examples:

    * `fedtune train config.toml --set run.folder=runs/central`
    * `fedtune train config.toml --index 0 --set run.folder=runs/alone`
    """
    from fedtune.cli.prepare import prepare
    from fedtune.config import load
    from fedtune.config.members import member_config
    from fedtune.report.folder import refuse_federated, storage

    loaded = load(config, tuple(set_ or ()))
    folder = loaded.run.folder
    if index is not None:
        loaded = member_config(loaded, index, loaded.client.address)
    with storage(folder):
        refuse_federated(folder)
        prepare(loaded)
        folder.mkdir(parents=True, exist_ok=True)
        trained = _train(loaded, index, plain or not err.is_terminal)
        trained.save(loaded, folder / "final")
        figures: Figures = _measure(loaded, folder) if evaluate else {"base": None, "final": None}
        _finish(loaded, folder, trained, figures)


def _train(config: "Config", index: int | None, plain: bool) -> "Trained":
    from rich.progress import Progress

    from fedtune.training.centralised import train_centralised

    if plain:
        return train_centralised(config, on_step=_lines(), index=index)
    with Progress(console=err, transient=True) as progress:
        bar = progress.add_task("training", total=None)

        def on_step(step: int, steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=steps, description=f"training, loss {loss:.3f}")

        return train_centralised(config, on_step=on_step, index=index)


def _lines() -> "OnStep":
    """Says something about a tenth of the steps."""

    def on_step(step: int, steps: int, loss: float) -> None:
        if step == steps or step % max(1, steps // 10) == 0:
            err.print(f"step {step}/{steps}, loss {loss:.4f}")

    return on_step


def _measure(config: "Config", folder: Path) -> Figures:
    from fedtune.report.evaluations import BASE, Evaluations
    from fedtune.training.evaluate import Evaluator

    known = Evaluations.open(folder, config)
    with err.status("measuring on held-out rows"):
        threads = config.client.threads or config.simulation.threads
        evaluator = Evaluator.open(replace(config, client=replace(config.client, threads=threads)))
        if known.get(BASE) is None:
            known.put(BASE, evaluator.base())
        return {"base": known.get(BASE), "final": evaluator.adapter(folder / "final")}


def _finish(config: "Config", folder: Path, trained: "Trained", figures: Figures) -> None:
    """Writes report.json and says what came out."""
    from fedtune.report import write_report
    from fedtune.report.write import centralised

    report: JsonObject = centralised(config, trained.metrics, figures)
    write_report(folder, report)
    metrics = trained.metrics
    out.print(f"{metrics['steps']:.0f} steps in {duration(metrics['seconds'])}, last loss {metrics['loss_last']:.4f}")
    for name, values in figures.items():
        if values:
            accuracy = f", accuracy {figure(values.get('accuracy'), 3)}" if "accuracy" in values else ""
            out.print(f"held-out loss, {name + ':':<6} {values['loss']:.4f}{accuracy}", markup=False)
    out.print(f"adapter: {folder / 'final'}", markup=False, soft_wrap=True)
