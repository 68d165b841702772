"""Real Flower, and a node that raises, is killed, or sends NaN: the run goes on at quorum, or fails loudly."""

import json
import threading
import time
from pathlib import Path

import pytest


def play(flower, app, settings, fault, connection="local", code=0, **more):
    settings |= {"data.label": fault, "data.client_key": "client-01", "rounds.grace_s": 1.0, **more}
    said = flower.run(app, connection, settings, nodes=3 if connection == "local" else 0, code=code)
    return said, flower.report(Path(settings["run.folder"]))


@pytest.mark.parametrize("fault", ["raise", pytest.param("nan", marks=pytest.mark.slow)])
def test_simulation_goes_on_at_quorum(flower, app, settings, fault):
    _, report = play(flower, app, settings, fault, **{"rounds.quorum": 0.5})
    assert [r["clients"] for r in report.rounds] == [["client-00", "client-02"]] * 2
    assert {e["client"] for e in report.events if e["event"] == "update_refused"} == {"client-01"}
    assert report.last["outcome"] == "completed"


@pytest.mark.slow
def test_simulation_whose_actor_is_killed(flower, app, settings):
    """Ray may go on with another actor, or Flower ends the run; what must not be is a success with rounds missing."""
    settings |= {"data.label": "kill", "data.client_key": "client-01", "rounds.grace_s": 1.0, "rounds.quorum": 0.5}
    values = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    federation = "num-supernodes=3 client-resources-num-cpus=1"
    command = ["flwr", "run", str(app), "local", "--stream", "--run-config", values]
    flower.call(*command, "--federation-config", federation)
    report = flower.report(Path(settings["run.folder"]))
    complete = len(report.rounds) == settings["rounds.count"] and report.last.get("outcome") == "completed"
    assert (flower.status("local") == "finished:completed") == complete


def test_simulation_below_quorum_fails_loudly(flower, app, settings):
    said, report = play(flower, app, settings, "raise", code=7, **{"rounds.attempts": 2})
    assert flower.status("local") == "finished:failed"
    assert "round 1: expected 3 updates, got 2 after 2 attempts" in said
    assert "the toy was told to fail" in said
    assert report.last["outcome"] == "failed"
    assert not (Path(settings["run.folder"]) / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "nan", "kill"])
def test_deployment_goes_on_at_quorum(flower, plain, app, settings, fault):
    """`kill` ends the resident worker in the middle of training."""
    more = {"rounds.quorum": 0.5, "rounds.min_clients": 2}
    _, report = play(flower, app, settings, fault, connection="plain", **more)
    assert [r["clients"] for r in report.rounds] == [["client-00"]] * 2
    assert flower.status("plain") == "finished:completed"


@pytest.mark.slow
def test_deployment_below_quorum_fails_loudly(flower, plain, app, settings):
    more = {"rounds.attempts": 1, "rounds.min_clients": 2}
    said, _ = play(flower, app, settings, "kill", connection="plain", code=7, **more)
    assert flower.status("plain") == "finished:failed"
    assert "died during the task" in said


@pytest.mark.slow
def test_a_supernode_that_is_killed_takes_its_worker_with_it(flower, app, settings, request):
    deployment = request.getfixturevalue("plain")
    settings |= {"rounds.min_clients": 2, "rounds.quorum": 0.5, "rounds.grace_s": 2.0, "rounds.count": 4}
    folder = Path(settings["run.folder"])
    doomed = deployment.nodes.pop()

    def kill():
        until = time.monotonic() + 120
        while not (folder / "rounds" / "0001").exists() and time.monotonic() < until:
            time.sleep(0.1)
        doomed.kill()
        doomed.wait()  # its SuperExec takes a zombie for a living parent, and goes on

    killer = threading.Thread(target=kill)
    killer.start()
    deployment.run(**settings)
    killer.join()
    report = flower.report(folder)
    assert len(report.rounds) == 4
    assert report.rounds[-1]["weight"] < report.rounds[0]["weight"]
    until = time.monotonic() + 20
    while [line for line in flower.processes().values() if "fedtune.flower.resident" in line]:
        assert time.monotonic() < until
        time.sleep(0.1)
