"""`fedtune status`: how a run stands, from its folder or from its coordinator."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.console import duration, figure, out, size
from fedtune.cli.options import Json
from fedtune.errors import ConfigError, problem

if TYPE_CHECKING:
    from fedtune.cli.remote import RemoteStatus
    from fedtune.report import RunRecord
    from fedtune.report.evaluations import Evaluations


def status(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, or HOST:PORT of a coordinator.", show_default=False)
    ],
    config: Annotated[
        Path | None, typer.Option(help="Configuration whose `[client]` says how to reach HOST:PORT by TLS.")
    ] = None,
    json: Json = False,
) -> None:
    """Show rounds, clients and bytes of a run.

    Examples:

    * `fedtune status runs/demo`
    * `fedtune status coordinator.example:7070 --config client.toml`
    """
    if Path(run).is_dir():
        _show_folder(Path(run), json)
    elif ":" in run:
        _show_remote(run, config, json)
    else:
        raise ConfigError(problem(run, "a run folder, or HOST:PORT of a coordinator", "neither"))


def _show_folder(folder: Path, json: bool) -> None:
    from fedtune.report import collect
    from fedtune.report.write import federated

    record = collect(folder)
    if json:
        out.print_json(data=federated(record, _evaluations(folder), folder.name))
        return
    _print_rounds(record, folder)
    _print_clients(record)
    state = record.outcome or "not finished"
    out.print(f"{state}; {size(record.bytes_up)} up, {size(record.bytes_down)} down, {duration(record.seconds)}")


def _evaluations(folder: Path) -> "Evaluations | None":
    from fedtune.report.evaluations import Evaluations

    return Evaluations.stored(folder)


def _print_rounds(record: "RunRecord", folder: Path) -> None:
    from rich.table import Table

    evaluations = _evaluations(folder)
    table = Table("round", "clients", "train loss", "held-out loss", "up", "down", "time", "digest", title=str(folder))
    some_skipped = any(closed.skipped for closed in record.rounds)
    if some_skipped:
        table.add_column("skipped")
    for closed in record.rounds:
        figures = evaluations.get(closed.digest) if evaluations else None
        table.add_row(
            str(closed.round), str(len(closed.weights)), figure(closed.train_loss),
            figure(figures["loss"] if figures else None), size(closed.bytes_up), size(closed.bytes_down),
            duration(closed.seconds), closed.digest[:12], *([str(closed.skipped)] if some_skipped else []),
        )  # fmt: skip
    out.print(table)


def _print_clients(record: "RunRecord") -> None:
    from rich.table import Table

    table = Table("client", "rank", "depth", "examples", "updates")
    for client in record.clients.values():
        rank, depth = str(client.rank or "–"), str(client.depth or "all")
        table.add_row(client.id, rank, depth, str(client.examples), str(client.updates))
    out.print(table)


def _show_remote(address: str, config: Path | None, json: bool) -> None:
    from fedtune.cli.remote import fetch_status
    from fedtune.config import Config, load

    client = (load(config) if config else Config()).client
    answer = fetch_status(replace(client, address=address))
    if json:
        out.print_json(data=asdict(answer))
    else:
        _print_remote(answer)


def _print_remote(answer: "RemoteStatus") -> None:
    from rich.table import Table

    table = Table("client", "state", "rank", "depth", "round", "step", "loss", title=f"{answer.name} ({answer.run_id})")
    for client in answer.clients:
        step = f"{client.step}/{client.steps}" if client.steps else "–"
        loss = figure(client.loss if client.steps else None)
        rank, depth = str(client.rank), str(client.depth or "all")
        table.add_row(client.id, client.state, rank, depth, str(client.round or "–"), step, loss)
    out.print(table)
    out.print(
        f"{answer.phase}; round {answer.round} of {answer.rounds}; "
        f"{size(answer.bytes_up)} up, {size(answer.bytes_down)} down"
    )
