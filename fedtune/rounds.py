"""One round of any method, without sockets, files or clocks.

    Round.task   what a client receives        Round.add    what a client's reply does
    work         the client's whole turn       Round.close  the next version of the state

The gRPC coordinator, the simulation and the Flower strategy call exactly these, so a method written once gives the
same bits in all of them.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fedtune import exact
from fedtune.codecs import raw
from fedtune.errors import ProtocolError, RoundError, WireError, problem
from fedtune.method import BaseModel, ClientJob, Member, Method, links
from fedtune.tensors import Array, Manifest, Tensors, leaf_digest, root_digest

MAX_WEIGHT = exact.MAX_TOTAL_WEIGHT


def begin(method: Method, base: BaseModel, seed: int) -> Tensors:
    """Returns the state of version 0.

    Raises:
        ConfigError: the method does not fit the base, or no update of a usual client fits into its `budget_kb`.
    """
    state = method.init(base, seed)
    for name, link in links(method).items():
        if link.budget_kb:
            link.check(method.template(state, admit(method, Member("client"))), f"method.{name}")
    return state


def admit(method: Method, member: Member) -> Member:
    """Takes a client into a run, with the method's defaults filled in.

    Raises:
        ProtocolError: the method cannot take it.
    """
    if member.depth and not method.takes_depth:
        why = f"A client of {method.name} trains on what others have learned in every block; flora takes any depth"
        raise ProtocolError(problem(f"depth of {member.id}", "0: an adapter in every block", member.depth, why))
    return method.admit(member)


@dataclass(frozen=True, slots=True)
class Task:
    """What one client needs for its turn.

    `since` and `version` say which step of the state `payload` takes the client through; `update` is the manifest
    its reply must fit.
    """

    round: int
    since: int
    version: int
    broadcast: Manifest
    payload: Tensors
    update: Manifest


@dataclass
class Round:
    """The coordinator's half of round number `number` (1, 2, ...), which turns version `number - 1` into `number`."""

    method: Method
    state: Tensors
    number: int
    total: Any = None
    weight: int = 0
    members: list[str] = field(default_factory=list)
    closed: Tensors | None = None

    def task(self, member: Member, since: int = -1) -> Task:
        """Prepares the turn of a client that has version `since` of the state (-1: only the base).

        Raises:
            WireError: there is no such version yet.
        """
        version = self.number - 1
        if not -1 <= since <= version:
            raise WireError(problem("version held by the client", f"-1 to {version}", since))
        received = {} if since == version else dict(self.method.broadcast(self.state, since))
        update = self.method.template(self.state, member)
        return Task(self.number, since, version, Manifest.of(received), received, update)

    def add(self, member: Member, payload: memoryview | bytes, weight: int) -> None:
        """Checks a reply and folds it in; a bad one leaves the round as it was.

        Args:
            member: the client, as admitted.
            payload: the encoded update.
            weight: the client's number of training examples; all of a round together stay below 2**31.

        Raises:
            WireError: the payload or the weight breaks the contract, or this client has replied already.
        """
        if member.id in self.members:
            raise WireError(problem("client", "one update a round", f"a second one from {member.id}"))
        if not 1 <= weight <= MAX_WEIGHT - self.weight:
            raise WireError(problem(f"weight of {member.id}", f"1 to {MAX_WEIGHT - self.weight}", weight))
        self.total = self.method.take(self.total, payload, self.state, member, weight)
        self.weight += weight
        self.members.append(member.id)

    def close(self) -> Tensors:
        """Returns the next version of the state; raises RoundError when nobody replied."""
        if not self.members:
            raise RoundError(problem(f"round {self.number}", "at least one update", "none"))
        self.closed = self.method.finish(self.state, self.total, self.weight)
        return self.closed

    def notes(self) -> dict[str, list[str]]:
        """What the method has to say of how it closed the round, such as whom it left out; nothing before that."""
        return self.method.notes(self.closed, self.total) if self.closed is not None else {}


@dataclass
class Replica:
    """A client's half: which version its model holds, and the digest of every part of the state it has received.

    `known` is what the method has noted while it installed that version.
    """

    version: int = -1
    leaves: dict[str, bytes] = field(default_factory=dict)
    known: dict[str, Array] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the shared state this replica was brought to; equals `tensors.digest` of the coordinator's."""
        return root_digest(self.leaves[name] for name in sorted(self.leaves))

    def install(self, method: Method, task: Task, job: ClientJob) -> None:
        """Brings the client's model to the task's version.

        Raises:
            WireError: the task starts from a version this replica does not hold.
        """
        job.known = self.known
        if self.version == task.version:
            return
        if task.since != self.version:
            raise WireError(problem("task.since", f"the version this client holds ({self.version})", task.since))
        received = method.unpacked(job, task.payload)
        method.install(job, received)
        if method.replaces(received):
            self.leaves.clear()
        self.leaves.update({name: leaf_digest(name, array) for name, array in received.items()})
        self.version = task.version


def work(method: Method, task: Task, job: ClientJob, replica: Replica) -> Iterable[memoryview | bytes]:
    """A client's whole turn: install what came, train, encode.

    Raises:
        WireError: the task does not follow from what `replica` holds, or training gave values that are not finite.
    """
    replica.install(method, task, job)
    return method.encode(method.client_update(job, task.update), task.update)


def job_seed(seed: int, round_number: int, client: str) -> int:
    """Seed of everything one client draws in one round: 63 bits of SHA-256 over run seed, round and client id."""
    return _seed(f"fedtune/job/v1 {seed} {round_number} {client}")


def round_seed(seed: int, round_number: int) -> int:
    """Seed of what all clients of one round draw alike: 63 bits of SHA-256 over run seed and round."""
    return _seed(f"fedtune/round/v1 {seed} {round_number}")


def receive(payload: memoryview | bytes, manifest: Manifest) -> Tensors:
    """Reads what a coordinator broadcast; raises WireError unless it is exactly `manifest`, and finite."""
    return raw.decode(payload, manifest)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


__all__ = ["MAX_WEIGHT", "Replica", "Round", "Task", "admit", "begin", "job_seed", "receive", "round_seed", "work"]
