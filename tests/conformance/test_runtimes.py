"""Every method gives the same bits in every runtime, whoever is first, late or interrupted."""

import itertools
import json
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from fedtune.base import open_base
from fedtune.config import Shared
from fedtune.config.members import member_ids
from fedtune.method import Member
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import digest
from fedtune.testing import ToyWorker, open_toy


def test_grpc_gives_the_bits_of_the_simulation(make, over_grpc, simulated, method):
    made = make(method)
    run = over_grpc(made)
    for index in range(3):
        run.client(index)
    assert run.end() == [r.digest for r in simulated(made[0]).rounds]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_any_order_of_arrival_gives_the_same_bits(make, over_grpc, simulated, method, order):
    made = make(method, rounds=2)
    run = over_grpc(made)
    ids = member_ids(made[0])

    def arrived():
        return [event["client"] for event in run.events("update_accepted")]

    def in_turn(index):
        """Opens a worker whose training ends when those before it in the order have handed in theirs."""
        done = [0]

        def wait():
            due = len(order) * done[0] + order.index(index)
            done[0] += 1
            end = time.monotonic() + 20
            while len(arrived()) < due:
                assert time.monotonic() < end
                time.sleep(0.01)

        def open_worker(config, shared, part, on_step):
            return ToyWorker(Path(config.model.name), shared.seed, 10 + 3 * part, delay=wait)

        return open_worker

    for index in range(3):
        run.client(index, in_turn(index))
    assert run.end() == [r.digest for r in simulated(made[0]).rounds]
    assert arrived() == [ids[index] for index in order] * 2


@pytest.mark.parametrize("method", ["flora", "flora by warm start", "florist"])
def test_ranks_and_depths_are_mixed(make, over_grpc, simulated, method):
    made = make(method, ranks=(8, 3, 1), depths=(0, 1, 2))
    run = over_grpc(made)
    for index in range(3):
        run.client(index)
    assert run.end() == [r.digest for r in simulated(made[0]).rounds]


@pytest.mark.parametrize("method", ["flora", "flora by warm start", "florist"])
def test_what_clients_measured_decides_their_adapters(make, over_grpc, simulated, method):
    """The toy clients take 1, 1.3 and 1.6 of everything: forward, each of two blocks, each eighth rank."""
    made = make(method, plan_s=2.9)
    run = over_grpc(made)
    for index in range(3):
        run.client(index)
    assert run.end() == [r.digest for r in simulated(made[0]).rounds]
    found = {event["client"][-1]: (event["depth"], event["rank"]) for event in run.events("client_planned")}
    assert found == {"0": (1, 2), "1": (1, 1), "2": (1, 1)}
    assert run.end() != [r.digest for r in simulated(make(method, "other")[0]).rounds]


# With shared seeds the lengths of a round's updates are alike, and grow from round to round: at last all are clipped.
@pytest.mark.parametrize(("method", "most"), [("fedkseed by krum", 4), ("fedkseed by krum over own seeds", 3)])
def test_every_runtime_leaves_out_the_same_clients(make, over_grpc, simulated, method, most):
    """Multi-Krum over K-vectors needs 2 f + 3 clients; it leaves one out, and of the other four some are clipped."""
    made = make(method, clients=5)
    run = over_grpc(made)
    for index in (3, 1, 4, 0, 2):
        run.client(index)
    want = simulated(made[0]).rounds
    assert run.end() == [r.digest for r in want]
    got = [json.loads(f.read_text())["notes"] for f in sorted(run.folder.glob("rounds/*/round.json"))]
    assert got == [r.notes for r in want]
    assert [len(notes["left_out"]) for notes in got] == [1, 1, 1]
    clipped = [len(notes["clipped"]) for notes in got]
    assert 0 < min(clipped) < 4
    assert max(clipped) <= most


def test_a_client_that_comes_late_is_brought_up_to_date(make, over_grpc, method):
    """It joins while round 1 runs without it, and takes part from round 2 on with the same bits as the others."""
    config, _ = made = make(method, min_clients=2)
    run = over_grpc(made)
    ready = threading.Event()

    def open_waiting(config, shared, part, on_step):
        return ToyWorker(Path(config.model.name), shared.seed, 10 + 3 * part, delay=lambda: ready.wait(20))

    run.client(0, open_waiting)
    run.client(1, open_waiting)
    end = time.monotonic() + 20
    while not run.folder.joinpath("events.jsonl").exists() or not run.events("round_started"):
        assert time.monotonic() < end
        time.sleep(0.01)
    run.client(2)
    while len(run.events("client_ready")) < 3:
        assert time.monotonic() < end
        time.sleep(0.01)
    ready.set()
    assert run.end() == played(config, [(0, 1), (0, 1, 2), (0, 1, 2)])


@pytest.mark.parametrize(
    "method",
    [
        "fedavg by feedback",
        "fedavg-lora by personal",
        "fedkseed",
        "fedkseed by adapter",
        "fedsa-lora",
        "flora",
        "flora by warm start",
    ],
)
def test_an_update_that_is_late_leaves_nothing_behind(make, over_grpc, method):
    """Round 1 closes while the third client still trains, which goes on in round 2 as if it had not been there."""
    config, _ = made = make(method, quorum=0.6, grace_s=0.05)
    run = over_grpc(made)
    ids = member_ids(config)

    def wait(condition):
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    def opener(before_reply):
        def open_worker(config, shared, part, on_step):
            turns = map(before_reply, itertools.count(1))
            return ToyWorker(Path(config.model.name), shared.seed, 10 + 3 * part, delay=partial(next, turns))

        return open_worker

    def late(turn):
        if turn == 1:
            wait(lambda: run.events("round_closed"))

    def in_time(turn):
        if turn == 1:
            wait(lambda: len(run.events("client_ready")) == 3)
        else:
            wait(lambda: (ids[2], turn) in [(e["client"], e["round"]) for e in run.events("update_accepted")])

    for index, before_reply in enumerate((in_time, in_time, late)):
        run.client(index, opener(before_reply))
    assert run.end() == played(config, [(0, 1), (0, 1, 2), (0, 1, 2)])


def played(config, rounds):
    """The digests of a run in which each round has the given members."""
    shared, ids = Shared.of(config), member_ids(config)
    state = shared.method.init(open_base(Path(config.model.name)), shared.seed)
    workers = {i: (open_toy(config, shared, i), Replica()) for i in range(len(ids))}
    digests = []
    for number, members in enumerate(rounds, 1):
        current = Round(shared.method, state, number)
        for index in members:
            worker, replica = workers[index]
            member = shared.method.admit(Member(ids[index]))
            task = current.task(member, replica.version)
            reply = work(shared.method, task, worker.job(shared.method, member, number), replica)
            current.add(member, b"".join(reply), worker.examples)
        state = current.close()
        digests.append(digest(state))
    return digests


def test_every_round_changes_the_state(make, simulated, method):
    """Else the digests above would prove little."""
    digests = [r.digest for r in simulated(make(method)[0]).rounds]
    assert all(one != other for one, other in pairwise(digests))
