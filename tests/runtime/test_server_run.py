"""Whole runs of the coordinator with toy clients that are nothing but grpc."""

import csv
import json
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from fedtune.lora import load_peft
from fedtune.selection import select


def run_all(tools, served, folder, ids, **options):
    clients = [tools.client(folder, name, lambda: served.address, **options).start() for name in ids]
    served.join()
    return [client.join() for client in clients]


def final_digest(folder):
    return json.loads((folder / "final" / "round.json").read_text())["digest"]


@pytest.mark.parametrize("method", ["flora", "fedavg-lora"])
def test_run_of_three_clients_and_two_rounds_completes(start, tools, toy_folder, method):
    served = start(rounds={"count": 2, "min_clients": 3}, method={"name": method})
    clients = run_all(tools, served, toy_folder, ["a", "b", "c"])
    folder = served.config.run.folder
    assert [client.replies for client in clients] == [[1, 1]] * 3
    assert [client.outcome for client in clients] == [1, 1, 1]
    reports = [json.loads((folder / "rounds" / name / "round.json").read_text()) for name in ("0001", "0002")]
    assert [report["clients"] for report in reports] == [["a", "b", "c"]] * 2
    assert reports[1]["digest"] == final_digest(folder) == served.run.version.digest
    factors = load_peft(folder / "final")
    assert any(np.abs(array).max() > 0 for array in factors.values())


def test_events_name_every_step_once(start, tools, toy_folder):
    served = start(rounds={"count": 1, "min_clients": 2})
    run_all(tools, served, toy_folder, ["a", "b"])
    events = [json.loads(line) for line in (served.config.run.folder / "events.jsonl").read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.count("update_accepted") == 2
    for once in ("ready", "round_started", "round_closed", "run_finished"):
        assert names.count(once) == 1
    assert sorted(e["client"] for e in events if e["event"] == "task_pushed") == ["a", "b"]
    assert all(isinstance(event["time"], float) for event in events)


def test_ledger_counts_every_payload_byte(start, tools, toy_folder):
    served = start(rounds={"count": 2, "min_clients": 2})
    run_all(tools, served, toy_folder, ["a", "b"])
    with (served.config.run.folder / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Toy base: per layer q (16x16) and v (8x16), rank 2, float32, two layers.
    update = 2 * 2 * ((16 + 16) + (16 + 8)) * 4
    up = {(r["round"], r["client"]): int(r["bytes"]) for r in rows if (r["direction"], r["kind"]) == ("up", "payload")}
    down = {
        (r["round"], r["client"]): int(r["bytes"]) for r in rows if (r["direction"], r["kind"]) == ("down", "payload")
    }
    assert up == {(r, c): update for r in "12" for c in "ab"}
    assert down == {("2", "a"): 2 * update, ("2", "b"): 2 * update}
    assert all(int(r["bytes"]) > 0 for r in rows if r["kind"] == "control")


def test_final_digest_does_not_depend_on_arrival_order(start, tools, toy_folder, tmp_path):
    digests = set()
    for order in (["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]):
        served = start(run={"folder": str(tmp_path / "".join(order))}, rounds={"count": 2, "min_clients": 3})
        gates = {(name, r): threading.Event() for name in order for r in (1, 2)}
        gates[order[0], 1].set()
        gates[order[0], 2].set()

        def turn(name, gates=gates):
            return lambda now: gates[name, now].wait(10)

        clients = [
            tools.client(toy_folder, n, lambda s=served: s.address, rank=r, examples=e, before_submit=turn(n)).start()
            for n, r, e in (("a", 1, 3), ("b", 2, 7), ("c", 4, 11))
        ]
        for number in (1, 2):
            for before, after in pairwise(order):
                _until(lambda s=served, b=before, n=number: _accepted(s, b, n))
                gates[after, number].set()
        served.join()
        for client in clients:
            client.join()
        digests.add(final_digest(served.config.run.folder))
    assert len(digests) == 1


def test_finished_run_started_again_ends_at_once_and_changes_nothing(start, spawn, tools, toy_folder):
    served = start(rounds={"count": 1, "min_clients": 1})
    run_all(tools, served, toy_folder, ["a"])
    digest = final_digest(served.config.run.folder)
    assert spawn(rounds={"count": 1, "min_clients": 1}).wait(20) == 0
    assert final_digest(served.config.run.folder) == digest


def test_finished_run_goes_on_when_rounds_are_added(start, tools, toy_folder):
    run_all(tools, start(rounds={"count": 1, "min_clients": 1}), toy_folder, ["a"])
    served = start(rounds={"count": 2, "min_clients": 1})
    [client] = run_all(tools, served, toy_folder, ["a"])
    assert client.replies == [1]
    assert served.run.version.number == 2


def test_other_settings_in_the_same_folder_are_named(start, tools, toy_folder):
    from fedtune.errors import ConfigError

    start().stop()
    with pytest.raises(ConfigError, match=r"method\.rank: expected 2, got 3"):
        start(method={"name": "flora", "rank": 3})


def test_two_coordinators_cannot_share_a_folder(start):
    from fedtune.errors import ConfigError

    start()
    with pytest.raises(ConfigError, match="in use"):
        start()


def test_sampled_clients_are_those_of_the_draw(start, tools, toy_folder):
    ids = ["a", "b", "c", "d"]
    served = start(run={"seed": 5}, rounds={"count": 2, "clients": 2, "min_clients": 4})
    run_all(tools, served, toy_folder, ids)
    for number in (1, 2):
        report = json.loads((served.config.run.folder / "rounds" / f"{number:04d}" / "round.json").read_text())
        assert tuple(report["clients"]) == select(5, number, 1, ids, 2)


def _accepted(served, client, number):
    work = served.coordinator.engine.open
    return served.run.version.number >= number or (
        work is not None and work.number == number and client in work.updates
    )


def _until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
