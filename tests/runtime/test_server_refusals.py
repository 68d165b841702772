"""What the coordinator refuses: each with its status code and a sentence, and without harm to anybody else."""

import time

import grpc
import numpy as np
import pytest
from fedtune_server.guard import Patience

from fedtune import wire
from fedtune.config import Shared
from fedtune.wire.frames import sha256
from fedtune.wire.v1 import coordinator_pb2 as pb

CODE = grpc.StatusCode


@pytest.fixture
def served(start):
    return start(rounds={"count": 1, "min_clients": 1})


def refused(call, code, *words):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == code, caught.value.details()
    for word in words:
        assert word in caught.value.details()
    return dict(caught.value.trailing_metadata() or ())


def hello_refused(served, connect, tools, code, *words, client_id="a", **hello):
    return refused(tools.conversation(connect(served.address), client_id, **hello).hear, code, *words)


def test_old_protocol(served, connect, tools):
    error = hello_refused(
        served, connect, tools, CODE.FAILED_PRECONDITION, "protocol", "0.9", protocol_major=0, protocol_minor=9
    )
    assert error["fedtune-error"] == "ProtocolError"


@pytest.mark.parametrize("client_id", ["", "A", "a b", "-a", "a" * 65, "../a", "a\n"])
def test_bad_id(served, connect, tools, client_id):
    hello_refused(served, connect, tools, CODE.INVALID_ARGUMENT, "client.id", client_id=client_id)


def test_missing_feature(served, connect, tools):
    hello_refused(served, connect, tools, CODE.FAILED_PRECONDITION, "raw-v1", features=["other"])


def test_rank_the_method_does_not_take(served, connect, tools):
    hello_refused(served, connect, tools, CODE.FAILED_PRECONDITION, "rank of a", rank=100_000)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -1.0])
def test_alpha_that_is_no_scale(served, connect, tools, alpha):
    hello_refused(served, connect, tools, CODE.INVALID_ARGUMENT, "alpha", alpha=alpha)


def test_first_message_must_be_hello(served, connect, tools):
    calls = connect(served.address)
    stream = calls.join(iter([pb.ClientMessage(progress=pb.Progress(round=1))]))
    refused(lambda: next(stream), CODE.INVALID_ARGUMENT, "hello")


def test_silence_before_hello(start, connect):
    import threading

    served = start(patience=Patience(hello_s=0.2))
    calls, hold = connect(served.address), threading.Event()
    stream = calls.join(iter(lambda: hold.wait() or None, None))
    refused(lambda: next(stream), CODE.DEADLINE_EXCEEDED, "hello within")
    hold.set()


def ready_refused(served, connect, tools, code, *words, **ready):
    talk = tools.conversation(connect(served.address), "a")
    welcome = talk.hear().welcome
    right = {"settings_digest": welcome.settings_digest, "base_digest": welcome.base_digest, "examples": 10}
    assert Shared.from_json(welcome.settings_json).digest() == welcome.settings_digest
    talk.say(ready=pb.Ready(**{**right, **ready}))
    return refused(talk.hear, code, *words)


def test_another_base_model(served, connect, tools):
    error = ready_refused(served, connect, tools, CODE.FAILED_PRECONDITION, "base model of a", base_digest="0" * 64)
    assert error["fedtune-error"] == "ModelError"


def test_other_settings(served, connect, tools):
    ready_refused(served, connect, tools, CODE.FAILED_PRECONDITION, "settings of a", settings_digest="0" * 64)


def test_no_examples(served, connect, tools):
    ready_refused(served, connect, tools, CODE.FAILED_PRECONDITION, "examples of a", examples=0)


def test_second_join_replaces_the_first(served, connect, tools):
    first = tools.conversation(connect(served.address), "a")
    first.enter(served.run.base.digest)
    assert first.hear().WhichOneof("kind") == "task"
    second = tools.conversation(connect(served.address), "a")
    second.enter(served.run.base.digest)
    assert second.hear().WhichOneof("kind") == "task"
    refused(first.hear, CODE.ABORTED, "joined as a")


@pytest.fixture
def turn(served, connect, tools, toy_folder):
    """A client with a task and the update it would honestly send."""
    calls = connect(served.address)
    talk = tools.conversation(calls, "a")
    welcome = talk.enter(served.run.base.digest)
    task = talk.hear().task
    payload = tools.honest(calls, toy_folder, "a", welcome, task)

    def submit(data=payload, client="a", **header):
        return tools.submit(calls, client, task, data, **header)

    submit.payload, submit.task, submit.calls, submit.talk = payload, task, calls, talk
    return submit


def untouched(served):
    work = served.coordinator.engine.open
    return not work.updates and not work.pending


def with_value(payload, value):
    array = np.frombuffer(payload, np.float32).copy()
    array[7] = value
    return array.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite(served, turn, value):
    refused(lambda: turn(with_value(turn.payload, value)), CODE.INVALID_ARGUMENT, "finite")
    assert untouched(served)
    assert turn().status == pb.SUBMIT_STATUS_ACCEPTED
    served.join()


def test_update_too_short_or_too_long(served, turn):
    for data in (turn.payload[:-4], turn.payload + b"1234", b""):
        refused(lambda data=data: turn(data), CODE.INVALID_ARGUMENT, "exactly 896 bytes")
    assert untouched(served)


def test_fewer_or_more_bytes_than_declared(served, turn):
    for data in (turn.payload[:-4], turn.payload + b"1234"):
        refused(lambda data=data: turn(data, nbytes=896), CODE.INVALID_ARGUMENT, "exactly 896 bytes")
    assert untouched(served)


def test_wrong_checksum(served, turn):
    refused(lambda: turn(sha256="0" * 64), CODE.INVALID_ARGUMENT, "SHA-256")
    refused(lambda: turn(sha256="../../etc/passwd"), CODE.INVALID_ARGUMENT, "sha256")
    assert untouched(served)


def test_declared_petabyte_is_refused_before_anything_is_read(served, turn):
    header = pb.SubmitHeader(client_id="a", task_id=turn.task.task_id, weight=1, nbytes=2**50, sha256="0" * 64)
    calls = turn.calls

    def endless():
        yield header.SerializeToString()
        while True:
            yield bytes(wire.FRAME)
            time.sleep(0.001)

    refused(lambda: calls.submit(endless()), CODE.INVALID_ARGUMENT, "at most")


def test_frame_too_large(served, turn):
    header = pb.SubmitHeader(
        client_id="a",
        task_id=turn.task.task_id,
        weight=1,
        nbytes=896,
        sha256="0" * 64,
        state_digest=turn.task.state_digest,
    ).SerializeToString()
    refused(lambda: turn.calls.submit(iter([header, bytes(wire.MAX_FRAME + 2**17)])), CODE.RESOURCE_EXHAUSTED)
    refused(lambda: turn.calls.submit(iter([header, bytes(wire.MAX_FRAME + 1)])), CODE.INVALID_ARGUMENT, "frame")
    assert untouched(served)


def test_empty_frame_and_garbage_header(served, turn):
    refused(lambda: turn.calls.submit(iter([b"\xff\xff\xff"])), CODE.INVALID_ARGUMENT, "SubmitHeader")
    refused(lambda: turn.calls.submit(iter([])), CODE.INVALID_ARGUMENT)
    refused(lambda: next(turn.calls.fetch(pb.FetchRequest(client_id="a", task_id="none", have=-1))), CODE.NOT_FOUND)
    refused(
        lambda: next(turn.calls.fetch(pb.FetchRequest(client_id="a", task_id=turn.task.task_id, have=7))),
        CODE.INVALID_ARGUMENT,
        "have",
    )


@pytest.mark.parametrize("weight", [0, 2**31, 2**63])
def test_weight_out_of_bounds(served, turn, weight):
    refused(lambda: turn(weight=weight), CODE.INVALID_ARGUMENT, "weight of a")
    assert untouched(served)


def test_update_from_another_state(served, turn):
    refused(lambda: turn(state_digest="0" * 64), CODE.INVALID_ARGUMENT, "state_digest")


def test_metrics_that_are_no_numbers_or_too_many(served, turn):
    refused(lambda: turn(metrics={"loss": float("nan")}), CODE.INVALID_ARGUMENT, "metrics")
    refused(lambda: turn(metrics={f"m{i}": 1.0 for i in range(40)}), CODE.INVALID_ARGUMENT, "metrics")


def test_magnitude_that_would_overflow_the_sum(start, connect, tools, toy_folder):
    served = start(method={"name": "fedavg-lora"})
    calls = connect(served.address)
    talk = tools.conversation(calls, "a")
    welcome = talk.enter(served.run.base.digest)
    task = talk.hear().task
    payload = tools.honest(calls, toy_folder, "a", welcome, task)
    refused(lambda: tools.submit(calls, "a", task, with_value(payload, 1e30)), CODE.INVALID_ARGUMENT, "below 2048")
    assert tools.submit(calls, "a", task, payload).status == pb.SUBMIT_STATUS_ACCEPTED


def test_unknown_task_is_late(turn):
    assert turn(task_id="f" * 32).status == pb.SUBMIT_STATUS_LATE
    assert turn(client="b").status == pb.SUBMIT_STATUS_LATE


def test_slow_drip_is_dropped_and_others_are_served(start, connect, tools, toy_folder):
    served = start(
        patience=Patience(frame_s=0.4, submit_s=1.0), rounds={"min_clients": 2, "quorum": 0.5, "grace_s": 0.2}
    )
    good = tools.client(toy_folder, "good", lambda: served.address, before_submit=lambda _: time.sleep(0.3)).start()
    calls = connect(served.address)
    talk = tools.conversation(calls, "drip")
    talk.enter(served.run.base.digest)
    task = talk.hear().task
    header = pb.SubmitHeader(
        client_id="drip", task_id=task.task_id, weight=1, nbytes=896, sha256="0" * 64, state_digest=task.state_digest
    ).SerializeToString()

    def drip(pause):
        yield header
        while True:
            time.sleep(pause)
            yield b"x"

    started = time.monotonic()
    refused(lambda: calls.submit(drip(60)), CODE.DEADLINE_EXCEEDED)  # one frame never comes
    assert time.monotonic() - started < 3
    good.join()
    served.join()


def test_drip_of_tiny_frames_meets_the_total_deadline(start, connect, tools):
    served = start(patience=Patience(frame_s=0.4, submit_s=0.8))
    calls = connect(served.address)
    talk = tools.conversation(calls, "drip")
    talk.enter(served.run.base.digest)
    task = talk.hear().task
    header = pb.SubmitHeader(
        client_id="drip", task_id=task.task_id, weight=1, nbytes=896, sha256=sha256([]), state_digest=task.state_digest
    ).SerializeToString()

    def drip():
        yield header
        for _ in range(400):
            time.sleep(0.1)
            yield b"x"

    started = time.monotonic()
    refused(lambda: calls.submit(drip()), CODE.DEADLINE_EXCEEDED)
    assert time.monotonic() - started < 3


def test_duplicates_get_the_same_answer_and_others_are_refused(start, connect, tools, toy_folder):
    served = start(rounds={"min_clients": 2})
    calls = connect(served.address)
    talks = [tools.conversation(calls, name) for name in "ab"]
    welcomes = [talk.enter(served.run.base.digest) for talk in talks]
    tasks = [talk.hear().task for talk in talks]
    payloads = [tools.honest(calls, toy_folder, n, w, t) for n, w, t in zip("ab", welcomes, tasks, strict=True)]
    assert tools.submit(calls, "a", tasks[0], payloads[0]).status == pb.SUBMIT_STATUS_ACCEPTED
    assert tools.submit(calls, "a", tasks[0], payloads[0]).status == pb.SUBMIT_STATUS_ACCEPTED
    refused(
        lambda: tools.submit(calls, "a", tasks[0], with_value(payloads[0], 0.5)), CODE.ALREADY_EXISTS, "update of a"
    )
    assert list(served.coordinator.engine.open.updates) == ["a"]
    # b may not use a's task.
    assert tools.submit(calls, "b", tasks[0], payloads[1]).status == pb.SUBMIT_STATUS_LATE
    assert tools.submit(calls, "b", tasks[1], payloads[1]).status == pb.SUBMIT_STATUS_ACCEPTED
    served.join()


def test_closed_round_answers_late_to_new_bytes_and_accepted_to_old_ones(start, connect, tools, toy_folder):
    served = start(rounds={"count": 2, "min_clients": 1})
    calls = connect(served.address)
    talk = tools.conversation(calls, "a")
    welcome = talk.enter(served.run.base.digest)
    task = talk.hear().task
    payload = tools.honest(calls, toy_folder, "a", welcome, task)
    assert tools.submit(calls, "a", task, payload).status == pb.SUBMIT_STATUS_ACCEPTED
    assert talk.hear().task.round == 2
    assert tools.submit(calls, "a", task, payload).status == pb.SUBMIT_STATUS_ACCEPTED
    assert tools.submit(calls, "a", task, with_value(payload, 1.0)).status == pb.SUBMIT_STATUS_LATE
