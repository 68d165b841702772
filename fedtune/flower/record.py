"""The run folder of a run on Flower: the same files as a coordinator's, for the same tools.

settings.json  events.jsonl  ledger.csv  rounds/0001/ (PEFT directory, round.json) ...  final/
"""

import csv
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.config import Shared
from fedtune.errors import ConfigError, StorageError, problem
from fedtune.tensors import Tensors


@dataclass
class RoundLog:
    """What a round came to."""

    number: int
    began: float = field(default_factory=time.time)
    attempt: int = 1
    weights: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    ledger: list[tuple[str, str, str, int]] = field(default_factory=list)
    """Client, direction (up, down), kind (control, payload), bytes."""

    def total(self, direction: str) -> int:
        """Bytes in one direction."""
        return sum(row[3] for row in self.ledger if row[1] == direction)


class RunFolder:
    """Writes what a run leaves behind; every file is whole or not there."""

    def __init__(self, folder: Path, shared: Shared) -> None:
        """Begins a run.

        Raises:
            ConfigError: the folder holds a run already.
            StorageError: it cannot be written.
        """
        self._folder, self._shared = folder, shared
        with _disk(folder):
            if any((folder / name).exists() for name in ("rounds", "run.db", "final")):
                remedy = "Choose another run.folder; a run on Flower is not continued"
                raise ConfigError(problem("run.folder", "a folder without a run", folder.resolve(), remedy))
            folder.mkdir(parents=True, exist_ok=True)
            settings = json.dumps(json.loads(shared.to_json()), indent=2)
            (folder / "settings.json").write_text(settings + "\n")
            (folder / "events.jsonl").write_text("")
            with (folder / "ledger.csv").open("w", newline="") as stream:
                csv.writer(stream).writerow(("round", "client", "direction", "kind", "bytes"))

    def event(self, event: str, text: str = "", **fields: object) -> None:
        """Records what happened; `text` is for the people who watch."""
        values = {key: value[:300] if isinstance(value, str) else value for key, value in fields.items()}
        with _disk(self._folder), (self._folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), "event": event, **values}) + "\n")
        if text:
            sys.stderr.write(f"fedtune: {text}\n")

    def close_round(self, state: Tensors, digest: str, log: RoundLog) -> None:
        """Writes a round's adapter directory, its record and its bytes."""
        report = _report(log, digest)
        folder = self._folder / "rounds" / f"{log.number:04d}"
        with _disk(folder), _draft(folder) as draft:
            self._shared.method.export(state, draft, self._shared.model.name)
            (draft / "round.json").write_text(json.dumps(report, indent=2) + "\n")
        with _disk(self._folder), (self._folder / "ledger.csv").open("a", newline="") as stream:
            csv.writer(stream).writerows([(log.number, *row) for row in sorted(log.ledger)])
        self.event("round_closed", _summary(log), **{key: report[key] for key in report if key != "metrics"})

    def finish(self, number: int, digest: str) -> None:
        """Ends a completed run: `final/` is the last round's directory."""
        final = self._folder / "final"
        with _disk(final), _draft(final) as draft:
            shutil.copytree(self._folder / "rounds" / f"{number:04d}", draft, dirs_exist_ok=True)
        text = f"completed: the adapter is in {final.resolve()} (state {digest[:12]})"
        self.event("run_finished", text, outcome="completed", digest=digest, rounds=number)


def _report(log: RoundLog, digest: str) -> Mapping[str, object]:
    clients = sorted(log.weights)
    return {
        "round": log.number,
        "attempt": log.attempt,
        "digest": digest,
        "seconds": round(time.time() - log.began, 3),
        "clients": clients,
        "weight": sum(log.weights.values()),
        "weights": {client: log.weights[client] for client in clients},
        "metrics": {client: log.metrics[client] for client in clients},
        "bytes_up": log.total("up"),
        "bytes_down": log.total("down"),
        "notes": log.notes,
    }


def _summary(log: RoundLog) -> str:
    losses = [(log.weights[c], m["loss"]) for c, m in log.metrics.items() if "loss" in m]
    weight = sum(n for n, _ in losses)
    loss = f", loss {sum(n * loss for n, loss in losses) / weight:.4f}" if weight else ""
    return f"round {log.number}: {len(log.weights)} updates{loss}, {time.time() - log.began:.1f} s"


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """Gives a folder its name only when it is whole."""
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    draft.rename(folder)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(problem(str(path), "a folder that can be written", error.strerror or error)) from error
