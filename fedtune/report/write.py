"""`report.json`: everything a reader of the run wants to know, in one file. docs/results.md explains each key."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.config import Config, Shared
from fedtune.report.evaluations import BASE, Evaluations, Figures
from fedtune.report.folder import replace_text
from fedtune.report.own import own_figures
from fedtune.report.record import RoundRecord, RunRecord

FORMAT = "fedtune-report-1"
JsonObject = dict[str, Any]


def federated(record: RunRecord, evaluations: Evaluations | None, name: str) -> JsonObject:
    """Builds the report of a federated run."""
    figures = evaluations.figures if evaluations else {}
    rounds = [_round(closed, figures) for closed in record.rounds]
    last = next((r["held_out"] for r in reversed(rounds) if r["held_out"]), None)
    return {
        "format": FORMAT,
        "kind": "federated",
        "name": name,
        "outcome": record.outcome or "unfinished",
        "settings": record.settings,
        "clients": [asdict(client) for client in record.clients.values()],
        "rounds": rounds,
        "held_out": {"base": figures.get(BASE), "final": last},
        "digest": record.rounds[-1].digest if record.rounds else None,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": round(record.seconds, 3),
        "refused_updates": record.refused,
    }


def centralised(config: Config, metrics: Figures, held_out: Mapping[str, Figures | None]) -> JsonObject:
    """Builds the report of `fedtune train`: no clients, no bytes, one stretch of training."""
    return {
        "format": FORMAT,
        "kind": "centralised",
        "name": config.run.name,
        "outcome": "completed",
        "settings": json.loads(Shared.of(config).to_json()),
        "training": metrics,
        "held_out": dict(held_out),
    }


def write_report(folder: Path, report: JsonObject) -> Path:
    """Writes `report.json`, replacing the file at once; returns its path. Raises StorageError when the disk refuses."""
    return replace_text(folder / "report.json", json.dumps(report, indent=2) + "\n")


def _round(closed: RoundRecord, figures: dict[str, dict[str, float]]) -> JsonObject:
    return {
        "round": closed.round,
        "digest": closed.digest,
        "seconds": closed.seconds,
        "clients": sorted(closed.weights),
        "examples": sum(closed.weights.values()),
        "bytes_up": closed.bytes_up,
        "bytes_down": closed.bytes_down,
        "train_loss": closed.train_loss,
        "client_loss": {client: m["loss"] for client, m in sorted(closed.metrics.items()) if "loss" in m},
        "held_out": figures.get(closed.digest),
        "own": own_figures(closed.metrics),
        "skipped": closed.skipped,
        "notes": closed.notes,
    }
