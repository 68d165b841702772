"""A whole run in one process, without sockets: the protocol as a plain loop.

It is what every other runtime is measured against: the same method, base, members and seed give the same state, bit
for bit, as a coordinator with client programs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtune.capability import planned
from fedtune.codecs import raw
from fedtune.errors import ModelError, problem
from fedtune.method import BaseModel, Member, Method
from fedtune.rounds import Replica, Round, Task, admit, begin, receive, work
from fedtune.tensors import Tensors, digest
from fedtune.worker import Worker


@dataclass(frozen=True, slots=True)
class RoundResult:
    """One closed round: the state it led to, its digest, what the clients reported and what the method noted."""

    number: int
    state: Tensors
    digest: str
    weight: int
    metrics: dict[str, dict[str, float]]
    bytes_up: int
    bytes_down: int
    notes: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run."""

    state: Tensors
    rounds: tuple[RoundResult, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the final state."""
        return self.rounds[-1].digest if self.rounds else digest(self.state)


@dataclass
class _Client:
    member: Member
    worker: Worker
    replica: Replica


def simulate(
    method: Method,
    base: BaseModel,
    members: Sequence[Member],
    open_worker: Callable[[Member], Worker],
    rounds: int,
    seed: int,
    on_round: Callable[[RoundResult], None] | None = None,
    plan_s: float = 0.0,
) -> Result:
    """Runs all `rounds` with every member in each of them.

    Args:
        method: what to run.
        base: the base model, as the coordinator sees it.
        members: the clients; ranks and alphas of 0 mean the method's own.
        open_worker: gives each admitted member its model and data.
        rounds: how many.
        seed: of the run; workers must draw from the same one.
        on_round: told of each closed round.
        plan_s: seconds that a round should take each client; workers then measure what they can. 0 plans nothing.

    Raises:
        ModelError: a worker holds another base model.
    """
    state = begin(method, base, seed)
    clients = [_open(admit(method, member), base, open_worker) for member in members]
    if plan_s:
        for client, stated in zip(clients, members, strict=True):
            able = client.worker.measure(method, client.member)
            client.member = planned(method, state, stated, able, plan_s)
    results: list[RoundResult] = []
    for number in range(1, rounds + 1):
        results.append(_play(Round(method, state, number), clients))
        state = results[-1].state
        if on_round:
            on_round(results[-1])
    return Result(state, tuple(results))


def _open(member: Member, base: BaseModel, open_worker: Callable[[Member], Worker]) -> _Client:
    worker = open_worker(member)
    if worker.base_digest != base.digest:
        raise ModelError(problem(f"base model of {member.id}", base.digest, worker.base_digest))
    return _Client(member, worker, Replica())


def _play(current: Round, clients: Sequence[_Client]) -> RoundResult:
    """Plays one round to its end, client after client."""
    up = down = 0
    sent: dict[int, bytes] = {}  # by the version a client starts from: those who lack the same receive the same bytes
    for client in clients:
        task = current.task(client.member, client.replica.version)
        if task.since not in sent:
            sent[task.since] = b"".join(raw.encode(task.payload, task.broadcast))
        payload = b"".join(_turn(current.method, task, sent[task.since], client))
        current.add(client.member, payload, client.worker.examples)
        up, down = up + len(payload), down + task.broadcast.nbytes
    state = current.close()
    metrics = {client.member.id: dict(client.worker.metrics) for client in clients}
    return RoundResult(current.number, state, digest(state), current.weight, metrics, up, down, current.notes())


def _turn(method: Method, task: Task, sent: bytes, client: _Client) -> list[memoryview | bytes]:
    """One client's turn; what it receives passes through bytes, as it would on the wire."""
    received = Task(task.round, task.since, task.version, task.broadcast, receive(sent, task.broadcast), task.update)
    job = client.worker.job(method, client.member, task.round)
    return list(work(method, received, job, client.replica))
