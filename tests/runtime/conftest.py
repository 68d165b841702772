"""Coordinators to talk to (in this process, or one of their own) and clients made of nothing but grpc."""

import asyncio
import contextlib
import hashlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from fedtune_server.coordinator import Coordinator
from fedtune_server.guard import Patience
from fedtune_server.run import open_run

from fedtune import wire
from fedtune.config import Config, Shared, parse
from fedtune.method import Member
from fedtune.rounds import Replica, Task, receive, work
from fedtune.testing import ToyWorker, toy_base
from fedtune.wire.convert import manifest_from_proto
from fedtune.wire.convert import parse as parse_message
from fedtune.wire.frames import cut, sha256
from fedtune.wire.v1 import coordinator_pb2 as pb


class Wire:
    """The four calls of the contract on one channel, with nothing hidden."""

    def __init__(self, address: str) -> None:
        options = (*wire.CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        self.channel = grpc.insecure_channel(address, options=options)
        to_bytes = pb.ClientMessage.SerializeToString
        self.join = self.channel.stream_stream(wire.JOIN, to_bytes, pb.ServerMessage.FromString)
        self.fetch = self.channel.unary_stream(wire.FETCH, pb.FetchRequest.SerializeToString)
        self.submit = self.channel.stream_unary(wire.SUBMIT, None, pb.SubmitReply.FromString)
        self.status = self.channel.unary_unary(
            wire.STATUS, pb.StatusRequest.SerializeToString, pb.StatusReply.FromString
        )

    def close(self) -> None:
        self.channel.close()


class Conversation:
    """One Join stream, spoken by hand."""

    def __init__(self, calls: Wire, client_id: str, **hello: Any) -> None:
        self.id, self.calls = client_id, calls
        self.outgoing: queue.Queue[pb.ClientMessage | None] = queue.Queue()
        first = {
            "protocol_major": wire.PROTOCOL_MAJOR,
            "protocol_minor": wire.PROTOCOL_MINOR,
            "software": "test",
            "features": list(wire.FEATURES),
            "client_id": client_id,
        }
        self.say(hello=pb.Hello(**{**first, **hello}))
        self.stream = calls.join(iter(self.outgoing.get, None))

    def say(self, **kind: Any) -> None:
        self.outgoing.put(pb.ClientMessage(**kind))

    def hear(self) -> pb.ServerMessage:
        return next(self.stream)

    def enter(self, base_digest: str, examples: int = 10) -> pb.Welcome:
        welcome = self.hear().welcome
        digest = Shared.from_json(welcome.settings_json).digest()
        self.say(ready=pb.Ready(settings_digest=digest, base_digest=base_digest, examples=examples))
        return welcome

    def leave(self) -> None:
        self.outgoing.put(None)
        self.stream.cancel()


@dataclass
class ToyClient:
    """A whole client in one thread: joins, works, submits, and starts over when anything breaks."""

    folder: Path
    id: str
    address: Callable[[], str]
    rank: int = 0
    examples: int = 10
    before_submit: Callable[[int], None] = lambda _round: None
    replies: list[int] = field(default_factory=list)
    outcome: int = 0
    error: BaseException | None = None

    def start(self) -> "ToyClient":
        self._stop = threading.Event()
        self._sent: dict[str, bytes] = {}
        self._thread = threading.Thread(target=self._run, name=self.id, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        self._talk.leave()
        self._thread.join(20)

    def join(self, seconds: float = 60) -> "ToyClient":
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self.id} hangs"
        if self.error is not None:
            raise self.error
        return self

    def _run(self) -> None:
        self._worker = ToyWorker(self.folder, examples=self.examples)
        self._replica = Replica()
        while not self._stop.is_set() and not self.outcome:
            calls = Wire(self.address())
            try:
                self._session(calls)
            except grpc.RpcError as error:
                if error.code() not in (
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.NOT_FOUND,
                    grpc.StatusCode.CANCELLED,
                ):
                    self.error = error
                    return
                time.sleep(0.05)
            finally:
                calls.close()

    def _session(self, calls: Wire) -> None:
        talk = self._talk = Conversation(calls, self.id, rank=self.rank)
        try:
            welcome = talk.enter(self._worker.base_digest, self.examples)
            shared = Shared.from_json(welcome.settings_json)
            member = Member(self.id, welcome.rank, welcome.alpha)
            while not self._stop.is_set():
                message = talk.hear()
                if message.WhichOneof("kind") == "finished":
                    self.outcome = message.finished.outcome
                    return
                self._turn(calls, shared, member, message.task)
        except StopIteration:
            return
        finally:
            talk.leave()

    def _turn(self, calls: Wire, shared: Shared, member: Member, task: pb.Task) -> None:
        job = self._worker.job(shared.method, member, task.round)
        received = fetch(calls, self.id, task, self._replica.version)
        if task.task_id not in self._sent:
            self._sent[task.task_id] = b"".join(work(shared.method, received, job, self._replica))
        assert self._replica.digest == task.state_digest
        self.before_submit(task.round)
        reply = submit(calls, self.id, task, self._sent[task.task_id], weight=self.examples)
        self.replies.append(reply.status)


def fetch(calls: Wire, client_id: str, task: pb.Task, have: int) -> Task:
    """Fetches a broadcast as a client must."""
    frames = calls.fetch(pb.FetchRequest(client_id=client_id, task_id=task.task_id, have=have))
    header = parse_message(pb.FetchHeader, next(frames))
    payload = b"".join(frames)
    assert len(payload) == header.nbytes
    assert hashlib.sha256(payload).hexdigest() == header.sha256
    manifest = manifest_from_proto(header.broadcast)
    update = manifest_from_proto(task.update)
    return Task(task.round, have, header.version, manifest, receive(payload, manifest), update)


def submit(
    calls: Wire, client_id: str, task: pb.Task, payload: bytes, weight: int = 10, **header: Any
) -> pb.SubmitReply:
    """Submits bytes; `header` overrides what the header says about them."""
    fields = {
        "client_id": client_id,
        "task_id": task.task_id,
        "weight": weight,
        "nbytes": len(payload),
        "sha256": sha256([payload]),
        "state_digest": task.state_digest,
        "metrics": {"loss": 1.0},
    }
    first = pb.SubmitHeader(**{**fields, **header}).SerializeToString()
    return calls.submit(iter([first, *cut([payload])]))


def honest(calls: Wire, folder: Path, client_id: str, welcome: pb.Welcome, task: pb.Task) -> bytes:
    """The update that a client with a fresh base would send."""
    shared = Shared.from_json(welcome.settings_json)
    worker, member = ToyWorker(folder), Member(client_id, welcome.rank, welcome.alpha)
    received = fetch(calls, client_id, task, -1)
    return b"".join(work(shared.method, received, worker.job(shared.method, member, task.round), Replica()))


class Served:
    """A coordinator in a thread of this process."""

    def __init__(self, config: Config, patience: Patience) -> None:
        self.config, self.error = config, None
        self.run = open_run(config)
        self._patience = patience
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(20)
        self.address = wait_for_address(config.run.folder, lambda: not self._thread.is_alive())

    def _serve(self) -> None:
        async def main() -> None:
            self.coordinator = Coordinator(self.run, None, self._patience)
            self.loop = asyncio.get_running_loop()
            (self.config.run.folder / "address").unlink(missing_ok=True)
            self._started.set()
            await self.coordinator.serve()

        try:
            asyncio.run(main())
        except Exception as error:
            self.error = error
        finally:
            self.run.close()

    def join(self, seconds: float = 30) -> None:
        """Waits for the run to end; raises what it ended with."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the coordinator hangs"
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.coordinator.stop)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the coordinator does not drain"


class Spawned:
    """A coordinator in a process of its own, which may be killed."""

    def __init__(self, toml: Path, folder: Path, *arguments: str) -> None:
        self.folder = folder
        (folder / "address").unlink(missing_ok=True)
        self.log = (toml.parent / f"{folder.name}.log").open("ab")
        command = [sys.executable, "-m", "fedtune_server", str(toml), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log, env=environment)

    def address(self) -> str:
        return wait_for_address(self.folder, lambda: self.process.poll() is not None)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self.log.close()


def wait_for_address(folder: Path, ended: Callable[[], bool] = lambda: False) -> str:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not ended():
        with contextlib.suppress(OSError):
            if text := (folder / "address").read_text().strip():
                return text
        time.sleep(0.01)
    return (folder / "address").read_text().strip() if (folder / "address").exists() else "127.0.0.1:1"


def write_toml(path: Path, sections: dict[str, dict[str, Any]]) -> Path:
    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, list | tuple):
            return f"[{', '.join(value(part) for part in item)}]"
        return f'"{item}"' if isinstance(item, str | Path) else str(item)

    lines = [f"[{name}]\n" + "".join(f"{k} = {value(v)}\n" for k, v in keys.items()) for name, keys in sections.items()]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture
def sections(tmp_path: Path, toy_folder: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Builds the sections of a configuration; keyword arguments override, `rounds={"count": 5}`."""

    def build(**overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
        base: dict[str, dict[str, Any]] = {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"name": str(toy_folder)},
            "method": {"name": "flora", "rank": 2},
            "rounds": {"count": 1, "min_clients": 1, "grace_s": 2.0},
            "server": {"address": "127.0.0.1:0"},
        }
        return {name: {**base.get(name, {}), **overrides.get(name, {})} for name in {**base, **overrides}}

    return build


@pytest.fixture
def start(sections: Callable[..., dict[str, dict[str, Any]]]) -> Iterator[Callable[..., Served]]:
    """Starts coordinators in this process."""
    running: list[Served] = []

    def begin(patience: Patience | None = None, **overrides: dict[str, Any]) -> Served:
        running.append(Served(parse(sections(**overrides)), patience or Patience()))
        return running[-1]

    yield begin
    for served in running:
        served.stop()


@pytest.fixture
def spawn(tmp_path: Path, sections: Callable[..., dict[str, dict[str, Any]]]) -> Iterator[Callable[..., Spawned]]:
    """Starts coordinators in processes of their own."""
    running: list[Spawned] = []

    def begin(*arguments: str, **overrides: dict[str, Any]) -> Spawned:
        content = sections(**overrides)
        folder = Path(content["run"]["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        running.append(Spawned(write_toml(tmp_path / f"{folder.name}.toml", content), folder, *arguments))
        return running[-1]

    yield begin
    for spawned in running:
        spawned.close()


@pytest.fixture
def connect() -> Iterator[Callable[[str], Wire]]:
    """Opens channels."""
    opened: list[Wire] = []

    def begin(address: str) -> Wire:
        opened.append(Wire(address))
        return opened[-1]

    yield begin
    for calls in opened:
        calls.close()


class Tools:
    """What the tests would import from here if they could."""

    conversation = Conversation
    client = ToyClient
    fetch = staticmethod(fetch)
    submit = staticmethod(submit)
    honest = staticmethod(honest)


@pytest.fixture
def tools() -> Tools:
    return Tools()
