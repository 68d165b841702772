"""A run as its folder tells it: closed rounds from `rounds/*/round.json`, who took part from `events.jsonl`.

run folder --collect--> RunRecord --write_report--> report.json, report.png
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import StorageError, problem
from fedtune.report.events import Event, read_events


@dataclass(frozen=True)
class RoundRecord:
    """One closed round; `metrics`: what each client reported, `loss` among it; `notes`: whom the method left out."""

    round: int
    digest: str
    seconds: float
    weights: dict[str, int]
    metrics: dict[str, dict[str, float]]
    bytes_up: int
    bytes_down: int
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """Steps (directions) that the round's clients skipped; 0 where the method skips none."""
        return int(sum(m.get("skipped", 0.0) for m in self.metrics.values()))

    @property
    def train_loss(self) -> float | None:
        """Mean training loss of the round's clients, weighted as their updates were; None when none reported it."""
        losses = {c: m["loss"] for c, m in self.metrics.items() if "loss" in m and self.weights.get(c, 0) > 0}
        weight = sum(self.weights[c] for c in losses)
        return sum(self.weights[c] * loss for c, loss in losses.items()) / weight if weight else None


@dataclass
class ClientRecord:
    """One client over the whole run; `planned_s`: how long its training of a round should take (0: not planned)."""

    id: str
    rank: int = 0
    alpha: float = 0.0
    depth: int = 0
    examples: int = 0
    updates: int = 0
    planned_s: float = 0.0


@dataclass
class RunRecord:
    """A run so far. `outcome` is `completed`, `failed`, or empty while it goes on."""

    folder: Path
    outcome: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    refused: int = 0

    @property
    def bytes_up(self) -> int:
        """Bytes from clients to the coordinator in closed rounds."""
        return sum(r.bytes_up for r in self.rounds)

    @property
    def bytes_down(self) -> int:
        """Bytes from the coordinator to clients in closed rounds."""
        return sum(r.bytes_down for r in self.rounds)

    @property
    def seconds(self) -> float:
        """Wall seconds of all closed rounds."""
        return sum(r.seconds for r in self.rounds)


def collect(folder: Path) -> RunRecord:
    """Reads a run folder; raises StorageError when it holds no run or a record is damaged."""
    if not (folder / "events.jsonl").exists() and not (folder / "rounds").is_dir():
        raise StorageError(problem(str(folder), "a run folder with events.jsonl", "none", "Has the run been started?"))
    record = RunRecord(folder, settings=_json(folder / "settings.json", default={}))
    record.rounds = [_round(path) for path in sorted(folder.glob("rounds/*/round.json"))]
    for event in read_events(folder / "events.jsonl"):
        _apply(record, event)
    for closed in record.rounds:
        for client, weight in closed.weights.items():
            known = record.clients.setdefault(client, ClientRecord(client))
            known.updates, known.examples = known.updates + 1, weight
    record.clients = dict(sorted(record.clients.items()))
    return record


def round_folders(folder: Path) -> dict[int, Path]:
    """Maps the number of each closed round to its PEFT directory."""
    found = {}
    for path in sorted(folder.glob("rounds/*/round.json")):
        if re.fullmatch(r"\d+", path.parent.name):
            found[int(path.parent.name)] = path.parent
    return found


def _apply(record: RunRecord, event: Event) -> None:
    kind = event["event"]
    if kind in ("client_joined", "client_planned", "client_ready") and isinstance(event.get("client"), str):
        known = record.clients.setdefault(event["client"], ClientRecord(event["client"]))
        known.rank = int(event.get("rank", known.rank))
        known.alpha = float(event.get("alpha", known.alpha))
        known.depth = int(event.get("depth", known.depth))
        known.examples = int(event.get("examples", known.examples))
        known.planned_s = float(event.get("seconds", known.planned_s))
    elif kind == "update_refused":
        record.refused += 1
    elif kind == "run_finished":
        record.outcome = str(event.get("outcome", ""))
    elif kind == "round_started" or (kind == "ready" and record.outcome == "failed"):
        record.outcome = ""  # the run goes on; one that was completed stays so, though its coordinator starts again


def _round(path: Path) -> RoundRecord:
    raw = _json(path)
    try:
        notes = {str(note): list(clients) for note, clients in dict(raw.get("notes") or {}).items()}
        weights = {str(c): int(w) for c, w in dict(raw.get("weights") or {}).items()}
        metrics = {str(c): _numbers(m) for c, m in dict(raw.get("metrics") or {}).items()}
        return RoundRecord(
            int(raw["round"]), str(raw["digest"]), float(raw["seconds"]), weights, metrics,
            int(raw["bytes_up"]), int(raw["bytes_down"]), notes,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(problem(str(path), "a record of a round", f"{type(error).__name__} {error}")) from error


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in metrics.items()}


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        if default is not None:
            return default
        raise
    except (OSError, ValueError) as error:
        raise StorageError(problem(str(path), "readable JSON", error)) from error
    return dict(value)
