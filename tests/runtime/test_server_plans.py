"""Adapters planned from what clients measured: they stand for the run, whoever restarts."""

import pytest

from fedtune.capability import Capability, Cost
from fedtune.config import Shared
from fedtune.report import collect
from fedtune.wire.convert import capability_to_proto
from fedtune.wire.v1 import coordinator_pb2 as pb


def able(slow):
    """One of the toy base's two blocks at rank 2 takes `slow` seconds beyond one for the rest."""
    return Capability(Cost(1.0, slow, 0.0), Cost(0.0, 0.0, 0.0), 1.0)


def enter(tools, calls, served, name, capability, **hello):
    talk = tools.conversation(calls, name, **hello)
    digest = Shared.from_json(talk.hear().welcome.settings_json).digest()
    said = {"capability": capability_to_proto(capability)} if capability else {}
    talk.say(ready=pb.Ready(settings_digest=digest, base_digest=served.run.base.digest, examples=10, **said))
    return talk


def planned_of(tools, connect, served, name, capability, **hello):
    """Joins, and returns what its task says that it trains as."""
    talk = enter(tools, connect(served.address), served, name, capability, **hello)
    found = trains_as(talk)
    talk.leave()
    return found


def trains_as(talk):
    task = talk.hear().task
    names = {spec.name.split(".")[2] for spec in task.update.specs}
    assert len(names) == (task.member.depth or 2)
    assert {spec.shape[0] for spec in task.update.specs if spec.name.endswith("/A")} == {task.member.rank}
    return task.member.rank, task.member.alpha, task.member.depth


def test_a_plan_stands_when_the_client_or_the_coordinator_starts_again(start, connect, tools):
    rounds = {"count": 1, "min_clients": 2, "plan_s": 2.5}
    served = start(rounds=rounds)
    calls = [connect(served.address) for _ in range(2)]
    talks = [
        enter(tools, c, served, name, able(s)) for c, name, s in zip(calls, ("slow", "quick"), (1, 0.1), strict=True)
    ]
    assert [trains_as(talk) for talk in talks] == [(2, 4.0, 1), (2, 4.0, 2)]
    talks[0].leave()
    assert planned_of(tools, connect, served, "slow", able(0.1)) == (2, 4.0, 1)
    talks[1].leave()
    served.stop()
    served = start(rounds=rounds)
    assert planned_of(tools, connect, served, "slow", able(0.1)) == (2, 4.0, 1)
    assert planned_of(tools, connect, served, "quick", able(9.0)) == (2, 4.0, 2)
    clients = collect(served.config.run.folder).clients
    assert {name: (c.depth, c.planned_s) for name, c in clients.items()} == {"slow": (1, 1.1), "quick": (2, 19.0)}


@pytest.mark.parametrize(
    ("hello", "want"),
    [({"depth": 2}, (2, 4.0, 2)), ({"rank": 4}, (4, 8.0, 1)), ({"rank": 4, "alpha": 3.0}, (4, 3.0, 1))],
)
def test_what_a_client_sets_by_hand_stands(start, connect, tools, hello, want):
    served = start(rounds={"count": 1, "min_clients": 1, "plan_s": 2.5})
    assert planned_of(tools, connect, served, "a", able(1.0), **hello) == want


def test_who_has_not_measured_trains_what_the_method_says(start, connect, tools):
    served = start(rounds={"count": 1, "min_clients": 1, "plan_s": 2.5})
    assert planned_of(tools, connect, served, "a", None) == (2, 4.0, 0)


def test_who_has_measured_is_not_planned_for_unless_asked(start, connect, tools):
    served = start(rounds={"count": 1, "min_clients": 1})
    assert planned_of(tools, connect, served, "a", able(1.0)) == (2, 4.0, 0)


def test_another_time_is_another_plan(start, connect, tools):
    served = start(rounds={"count": 1, "min_clients": 1, "plan_s": 2.5})
    assert planned_of(tools, connect, served, "a", able(1.0))[2] == 1
    served.stop()
    served = start(rounds={"count": 1, "min_clients": 1, "plan_s": 3.5})
    assert planned_of(tools, connect, served, "a", able(1.0))[2] == 2
    calls = connect(served.address)
    talk = enter(tools, calls, served, "a", able(1.0))
    talk.hear()
    [client] = calls.status(pb.StatusRequest()).clients
    assert (client.rank, client.depth) == (2, 2)
