"""How rounds and runs end: quorum, grace, deadline, attempts; ports, signals, probes."""

import json
import signal
import socket
import time
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedtune.errors import ConfigError, RoundError
from fedtune.report import collect
from fedtune.report.events import read_events
from fedtune.wire import SERVICE
from fedtune.wire.v1 import coordinator_pb2 as pb


def report(served, number=1):
    return json.loads((served.config.run.folder / "rounds" / f"{number:04d}" / "round.json").read_text())


def silent(tools, connect, served, name):
    """A client that joins, takes its task and never answers."""
    talk = tools.conversation(connect(served.address), name)
    talk.enter(served.run.base.digest)
    return talk


def test_round_closes_at_quorum_when_a_client_dies(start, connect, tools, toy_folder):
    served = start(rounds={"min_clients": 3, "quorum": 0.6, "grace_s": 0.5, "deadline_s": 60})
    dying = silent(tools, connect, served, "dying")
    clients = [tools.client(toy_folder, n, lambda: served.address).start() for n in "ab"]
    assert dying.hear().WhichOneof("kind") == "task"
    dying.leave()
    started = time.monotonic()
    served.join()
    assert time.monotonic() - started < 5
    for client in clients:
        client.join()
    assert report(served)["clients"] == ["a", "b"]


def test_round_closes_when_grace_has_passed(start, connect, tools, toy_folder):
    served = start(rounds={"min_clients": 2, "quorum": 0.5, "grace_s": 0.4, "deadline_s": 60})
    lazy = silent(tools, connect, served, "lazy")
    started = time.monotonic()
    client = tools.client(toy_folder, "a", lambda: served.address).start()
    assert lazy.hear().task.round == 1
    assert lazy.hear().finished.outcome == pb.OUTCOME_COMPLETED
    client.join()
    served.join()
    assert 0.4 <= time.monotonic() - started < 10
    assert report(served)["clients"] == ["a"]


def test_late_update_is_answered_by_rule(start, connect, tools, toy_folder):
    served = start(rounds={"count": 2, "min_clients": 2, "quorum": 0.5, "grace_s": 0.2, "deadline_s": 60})
    calls = connect(served.address)
    late = tools.conversation(calls, "late")
    welcome = late.enter(served.run.base.digest)
    client = tools.client(toy_folder, "a", lambda: served.address).start()
    task = late.hear().task
    payload = tools.honest(calls, toy_folder, "late", welcome, task)
    assert late.hear().task.round == 2  # round 1 has closed without us
    assert tools.submit(calls, "late", task, payload).status == pb.SUBMIT_STATUS_LATE
    client.join()
    served.join()
    assert [report(served, n)["clients"] for n in (1, 2)] == [["a"], ["a"]]


def test_deadline_starts_another_attempt_that_keeps_what_it_has(start, connect, tools, toy_folder):
    served = start(rounds={"min_clients": 2, "quorum": 1.0, "grace_s": 0.1, "deadline_s": 0.7, "attempts": 2})
    gone = silent(tools, connect, served, "gone")
    client = tools.client(toy_folder, "a", lambda: served.address).start()
    assert gone.hear().task.round == 1
    gone.leave()
    time.sleep(0.8)
    spare = tools.client(toy_folder, "spare", lambda: served.address).start()
    served.join()
    assert client.join().replies == [1]
    assert spare.join().replies == [1]
    assert report(served)["clients"] == ["a", "spare"]
    assert report(served)["attempt"] == 2


def test_run_fails_when_every_attempt_is_spent(start, connect, tools):
    served = start(rounds={"deadline_s": 0.3, "attempts": 2})
    talk = silent(tools, connect, served, "a")
    assert talk.hear().task.round == 1
    finished = talk.hear().finished
    assert finished.outcome == pb.OUTCOME_FAILED
    assert "rounds.deadline_s" in finished.message
    with pytest.raises(RoundError, match=r"round 1: expected 1 updates within 0\.3 s, got 0 in each of 2 attempts"):
        served.join()
    assert collect(served.config.run.folder).outcome == "failed"


def test_waiting_for_clients_is_said_once(start, connect, tools, toy_folder, monkeypatch):
    monkeypatch.setattr("fedtune_server.engine.WAITING_S", 0.3)
    served = start(rounds={"min_clients": 2})
    client = tools.client(toy_folder, "a", lambda: served.address, rank=4).start()
    time.sleep(2.5)
    other = tools.client(toy_folder, "b", lambda: served.address).start()
    served.join()
    client.join()
    other.join()
    folder = served.config.run.folder
    said = [event for event in read_events(folder / "events.jsonl") if event["event"] == "waiting"]
    assert [(event["round"], event["clients"], event["ready"]) for event in said] == [(1, 2, 1)]
    members = collect(folder).clients
    assert all(member.alpha > 0 for member in members.values())
    assert members["a"].rank == 4
    assert collect(folder).outcome == "completed"


def test_failed_run_exits_7_and_may_be_started_again(spawn, connect, tools, toy_folder, start, tmp_path):
    rounds = {"deadline_s": 0.3, "attempts": 1, "min_clients": 1}
    process = spawn(rounds=rounds)
    talk = tools.conversation(connect(process.address()), "a")
    talk.enter(_base(toy_folder))
    assert process.wait() == 7
    assert "round 1" in (tmp_path / "run.log").read_text()
    assert collect(tmp_path / "run").outcome == "failed"
    served = start(rounds={**rounds, "deadline_s": 30.0})
    assert collect(tmp_path / "run").outcome == ""
    client = tools.client(toy_folder, "b", lambda: served.address).start()
    served.join()
    assert collect(tmp_path / "run").outcome == "completed"
    assert client.join().replies == [1]


def test_port_in_use_exits_2_and_names_it(spawn, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = spawn(server={"address": address})
        assert process.wait() == 2
    text = (tmp_path / "run.log").read_text()
    assert address in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"address": "0.0.0.0:0"}, "server.insecure"),
        ({"address": "7070"}, "host:port"),
        ({"cert": "x.pem"}, "no server.key and no server.client_ca"),
        ({"cert": "x.pem", "key": "x.pem", "client_ca": "x.pem"}, "server.cert"),
    ],
)
def test_listening_that_is_wrong_or_unsafe_exits_2(spawn, tmp_path, server, words):
    assert spawn(server=server).wait() == 2
    assert words in (tmp_path / "run.log").read_text()


def test_insecure_on_every_interface_when_asked(spawn, connect):
    process = spawn(server={"address": "0.0.0.0:0", "insecure": True})
    assert process.address().startswith("127.0.0.1:")
    assert connect(process.address()).status(pb.StatusRequest()).phase == "waiting"


def test_missing_model_exits_4_with_a_remedy(spawn, tmp_path):
    assert spawn(model={"name": "./nowhere"}).wait() == 4
    assert "a model folder, a hub id or a built-in model" in (tmp_path / "run.log").read_text()


def test_a_hub_model_without_a_hub_exits_9(spawn, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert spawn(model={"name": "nobody/nothing"}).wait() == 9
    text = (tmp_path / "run.log").read_text()
    assert "no connection" in text
    assert "Traceback" not in text


def test_unknown_key_exits_2(spawn, tmp_path):
    assert spawn(rounds={"cuont": 3}).wait() == 2
    assert "did you mean count" in (tmp_path / "run.log").read_text()


def test_set_changes_one_key(spawn, connect):
    process = spawn("--set", "rounds.count=9")
    assert connect(process.address()).status(pb.StatusRequest()).rounds == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_drains_and_the_run_goes_on_later(spawn, connect, tools, toy_folder, number):
    process = spawn(rounds={"count": 2, "min_clients": 2})
    waiting = tools.conversation(connect(process.address()), "b")
    waiting.enter(_base(toy_folder))
    current = [process]
    client = tools.client(toy_folder, "a", lambda: current[-1].address()).start()
    _until(lambda: client.replies == [1])
    assert waiting.hear().task.round == 1
    started = time.monotonic()
    process.process.send_signal(number)
    assert process.wait() == 0
    assert time.monotonic() - started < 10
    with pytest.raises(grpc.RpcError) as caught:
        waiting.hear()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    current.append(spawn(rounds={"count": 2, "min_clients": 2}))
    other = tools.client(toy_folder, "b", lambda: current[-1].address()).start()
    assert current[-1].wait() == 0
    assert client.join().replies == [1, 1]
    assert other.join().replies == [1, 1]


def test_health_serves_and_status_tells(start, connect, tools, toy_folder):
    served = start(run={"name": "demo"}, rounds={"count": 3, "min_clients": 1})
    calls = connect(served.address)
    check = health_pb2_grpc.HealthStub(calls.channel).Check
    for service in ("", SERVICE):
        assert check(health_pb2.HealthCheckRequest(service=service)).status == 1
    talk = tools.conversation(calls, "a", rank=4)
    talk.enter(served.run.base.digest)
    talk.hear()
    talk.say(progress=pb.Progress(round=1, step=3, steps=10, loss=2.5))
    _until(lambda: calls.status(pb.StatusRequest()).clients[0].step == 3)
    status = calls.status(pb.StatusRequest())
    assert (status.name, status.phase, status.round, status.rounds) == ("demo", "training", 1, 3)
    [client] = status.clients
    assert (client.client_id, client.state, client.rank, client.steps, client.loss) == ("a", "training", 4, 10, 2.5)
    assert status.bytes_up > 0 < status.bytes_down
    talk.leave()
    _until(lambda: calls.status(pb.StatusRequest()).clients[0].state == "gone")


def test_metrics_endpoint_counts(start, connect, tools, toy_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = start(rounds={"count": 2, "min_clients": 2}, server={"metrics_address": f"127.0.0.1:{port}"})
    silent_one = silent(tools, connect, served, "b")
    client = tools.client(toy_folder, "a", lambda: served.address).start()
    _until(lambda: client.replies == [1])
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert "fedtune_round 1.0" in text
    assert "fedtune_clients_ready 2.0" in text
    assert 'fedtune_updates_total{answer="accepted"} 1.0' in text
    assert 'fedtune_bytes_total{direction="up",kind="payload"} 896.0' in text
    silent_one.leave()
    client.stop()


def test_metrics_port_in_use_is_a_configuration_error(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        served = start(server={"metrics_address": address})
        with pytest.raises(ConfigError, match="metrics_address"):
            served.join()


def test_client_that_comes_back_with_another_rank_gets_a_task_that_fits(start, connect, tools, toy_folder):
    served = start(rounds={"min_clients": 1})
    first = tools.conversation(connect(served.address), "a", rank=2)
    first.enter(served.run.base.digest)
    small = first.hear().task.update
    first.leave()
    calls = connect(served.address)
    second = tools.conversation(calls, "a", rank=4)
    welcome = second.enter(served.run.base.digest)
    task = second.hear().task
    assert task.update.specs[0].shape[0] == 4
    assert small.specs[0].shape[0] == 2
    payload = tools.honest(calls, toy_folder, "a", welcome, task)
    assert tools.submit(calls, "a", task, payload).status == pb.SUBMIT_STATUS_ACCEPTED
    served.join()


def test_late_joiner_fetches_only_what_it_lacks(start, connect, tools, toy_folder):
    served = start(rounds={"count": 3, "min_clients": 1})
    calls = connect(served.address)
    talk = tools.conversation(calls, "a")
    welcome = talk.enter(served.run.base.digest)
    sizes = {}
    for number in (1, 2, 3):
        task = talk.hear().task
        for have in range(-1, number):
            sizes[number, have] = sum(a.nbytes for a in tools.fetch(calls, "a", task, have).payload.values())
        payload = tools.honest(calls, toy_folder, "a", welcome, task)
        tools.submit(calls, "a", task, payload)
    update = 896
    assert sizes[3, -1] == 2 * update
    assert sizes[3, 0] == 2 * update
    assert sizes[3, 1] == update
    assert sizes[3, 2] == 0


def _base(folder):
    from fedtune.base import open_base

    return open_base(folder).digest


def _until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
