"""A node's half of the protocol, without Flower and without sockets: packets in, packets out.

It lives in the resident worker of a SuperNode, or inside a simulation's actor, and keeps what a round need not load
again: the model, the data, and which version of the state the model has been brought to.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from fedtune import __version__, wire
from fedtune.capability import Capability
from fedtune.config import Config, Shared
from fedtune.config.members import member_of
from fedtune.errors import ModelError, ProtocolError, WireError, problem
from fedtune.flower.keeping import Keeping
from fedtune.flower.packets import HELLO, LACK, RESIDENT, TASK, UPDATE, Packet, pack, unpack
from fedtune.flower.settings import Identity
from fedtune.flower.visit import Turn
from fedtune.method import Member
from fedtune.rounds import Replica, Task, admit, receive, work
from fedtune.tensors import Array
from fedtune.wire.convert import capability_to_proto, manifest_from_proto, parse
from fedtune.wire.frames import sha256
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune.worker import OnStep, Worker

OpenWorker: TypeAlias = Callable[[Config, Shared, int | None, OnStep | None], Worker]
"""Opens a node's model and data, as `TorchWorker.open` does."""


@dataclass(frozen=True, slots=True)
class _Order:
    """A task packet, read for one node."""

    welcome: pb.Welcome
    header: pb.FetchHeader
    task: pb.Task
    member: Member
    accepted: int
    payload: memoryview

    @property
    def key(self) -> str:
        """Equal for two orders exactly when the same update answers both."""
        sha = hashlib.sha256(self.task.update.SerializeToString(deterministic=True))
        sha.update(f"{self.welcome.run_id} {self.task.round} {self.task.state_digest} {self.member}".encode())
        return sha.hexdigest()


@dataclass(frozen=True, slots=True)
class _Answer:
    """The last update, with the key of the order it answers and what it leaves behind."""

    key: str = ""
    data: bytes = b""
    kept: bytes = b""


class Station:
    """One node in one run.

    Attributes:
        resident: whether this station outlives the message; the coordinator then sends only what is new.
        kept: what the method keeps between rounds, packed (`keeping`): whoever calls `answer` puts it in before and
            takes it out afterwards.
    """

    def __init__(self, identity: Identity, open_worker: OpenWorker, *, resident: bool, on_step: OnStep | None = None):
        self.resident = resident
        self.kept = b""
        self._identity, self._open, self._on_step = identity, open_worker, on_step
        self._worker: Worker | None = None
        self._able: Capability | None = None
        self._settings = ""
        self._shared: Shared
        self._replica, self._trained = Replica(), 0
        self._keeping = Keeping()
        self._last = _Answer()

    def answer(self, stype: str, turn: Turn, data: memoryview | bytes) -> tuple[str, bytes]:
        """Answers one packet; returns the reply's serialisation type and bytes.

        Raises:
            FedtuneError: the packet is wrong, or the work failed; nothing of it is left in the model.
        """
        if stype == HELLO:
            return self._hello(unpack(data))
        if stype == TASK:
            return self._task(_order(unpack(data), turn))
        raise WireError(problem("packet", f"{HELLO} or {TASK}", stype, "Compare the versions of fedtune"))

    def prepare(self) -> None:
        """Loads model and data, once a hello has said which; called when nobody waits."""
        if self._settings and self._worker is None:
            self._worker = self._open(self._identity.config, self._shared, self._identity.index, self._on_step)

    def _hello(self, packet: Packet) -> tuple[str, bytes]:
        if len(packet.headers) != 1:
            raise WireError(problem("hello", "one header", len(packet.headers)))
        self._agree(parse(pb.Welcome, packet.headers[0]))
        client = self._identity.config.client
        features = [*wire.FEATURES, *([RESIDENT] if self.resident else [])]
        hello = pb.Hello(
            protocol_major=wire.PROTOCOL_MAJOR,
            protocol_minor=wire.PROTOCOL_MINOR,
            software=f"fedtune {__version__}",
            features=features,
            client_id=client.id,
            rank=client.rank,
            alpha=client.alpha,
            depth=client.depth,
        )
        if client.measure and self._shared.method.takes_depth:
            hello.capability.CopyFrom(capability_to_proto(self._measured()))
        return HELLO, pack([hello.SerializeToString()])

    def _measured(self) -> Capability:
        """What this machine can do in this run; measured once."""
        if self._able is None:
            self.prepare()
            method, worker = self._shared.method, self._worker
            if worker is None:
                raise ProtocolError(problem("hello", "the run's settings", "none"))
            self._able = worker.measure(method, admit(method, member_of(self._identity.config.client)))
        return self._able

    def _agree(self, welcome: pb.Welcome) -> None:
        """Takes the run's settings; other settings than before mean another model and other data."""
        if welcome.protocol_major != wire.PROTOCOL_MAJOR:
            got = f"{welcome.protocol_major}.{welcome.protocol_minor}"
            raise ProtocolError(
                problem("protocol", f"{wire.PROTOCOL_MAJOR}.x", got, "Install the same fedtune on both")
            )
        if welcome.settings_json == self._settings:
            return
        shared = Shared.from_json(welcome.settings_json)
        if shared.digest() != welcome.settings_digest:
            raise ProtocolError(problem("settings digest", welcome.settings_digest, shared.digest()))
        self._worker, self._shared, self._settings = None, shared, welcome.settings_json
        self._able = None
        self._replica, self._trained, self._last = Replica(), 0, _Answer()

    def _task(self, order: _Order) -> tuple[str, bytes]:
        self._agree(order.welcome)
        if order.member.id != self._identity.config.client.id:
            raise WireError(problem("task: client", self._identity.config.client.id, order.member.id))
        if self._last.key == order.key:
            self.kept = self._last.kept
            return UPDATE, self._last.data  # asked again because the answer was lost: the same bytes
        self.prepare()
        try:
            return self._turn(order)
        except BaseException:
            self._forget()
            raise

    def _turn(self, order: _Order) -> tuple[str, bytes]:
        worker = self._held(order)
        if order.task.round <= self._trained:
            self._forget()  # a second attempt at a round starts from a clean model, as the first one did
        if order.header.since != self._replica.version:
            if order.header.since != -1:
                return self._lack(order)
            self._forget()
        task = _received(order)
        job = worker.job(self._shared.method, order.member, task.round)
        job.memory.clear()
        job.memory.update(self._recall(order))
        self._replica.install(self._shared.method, task, job)
        if self._replica.digest != order.task.state_digest:
            got = self._replica.digest
            self._forget()
            if order.header.since != -1:
                return self._lack(order)
            raise WireError(problem("state digest", order.task.state_digest, got, "Compare the versions of fedtune"))
        self._trained = task.round
        update = list(work(self._shared.method, task, job, self._replica))
        self._keeping.leave(task.round, job.memory)
        self.kept = self._keeping.to_bytes()
        return self._update(order, worker, update)

    def _recall(self, order: _Order) -> dict[str, Array]:
        """The memory that counts: this process's own, or that of Flower's context when this process is younger."""
        context = Keeping.from_bytes(self.kept, order.welcome.run_id)
        if self._keeping.run_id != context.run_id or self._keeping.round < context.round:
            self._keeping = context
        return self._keeping.settle(order.accepted)

    def _update(self, order: _Order, worker: Worker, update: Iterable[memoryview | bytes]) -> tuple[str, bytes]:
        parts = list(update)
        header = pb.SubmitHeader(
            client_id=order.member.id,
            weight=worker.examples,
            nbytes=sum(memoryview(part).nbytes for part in parts),
            sha256=sha256(parts),
            metrics={name: value for name, value in worker.metrics.items() if math.isfinite(value)},
            state_digest=order.task.state_digest,
        )
        self._last = _Answer(order.key, pack([header.SerializeToString()], parts), self.kept)
        return UPDATE, self._last.data

    def _lack(self, order: _Order) -> tuple[str, bytes]:
        request = pb.FetchRequest(client_id=order.member.id, have=self._replica.version)
        return LACK, pack([request.SerializeToString()])

    def _held(self, order: _Order) -> Worker:
        """The open worker, after its base has been found to be the run's."""
        worker = self._worker
        if worker is None or worker.base_digest != order.welcome.base_digest:
            got = worker.base_digest if worker else "none"
            remedy = "This node holds other weights than the coordinator"
            raise ModelError(problem("base model", order.welcome.base_digest, got, remedy))
        return worker

    def _forget(self) -> None:
        """Puts model and replica back to the base."""
        if self._worker is not None:
            self._worker.reset()
        self._replica = Replica()


def _order(packet: Packet, turn: Turn) -> _Order:
    """Reads a task packet; raises WireError when it is not one, or holds no task for this node."""
    if len(packet.headers) < 3:
        raise WireError(problem("task", "at least three headers", len(packet.headers)))
    try:
        member = Member(str(turn["client"]), int(turn["rank"]), float(turn["alpha"]), int(turn["depth"]))
        shape, accepted = int(turn["shape"]), int(turn["accepted"])
    except (KeyError, ValueError) as error:
        raise WireError(problem("turn", "client, rank, alpha, depth, shape and accepted", error)) from error
    if not 0 <= shape < len(packet.headers) - 2:
        raise WireError(problem("turn: shape", f"0 to {len(packet.headers) - 3}", shape))
    welcome, header = parse(pb.Welcome, packet.headers[0]), parse(pb.FetchHeader, packet.headers[1])
    return _Order(welcome, header, parse(pb.Task, packet.headers[2 + shape]), member, accepted, packet.payload)


def _received(order: _Order) -> Task:
    """Checks what came against its header and turns it into the task that `work` takes."""
    header = order.header
    if header.version != order.task.version or header.nbytes != order.payload.nbytes:
        want = f"version {order.task.version} in {header.nbytes} bytes"
        raise WireError(problem("task", want, f"version {header.version} in {order.payload.nbytes} bytes"))
    if sha256([order.payload]) != header.sha256:
        raise WireError(problem("task: SHA-256", header.sha256[:64], sha256([order.payload])))
    manifest = manifest_from_proto(header.broadcast)
    update = manifest_from_proto(order.task.update)
    payload = receive(order.payload, manifest)
    return Task(order.task.round, header.since, header.version, manifest, payload, update)
