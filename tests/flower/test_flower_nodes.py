"""Nodes that fail, are late, are refused or lie: nothing of it may stop, slow down or change a run of the others."""

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

from flwr.app import Error, Message
from loop_grid import KEEPING, events

from fedtune.flower import roster
from fedtune.flower.messages import as_array, content, read_array
from fedtune.flower.packets import HELLO, LACK, pack
from fedtune.flower.visit import BYE
from fedtune.wire.v1 import coordinator_pb2 as pb


def is_hello(message, node):
    return message.metadata.dst_node_id == node and read_array(message).stype == HELLO


def goodbyes(grid):
    return {message.metadata.dst_node_id for message in grid.sent if read_array(message).stype == BYE}


def waits(monkeypatch, name, seen):
    """Notes what `seen` returns each time the function `name` waits for the next look."""
    found, pause = [], roster.pause

    def noted(began):
        found.append(seen())
        pause(began)

    monkeypatch.setattr(name, noted)
    return found


@pytest.mark.parametrize("resident", [True, False])
def test_a_turn_that_fails_once_leaves_a_clients_memory_as_it_was(made, simulated, resident):
    config, grid, strategy, flat = made(method=KEEPING, resident=resident)
    station, turns, plain, refused = grid.stations[2], [], grid._reply, []
    station.prepare()
    opened = station._open

    def opener(*arguments):
        worker = opened(*arguments)

        def delay():
            turns.append(1)
            if len(turns) == 3:
                raise ValueError("once")

        worker._delay = delay
        return worker

    def reply(message):
        try:
            return plain(message)
        except ValueError as error:
            refused.append(error)
            return Message(Error(2, str(error)), reply_to=message)

    station._open, grid._reply = opener, reply
    strategy.start(grid)
    assert len(refused) == 1
    want = simulated({k: v for k, v in flat.items() if k != "simulation.clients"}, 3)
    assert [e["digest"] for e in events(config, "round_closed")] == want


def test_a_hello_that_fails_is_asked_again(made):
    config, grid, strategy, _ = made(min_clients=3, deadline_s=20.0)
    plain, failed = grid._reply, []

    def reply(message):
        if is_hello(message, 2) and len(failed) < 2:
            failed.append(message)
            return Message(Error(8, "ClientApp stopped responding."), reply_to=message)
        return plain(message)

    grid._reply = reply
    strategy.start(grid)
    assert len(failed) == 2
    assert [len(e["clients"]) for e in events(config, "round_closed")] == [3, 3, 3]


def test_a_node_that_never_says_who_it_is_delays_the_first_round_alone(made, monkeypatch):
    monkeypatch.setattr("fedtune.flower.strategy.HELLO_S", 0.3)
    rounds = waits(monkeypatch, "fedtune.flower.roster.pause", lambda: len(events(config, "round_closed")))
    config, grid, strategy, _ = made(min_clients=2)
    plain = grid._reply
    grid._reply = lambda message: None if is_hello(message, 2) else plain(message)
    strategy.start(grid)
    assert [len(e["clients"]) for e in events(config, "round_closed")] == [2, 2, 2]
    assert 0 in rounds
    assert not {1, 2} & set(rounds), "nobody is waited for before the second round and the third"


def test_a_node_that_is_late_gets_no_task_until_it_has_answered(made):
    config, grid, strategy, _ = made(quorum=0.6)
    plain, held = grid._reply, {}

    def reply(message):
        answer = plain(message)
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 2:
            return answer
        held[message.metadata.message_id] = answer
        return None

    def close_round(*arguments):
        if strategy._late.clients and len(events(config, "round_closed")) == 2:
            grid.replies |= held  # while round 3 waits to begin, what was asked in round 1 arrives

    grid._reply = reply
    hear = strategy._late.hear
    strategy._late.hear = lambda grid: (close_round(), hear(grid))
    strategy.start(grid)
    tasks = [m for m in grid.sent if m.metadata.message_type == "train" and m.metadata.dst_node_id == 2]
    assert [len(e["clients"]) for e in events(config, "round_closed")] == [2, 2, 2]
    assert len(tasks) == 2, "in round 1, and in round 3, when the answer to round 1 had come"


def test_a_node_that_is_never_heard_of_again_delays_no_round(made, monkeypatch):
    """As many nodes as `min_clients` asks for are there, and the others are a quorum."""
    config, grid, strategy, _ = made(min_clients=3, quorum=0.6, deadline_s=20.0)
    grid.damage["client-01"] = "silent"
    waited = waits(monkeypatch, "fedtune.flower.late.pause", lambda: 1)
    strategy.start(grid)
    assert [len(e["clients"]) for e in events(config, "round_closed")] == [2, 2, 2]
    assert waited == []


def test_a_run_waits_for_a_late_node_that_it_needs(made, monkeypatch):
    config, grid, strategy, _ = made(nodes=2, min_clients=2, quorum=1.0, deadline_s=20.0)
    strategy._late.add({"99": _stand_in(grid)}, 0)
    grid.replies["99"] = None
    begun = []

    def answer_at_the_third_look():
        begun.append(len(events(config, "round_started")))
        if len(begun) == 3:
            grid.replies["99"] = Message(Error(2, "late"), reply_to=_sent("99"))

    waits(monkeypatch, "fedtune.flower.late.pause", answer_at_the_third_look)
    strategy.start(grid)
    assert begun == [0, 0, 0], "no round begins before it has answered"
    assert [len(e["clients"]) for e in events(config, "round_closed")] == [2, 2, 2]


@pytest.mark.parametrize(("failed", "holds"), [(False, 3), (True, -1)])
def test_a_late_node_holds_what_its_turn_left_it(made, failed, holds):
    """A turn that failed has put the model back to the base; any other one leaves the version it was played on."""
    _, grid, strategy, _ = made(nodes=2, min_clients=2)
    node = _stand_in(grid)
    node.version = 1
    strategy._late.add({"99": node}, 3)
    asked = _sent("99")
    answer = content(as_array("x", b"\0"))
    grid.replies["99"] = Message(Error(2, "raised"), reply_to=asked) if failed else Message(answer, reply_to=asked)
    strategy._late.hear(grid)
    assert node.version == holds
    assert not strategy._late.clients


def test_a_node_may_ask_for_the_state_once_a_round(made):
    config, grid, strategy, _ = made(quorum=0.6, grace_s=5.0)
    asked = []

    def lack(stype, data):
        closed = len(events(config, "round_closed"))
        if closed < 2:
            return content(as_array(stype, data))
        asked.append(closed)
        request = pb.FetchRequest(client_id="client-01", have=(len(asked) + 1) % 2)
        return content(as_array(LACK, pack([request.SerializeToString()])))

    grid.damage["client-01"] = lack
    strategy.start(grid)
    assert len(asked) == 2
    assert "another request for the state" in events(config, "update_refused")[-1]["reason"]


def test_the_worker_of_a_refused_node_is_told_goodbye(made):
    config, grid, strategy, _ = made()
    grid.stations[3] = grid._station(1, 3)
    strategy.start(grid)
    assert {e["node"] for e in events(config, "client_refused")} == {"3"}
    assert goodbyes(grid) == {1, 2, 3}


def test_an_error_of_flowers_own_is_recorded(made):
    config, grid, strategy, _ = made()

    def broken(message_ids):
        raise ConnectionError("the SuperLink is gone")

    grid.pull_messages = broken
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        strategy.start(grid)
    (event,) = events(config, "run_finished")
    assert (event["outcome"], event["reason"]) == ("failed", "ConnectionError: the SuperLink is gone")


def _sent(number):
    """A message that was sent under a number."""
    message = Message(content(as_array("x", b"\0")), dst_node_id=2, message_type="train")
    message.metadata.__dict__["_message_id"] = number
    return message


def _stand_in(grid):
    from fedtune.flower.roster import Node
    from fedtune.method import Member

    return Node(2, Member("client-01", 2, 4.0), resident=True)
