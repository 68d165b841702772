"""A run folder becomes a record, a report and a picture."""

import json
import struct

import pytest

from fedtune.config import parse
from fedtune.errors import StorageError
from fedtune.report import collect, write_report
from fedtune.report.evaluations import BASE, Evaluations
from fedtune.report.plot import plot_report
from fedtune.report.write import FORMAT, centralised, federated


def close(folder, number, metrics, weights):
    path = folder / "rounds" / f"{number:04d}"
    path.mkdir(parents=True)
    report = {"round": number, "digest": f"d{number}", "seconds": 1.5, "weights": weights, "metrics": metrics}
    (path / "round.json").write_text(json.dumps({**report, "bytes_up": 10, "bytes_down": 20}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"method": {"name": "flora"}, "model": {"name": "tiny"}}))
    (tmp_path / "events.jsonl").write_text(
        '{"event": "client_ready", "client": "b", "examples": 10}\n{"event": "run_finished", "outcome": "failed"}\n'
    )
    close(tmp_path, 1, {"a": {"loss": 1.0}, "b": {"loss": 3.0}}, {"a": 30, "b": 10})
    close(tmp_path, 2, {"a": {"loss": 0.5}, "b": {"steps": 3}}, {"a": 30, "b": 10})
    close(tmp_path, 10, {}, {"a": 30})
    return tmp_path


def test_the_record(folder):
    record = collect(folder)
    assert [r.round for r in record.rounds] == [1, 2, 10]
    assert [r.train_loss for r in record.rounds] == [1.5, 0.5, None]
    assert (record.bytes_up, record.bytes_down, record.seconds) == (30, 60, 4.5)
    assert record.outcome == "failed"
    assert [(c.id, c.updates, c.examples) for c in record.clients.values()] == [("a", 3, 30), ("b", 2, 10)]


def test_no_run_and_damage(tmp_path, folder):
    with pytest.raises(StorageError, match="run folder"):
        collect(tmp_path / "nothing")
    (folder / "rounds" / "0001" / "round.json").write_text('{"round": 1, "digest": "d"}')
    with pytest.raises(StorageError, match=r"0001/round.json.*seconds"):
        collect(folder)


def test_figures_are_kept_by_what_they_were_measured_on(tmp_path):
    config = parse({"data": {"name": "vader"}})
    evaluations = Evaluations.open(tmp_path, config)
    evaluations.put(BASE, {"loss": 2.0})
    evaluations.put("d1", {"loss": 1.0})
    assert Evaluations.open(tmp_path, config).get("d1") == {"loss": 1.0}
    other = parse({"data": {"name": "vader", "held_out_rows": 7}})
    assert Evaluations.open(tmp_path, other).get(BASE) is None
    assert Evaluations.open(tmp_path, parse({"data": {"name": "vader"}, "rounds": {"count": 9}})).get(BASE)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "k"}'])
def test_a_damaged_file_of_figures_means_measuring_again(tmp_path, content):
    (tmp_path / "evaluations.json").write_text(content)
    assert Evaluations.open(tmp_path, parse({})).figures == {}


def test_the_report(folder):
    evaluations = Evaluations(folder / "evaluations.json", "key", {BASE: {"loss": 2.0}, "d2": {"loss": 1.2}})
    report = federated(collect(folder), evaluations, "team")
    path = write_report(folder, report)
    assert json.loads(path.read_text()) == report
    assert (report["format"], report["kind"], report["name"], report["outcome"]) == (
        FORMAT,
        "federated",
        "team",
        "failed",
    )
    assert report["held_out"] == {"base": {"loss": 2.0}, "final": {"loss": 1.2}}
    assert [r["held_out"] for r in report["rounds"]] == [None, {"loss": 1.2}, None]
    assert report["rounds"][0]["client_loss"] == {"a": 1.0, "b": 3.0}
    assert report["digest"] == "d10"


def test_a_centralised_report():
    report = centralised(parse({"run": {"name": "c"}}), {"loss": 1.0}, {"base": None, "final": {"loss": 0.5}})
    assert (report["kind"], report["name"]) == ("centralised", "c")
    assert report["settings"]["method"]["name"] == "flora"
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_the_picture(folder, evaluated, closed):
    figures = {BASE: {"loss": 2.0}, "d1": {"loss": 1.5}} if evaluated else {}
    record = collect(folder)
    if not closed:
        record.rounds = []
    path = plot_report(federated(record, Evaluations(folder, "k", figures), "team"), folder / "report.png")
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width > 1000
    assert height > 300


def outcome(folder, *events):
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return collect(folder).outcome


FAILED = {"event": "run_finished", "outcome": "failed"}
COMPLETED = {"event": "run_finished", "outcome": "completed"}
READY = {"event": "ready"}


def test_a_run_that_goes_on_has_no_outcome_yet(tmp_path):
    started = {"event": "round_started", "round": 1}
    assert outcome(tmp_path, READY, started, FAILED) == "failed"
    assert outcome(tmp_path, READY, started, FAILED, READY) == ""
    assert outcome(tmp_path, READY, started, FAILED, READY, started, COMPLETED) == "completed"
    assert outcome(tmp_path, READY, started, COMPLETED, READY, started) == ""


def test_a_completed_run_whose_coordinator_comes_back_is_completed(tmp_path):
    assert outcome(tmp_path, READY, COMPLETED, READY) == "completed"


def test_rank_and_alpha_of_a_client_are_those_it_joined_with(tmp_path):
    outcome(tmp_path, {"event": "client_joined", "client": "a", "rank": 4, "alpha": 8.0})
    client = collect(tmp_path).clients["a"]
    assert (client.rank, client.alpha) == (4, 8.0)
