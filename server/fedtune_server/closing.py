"""How a round ends, and how a run ends. Every step may be repeated: a crash between two of them costs nothing."""

import time

from fedtune.errors import StorageError
from fedtune_server import records, results
from fedtune_server.ledger import DOWN, UP
from fedtune_server.open_round import OpenRound
from fedtune_server.run import COMPLETED, Run
from fedtune_server.versions import Version, save_version


def close(run: Run, work: OpenRound) -> Version:
    """Closes a round: state, adapter directory, then the one transaction that makes it true.

    Raises:
        StorageError: the disk refused; the round is as it was and may be closed again.
    """
    state = work.total.close(work.updates.values(), work.tasks)
    version = save_version(run.blobs, work.number, state, run.version)
    report = _report(run, work, version)
    folder = run.folder / "rounds" / f"{work.number:04d}"
    results.export(run.shared.method, state, run.shared.model.name, report, folder)
    ledger = run.book.take()
    try:
        run.store.call(records.close_round(version.row, ledger, time.time()))
    except StorageError:
        run.book.give_back(ledger)
        raise
    run.events.emit("round_closed", **{key: report[key] for key in report if key != "metrics"})
    _tidy(run, version)
    return version


def complete(run: Run) -> None:
    """Ends the run: `final/`, the ledger and the outcome; raises StorageError when the disk refuses."""
    last = run.folder / "rounds" / f"{run.version.number:04d}"
    if run.outcome == COMPLETED and (run.folder / "final").is_dir():
        return
    if not last.is_dir():
        report = {"round": run.version.number, "digest": run.version.digest}
        results.export(run.shared.method, run.version.state, run.shared.model.name, report, last)
    results.copy(last, run.folder / "final")
    run.book.write_csv(run.folder / "ledger.csv")
    run.set_meta(outcome=COMPLETED)
    run.events.emit("run_finished", outcome=COMPLETED, digest=run.version.digest, rounds=run.version.number)


def _report(run: Run, work: OpenRound, version: Version) -> dict[str, object]:
    clients = sorted(work.updates)
    return {
        "round": work.number,
        "attempt": work.row.attempt,
        "digest": version.digest,
        "seconds": round(time.time() - work.row.started, 3),
        "clients": clients,
        "weight": sum(update.weight for update in work.updates.values()),
        "weights": {client: work.updates[client].weight for client in clients},
        "metrics": {client: dict(work.updates[client].metrics) for client in clients},
        "bytes_up": run.book.total(UP, work.number),
        "bytes_down": run.book.total(DOWN, work.number),
        "notes": work.total.notes(),
    }


def _tidy(run: Run, version: Version) -> None:
    """Writes the ledger and removes blobs that nothing needs any more; a failure here is mended next time."""
    run.blobs.sweep({blob for blob, _ in version.row.tensors.values()})
    try:
        run.book.write_csv(run.folder / "ledger.csv")
    except StorageError as error:
        run.events.emit("storage_failed", reason=str(error))
