"""Wire version 1 as bytes: what was written once is read, and written again, to the same bytes by every later version.

`golden/MESSAGE.hex` is an example of a message (of a oneof, one for each kind); `golden/fetch.frames` and
`submit.frames` are whole calls, a line for each frame. Lines may be added.
A line that changes means a new major version.
"""

from pathlib import Path

import numpy as np
import pytest
from fedtune_client.outbox import Key, Update
from fedtune_client.transfer import Transfer
from fedtune_server.records import VersionRow
from fedtune_server.transfer import prepare
from fedtune_server.versions import Version

from fedtune.methods import FLoRA
from fedtune.tensors import digest
from fedtune.wire.convert import manifest_from_proto
from fedtune.wire.frames import cut, sha256
from fedtune.wire.v1 import coordinator_pb2 as pb

GOLDEN = Path(__file__).parent / "golden"
MANIFEST = pb.Manifest(
    specs=[
        pb.TensorSpec(name="000001/layer.q_proj/A", shape=[2, 3], dtype=pb.DTYPE_FLOAT32),
        pb.TensorSpec(name="bits", shape=[300], dtype=pb.DTYPE_UINT8),
    ]
)
HELLO = pb.Hello(
    protocol_major=1,
    protocol_minor=2,
    software="fedtune 0.1.0",
    features=["raw-v1", "other"],
    client_id="ann",
    run_id="00ff",
    rank=8,
    alpha=16.5,
)
WELCOME = pb.Welcome(
    protocol_major=1,
    protocol_minor=2,
    features=["raw-v1"],
    run_id="00ff",
    settings_json='{"seed":7}',
    settings_digest="a" * 64,
    base_digest="b" * 64,
    rank=8,
    alpha=16.5,
)
READY = pb.Ready(settings_digest="a" * 64, base_digest="b" * 64, examples=2**40)
PROGRESS = pb.Progress(round=3, step=10, steps=100, loss=0.5)
TASK = pb.Task(task_id="c" * 32, round=3, version=2, state_digest="d" * 64, update=MANIFEST, deadline_s=600.0)
FINISHED = pb.Finished(outcome=pb.OUTCOME_FAILED, message="grüße")
CLIENT = pb.ClientStatus(client_id="ann", state="training", rank=8, round=3, step=10, steps=100, loss=0.5)
MEMBER = pb.Member(rank=8, alpha=16.5, depth=3)
COST = pb.Cost(fixed=1.5, block=0.25, rank=0.125)
ABLE = pb.Capability(seconds=COST, memory=COST, room=2.0**33)
EXAMPLES = [
    HELLO,
    WELCOME,
    READY,
    PROGRESS,
    TASK,
    FINISHED,
    MANIFEST,
    MANIFEST.specs[0],
    CLIENT,
    pb.ClientMessage(hello=HELLO),
    pb.ClientMessage(ready=READY),
    pb.ClientMessage(progress=PROGRESS),
    pb.ServerMessage(welcome=WELCOME),
    pb.ServerMessage(task=TASK),
    pb.ServerMessage(finished=FINISHED),
    pb.FetchRequest(client_id="ann", task_id="c" * 32, have=-1),
    pb.FetchHeader(since=-1, version=2, broadcast=MANIFEST, nbytes=324, sha256="e" * 64),
    pb.SubmitHeader(
        client_id="ann",
        task_id="c" * 32,
        weight=30,
        nbytes=324,
        sha256="e" * 64,
        metrics={"loss": 0.5, "steps": 100.0},
        state_digest="d" * 64,
    ),
    pb.SubmitReply(status=pb.SUBMIT_STATUS_LATE, message="too late"),
    pb.StatusRequest(),
    pb.Hello(client_id="ann", depth=3),
    pb.Task(round=3, member=MEMBER),
    MEMBER,
    COST,
    ABLE,
    pb.Hello(client_id="ann", capability=ABLE),
    pb.Ready(examples=3, capability=ABLE),
    pb.ClientStatus(client_id="ann", depth=3),
    pb.StatusReply(
        run_id="00ff",
        name="demo",
        phase="training",
        round=3,
        rounds=5,
        clients=[CLIENT],
        bytes_up=2**33,
        bytes_down=7,
    ),
]


def kind(message):
    return message.DESCRIPTOR.name


def golden(name):
    return [bytes.fromhex(line) for line in (GOLDEN / name).read_text().split("\n")[:-1]]


def test_every_message_has_an_example():
    assert sorted(set(map(kind, EXAMPLES))) == sorted(pb.DESCRIPTOR.message_types_by_name)
    assert {path.stem for path in GOLDEN.glob("*.hex")} == set(map(kind, EXAMPLES))


@pytest.mark.parametrize("name", sorted(set(map(kind, EXAMPLES))))
def test_a_message_keeps_its_bytes(name):
    examples = [example for example in EXAMPLES if kind(example) == name]
    for example, data in zip(examples, golden(f"{name}.hex"), strict=True):
        assert type(example).FromString(data) == example
        assert type(example).FromString(data).SerializeToString(deterministic=True) == data
        assert example.SerializeToString(deterministic=True) == data


@pytest.mark.parametrize("name", sorted(set(map(kind, EXAMPLES)) - {"StatusRequest"}))
def test_the_examples_leave_no_field_out(name):
    examples = [example for example in EXAMPLES if kind(example) == name]
    used = {field.name for example in examples for field, _ in example.ListFields()}
    assert used == {field.name for field in examples[0].DESCRIPTOR.fields}


def fetch_frames():
    state = {
        "000001/layer.q_proj/A": np.arange(6, dtype=np.float32).reshape(2, 3),
        "000001/layer.q_proj/B": np.arange(8, dtype=np.float32).reshape(4, 2) / 8,
    }
    sent = prepare(FLoRA(target_modules=("q_proj",)), Version(1, state, VersionRow(1, digest(state), {})), 0)
    return [sent.header, *cut(sent.buffers)]


def submit_frames(folder):
    payload = np.arange(6, dtype=np.float32).tobytes()
    file = folder / "update.bin"
    file.write_bytes(payload)
    key = Key("00ff", 3, "d" * 64, template="f" * 64, rank=8, alpha=16.5)
    update = Update(key, "", 30, len(payload), sha256([payload]), "", {"loss": 0.5}, file)
    return list(Transfer(None, "ann", folder)._frames(TASK.task_id, update))


def test_the_frames_of_a_fetch():
    frames = golden("fetch.frames")
    assert fetch_frames() == frames
    header = pb.FetchHeader.FromString(frames[0])
    assert manifest_from_proto(header.broadcast).nbytes == header.nbytes == len(frames[1])


def test_the_frames_of_a_submit(tmp_path):
    frames = golden("submit.frames")
    assert submit_frames(tmp_path) == frames
    assert pb.SubmitHeader.FromString(frames[0]).nbytes == len(frames[1])
