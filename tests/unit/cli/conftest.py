"""The command line as a user calls it, in this process: what it printed, what it complained of, how it ended."""

import json
from dataclasses import dataclass

import pytest

from fedtune.cli.main import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def fedtune(monkeypatch, capsys):
    """Calls `fedtune ARGUMENTS`."""

    def call(*arguments):
        from fedtune.cli import console

        monkeypatch.setattr("sys.argv", ["fedtune", *map(str, arguments)])
        for stream in (console.out, console.err):  # pytest has put other streams in place since they were made
            monkeypatch.setattr(stream, "_file", None)
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with two closed rounds, as a coordinator leaves it."""
    folder = tmp_path / "runs" / "team"
    events = [
        {"event": "ready", "address": "127.0.0.1:1"},
        {"event": "client_joined", "client": "ann", "rank": 8, "alpha": 16.0},
        {"event": "client_joined", "client": "bob", "rank": 4},
        {"event": "client_ready", "client": "ann", "examples": 30},
        {"event": "client_ready", "client": "bob", "examples": 10},
        {"event": "update_refused", "client": "bob", "reason": "NaN"},
    ]
    for number in (1, 2):
        report = {
            "round": number,
            "digest": f"{number}" * 64,
            "seconds": 2.5,
            "clients": ["ann", "bob"],
            "weight": 40,
            "weights": {"ann": 30, "bob": 10},
            "metrics": {"ann": {"loss": 2.0 / number}, "bob": {"loss": 4.0 / number}},
            "bytes_up": 1000 * number,
            "bytes_down": 3000 * number,
        }
        adapter = folder / "rounds" / f"{number:04d}"
        adapter.mkdir(parents=True)
        (adapter / "round.json").write_text(json.dumps(report))
        (adapter / "adapter_config.json").write_text(json.dumps({"r": number, "base_model_name_or_path": "tiny"}))
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
        events.append({"event": "round_closed", "round": number, "digest": f"{number}" * 64})
    events.append({"event": "run_finished", "outcome": "completed"})
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 1.0, **event}) + "\n" for event in events))
    return folder
