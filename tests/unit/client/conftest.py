"""A coordinator of one thread and no disk, which does what a test tells it to."""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from fedtune import wire
from fedtune.base import open_base
from fedtune.codecs import raw
from fedtune.config import Config, Shared
from fedtune.config.schema import ClientConfig, ModelConfig, RunConfig
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.rounds import Round
from fedtune.tensors import digest
from fedtune.testing import ToyWorker, toy_base
from fedtune.wire.convert import manifest_to_proto
from fedtune.wire.frames import cut, sha256
from fedtune.wire.v1 import coordinator_pb2 as pb


@dataclass
class FakeCoordinator:
    """Plays rounds with one client.

    `answers` are given to submits before the honest one, `broken` fetches are spoilt, `retries` rounds are repeated.
    """

    config: Config
    rounds: int = 2
    welcome: dict[str, object] = field(default_factory=dict)
    answers: list[object] = field(default_factory=list)
    broken: int = 0
    retries: int = 0
    pause_s: float = 0.0
    answer_s: float = 0.0
    hellos: list[pb.Hello] = field(default_factory=list)
    readies: list[pb.Ready] = field(default_factory=list)
    progress: list[pb.Progress] = field(default_factory=list)
    fetches: list[int] = field(default_factory=list)
    submits: list[pb.SubmitHeader] = field(default_factory=list)
    repush: bool = True
    outcome: int = pb.OUTCOME_COMPLETED

    def __post_init__(self) -> None:
        base = open_base(Path(self.config.model.name))
        self.shared = Shared.of(self.config)
        self.base_digest = base.digest
        self.method = self.shared.method
        self.state = self.method.init(base, self.shared.seed)
        self.digests: list[str] = []
        self.open = Round(self.method, self.state, 1)
        self.member = self.method.admit(Member(self.config.client.id))
        self.say: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.port = 0
        self.server: grpc.Server | None = None

    def start(self) -> None:
        self.server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        handlers = {
            "Join": grpc.stream_stream_rpc_method_handler(
                self.join, pb.ClientMessage.FromString, pb.ServerMessage.SerializeToString
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch, pb.FetchRequest.FromString),
            "Submit": grpc.stream_unary_rpc_method_handler(
                self.submit, response_serializer=pb.SubmitReply.SerializeToString
            ),
        }
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, handlers),))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        self.server.start()

    def stop(self) -> None:
        self.say.put(None)
        if self.server:
            self.server.stop(0).wait()

    def task(self, **changes: object) -> pb.Task:
        fields = {
            "task_id": f"{self.open.number:032x}",
            "round": self.open.number,
            "version": self.open.number - 1,
            "state_digest": digest(self.open.state),
            "update": manifest_to_proto(self.method.template(self.open.state, self.member)),
            "deadline_s": 60.0,
        }
        return pb.Task(**{**fields, **changes})

    def join(self, messages: Iterator[pb.ClientMessage], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        self.hellos.append(next(messages).hello)
        say = self.say = queue.SimpleQueue()
        context.add_callback(lambda: say.put(None))
        fields = {
            "protocol_major": wire.PROTOCOL_MAJOR,
            "features": wire.FEATURES,
            "run_id": "run-1",
            "settings_json": self.shared.to_json(),
            "settings_digest": self.shared.digest(),
            "base_digest": self.base_digest,
            "rank": self.member.rank,
            "alpha": self.member.alpha,
        }
        yield pb.ServerMessage(welcome=pb.Welcome(**{**fields, **self.welcome}))
        try:
            self.readies.append(next(messages).ready)
        except (StopIteration, grpc.RpcError):
            return
        threading.Thread(target=self._listen, args=(messages,), daemon=True).start()
        if self.repush:
            yield pb.ServerMessage(task=self.task())
        while (message := say.get()) is not None:
            if isinstance(message, grpc.StatusCode):
                context.abort(message, "told to")
            yield message

    def _listen(self, messages: Iterator[pb.ClientMessage]) -> None:
        try:
            self.progress.extend(m.progress for m in messages)
        except grpc.RpcError:
            return

    def fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.fetches.append(request.have)
        task = self.open.task(self.member, request.have)
        buffers = [bytearray(buffer) for buffer in raw.encode(task.payload, task.broadcast)]
        if self.broken:
            self.broken -= 1
            next(b for b in buffers if b)[0] ^= 1
        yield pb.FetchHeader(
            since=task.since,
            version=task.version,
            broadcast=manifest_to_proto(task.broadcast),
            nbytes=task.broadcast.nbytes,
            sha256=sha256(buffers),
        ).SerializeToString()
        yield from cut(buffers)

    def submit(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> pb.SubmitReply:
        header = pb.SubmitHeader.FromString(next(frames))
        payload = b"".join(frames)
        assert hashlib.sha256(payload).hexdigest() == header.sha256
        assert len(payload) == header.nbytes
        self.submits.append(header)
        answer = self.answers.pop(0) if self.answers else pb.SUBMIT_STATUS_ACCEPTED
        if callable(answer):
            answer = answer()
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, "told to")
        if answer == pb.SUBMIT_STATUS_ACCEPTED:
            self.open.add(self.member, payload, header.weight)
        if self.retries:
            self.retries -= 1
            self.open = Round(self.method, self.state, self.open.number)
            again = pb.ServerMessage(task=self.task(task_id="b" * 32))
            threading.Timer(self.pause_s, self.say.put, (again,)).start()
        else:
            self.advance()
        time.sleep(self.answer_s)
        return pb.SubmitReply(status=answer)

    def advance(self) -> None:
        """Closes the round, with the update if there is one, and sends what comes next."""
        if self.open.members:
            self.state = self.open.close()
        self.digests.append(digest(self.state))
        if self.open.number == self.rounds:
            self.say.put(pb.ServerMessage(finished=pb.Finished(outcome=self.outcome, message="told to")))
            self.say.put(None)
        else:
            self.open = Round(self.method, self.state, self.open.number + 1)
            self.say.put(pb.ServerMessage(task=self.task()))


@pytest.fixture(params=sorted(METHODS))
def any_method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    base = toy_base(tmp_path / "base")
    method = METHODS["fedavg-lora"](rank=2)
    return Config(
        run=RunConfig(folder=tmp_path / "run"),
        model=ModelConfig(name=str(base)),
        method=method,
        client=ClientConfig(id="anna", folder=tmp_path / "anna"),
    )


@pytest.fixture
def coordinator(config: Config) -> Iterator[FakeCoordinator]:
    fake = FakeCoordinator(config)
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def toy() -> Callable[..., SimpleNamespace]:
    """Makes an `open_worker` for the client that counts trainings and remembers its workers."""

    def make(delay: Callable[[], None] | None = None, folder: Path | None = None) -> SimpleNamespace:
        made = SimpleNamespace(workers=[], trainings=0, on_step=None)

        def trained() -> None:
            made.trainings += 1
            if delay:
                delay()

        def open_worker(config: Config, shared: Shared, index: int | None, on_step: object) -> ToyWorker:
            worker = ToyWorker(folder or Path(config.model.name), shared.seed, delay=trained)
            made.workers.append(worker)
            made.on_step = on_step
            return worker

        made.open = open_worker
        return made

    return make
