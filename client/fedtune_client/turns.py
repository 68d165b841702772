"""The client's turns: one thread that fetches, trains, stores and submits, one task at a time.

It works on the newest task only. A task of a later round makes the one in hand stale: its training ends at the next
step and its result is dropped, since that round has closed without it.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import grpc

from fedtune import wire
from fedtune.allocator import release
from fedtune.config import Shared
from fedtune.errors import UnavailableError, WireError, problem
from fedtune.method import ClientJob, Member
from fedtune.rounds import Replica, Task, work
from fedtune.tensors import Manifest
from fedtune.wire.convert import manifest_from_proto
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune.worker import Worker
from fedtune_client.log import Log
from fedtune_client.outbox import Key, Outbox, Update
from fedtune_client.retry import Backoff, error_of
from fedtune_client.transfer import Transfer

T = TypeVar("T")
Gate = Callable[[], AbstractContextManager[object]]

_CLOSED_TRIES = 3
_REFUSED = (grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.INVALID_ARGUMENT)


class Abandoned(Exception):  # noqa: N818  # not an error: the work in hand is no longer wanted
    """The run or the round is over for this client."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the coordinator's welcome settled; a task may say that `member` trains otherwise."""

    run_id: str
    shared: Shared
    base_digest: str
    member: Member


class Turns:
    """Takes tasks from the session and works through them in a thread of its own."""

    def __init__(
        self,
        terms: Terms,
        worker: Worker,
        transfer: Transfer,
        outbox: Outbox,
        log: Log,
        *,
        gate: Gate,
        cap_s: float,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._terms, self._worker, self._transfer, self._outbox, self._log = terms, worker, transfer, outbox, log
        self._gate, self._cap_s, self._failed = gate, cap_s, failed
        self._replica, self._trained = Replica(), 0
        self._changed = threading.Condition()
        self._current: pb.Task | None = None
        self._next: pb.Task | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._loop, name="fedtune-turns", daemon=True)
        self._thread.start()

    @property
    def stale(self) -> bool:
        """Whether the task in hand is no longer wanted; read by the training loop at every step."""
        return self._ended or self._next is not None

    @property
    def round(self) -> int:
        """Round of the task in hand; 0 when there is none."""
        current = self._current
        return current.round if current else 0

    def give(self, task: pb.Task) -> None:
        """Takes a task. The same turn under a new task id goes on where it is."""
        with self._changed:
            if self._current is not None and _same_turn(self._current, task):
                self._current, self._next = task, None
            else:
                self._next = task
            self._changed.notify_all()

    def end(self, timeout_s: float) -> bool:
        """Asks the thread to end; returns whether it did."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        try:
            while task := self._take():
                try:
                    self._turn(task)
                except Abandoned:
                    self._log.event("turn_abandoned", f"round {task.round}: abandoned", round=task.round)
        except BaseException as error:  # handed to the session, which decides and reports
            self._failed(error)

    def _take(self) -> pb.Task | None:
        """Waits for a task; None when the run is over."""
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._ended or self._next is not None)
            self._current, self._next = self._next, None
            return None if self._ended else self._current

    def _turn(self, task: pb.Task) -> None:
        self._settle(task)
        self._outbox.keep_only(self._terms.run_id, task.round)
        key = self._key(task)
        update = self._outbox.find(key)
        if update:
            self._log.event("update_found", f"round {task.round}: trained already, sending again", round=task.round)
        else:
            update = self._train(task, key)
            release()
        self._submit(update)
        release()

    def _settle(self, task: pb.Task) -> None:
        """Finds out what became of earlier updates whose answer was lost: an accepted one has changed the memory."""
        for update in self._outbox.unsettled(self._terms.run_id, task.round):
            if self._persist(partial(self._was_taken, update)):
                self._outbox.accepted(update)
                self._log.event("update_settled", round=update.key.round)

    def _was_taken(self, update: Update) -> bool:
        """Offers an update of a closed round again: the coordinator still knows the bytes that it took."""
        try:
            return self._transfer.submit(update.task_id, update).status == pb.SUBMIT_STATUS_ACCEPTED
        except grpc.RpcError as error:
            if isinstance(error, grpc.Call) and error.code() in _REFUSED:
                return False
            raise

    def _train(self, message: pb.Task, key: Key) -> Update:
        """Brings the model to the task's version, trains, and puts the encoded update into the outbox."""
        job = self._worker.job(self._terms.shared.method, self._member(message), message.round)
        job.memory.clear()
        job.memory.update(self._outbox.memory(self._terms.run_id))
        self._log.event("task", f"round {message.round}: training", round=message.round, version=message.version)
        if message.round <= self._trained:
            self._forget()  # a second attempt at a round starts from a clean model, as the first one did
        task = self._install(message, job)
        with self._gate():
            self._go_on()
            encoded = self._work(task, job)
        weight, metrics = self._worker.examples, _finite(self._worker.metrics)
        update = self._outbox.store(key, message.task_id, encoded, weight, metrics, job.memory)
        self._log.event("trained", round=message.round, nbytes=update.nbytes, metrics=update.metrics)
        return update

    def _work(self, task: Task, job: ClientJob) -> Iterable[memoryview | bytes]:
        self._trained = task.round
        try:
            return work(self._terms.shared.method, task, job, self._replica)
        except Abandoned:
            self._forget()  # training was cut short and may have left the model half changed
            raise

    def _install(self, message: pb.Task, job: ClientJob) -> Task:
        """Fetches and installs; a replica that does not match is rebuilt from the base, once."""
        if self._replica.version > message.version:
            self._forget()
        for repair in (False, True):
            task = self._receive(message)
            with self._gate():
                self._go_on()
                self._replica.install(self._terms.shared.method, task, job)
            if self._replica.digest == message.state_digest:
                return task
            if not repair:
                text = f"round {message.round}: this replica differs from the coordinator's state; fetching it anew"
                self._log.event("replica_differs", text, got=self._replica.digest, want=message.state_digest)
            got = self._replica.digest
            self._forget()
        remedy = "The state was fetched anew and differs again; compare the versions of fedtune on both sides"
        raise WireError(problem("state digest", message.state_digest, got, remedy))

    def _receive(self, message: pb.Task) -> Task:
        """Fetches what this replica lacks, which may be nothing."""
        have = self._replica.version
        if have == message.version:
            update = manifest_from_proto(message.update)
            return Task(message.round, have, have, Manifest(()), {}, update)
        return self._persist(lambda: self._transfer.fetch(self._now(), have))

    def _submit(self, update: Update) -> None:
        """Sends until the coordinator has answered, and again when it has asked anew meanwhile."""
        reply = pb.SubmitReply()
        asked = True
        while asked:
            task_id, reply = self._persist(lambda: self._send(update))
            with self._changed:
                asked = self._current is not None and self._current.task_id != task_id
                if not asked:
                    self._current = None
        number = update.key.round
        if reply.status == pb.SUBMIT_STATUS_ACCEPTED:
            self._outbox.accepted(update)
            text = f"round {number}: update accepted ({update.nbytes} bytes)"
            self._log.event("update_accepted", text, round=number, nbytes=update.nbytes)
        else:  # kept until a later round begins: another attempt at this one would ask for it again
            self._log.event("update_late", f"round {number}: not needed any more. {reply.message}", round=number)

    def _send(self, update: Update) -> tuple[str, pb.SubmitReply]:
        """Sends once; returns the answer and the id of the task it was sent for."""
        task = self._now()
        try:
            return task.task_id, self._transfer.submit(task.task_id, update)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code is grpc.StatusCode.ALREADY_EXISTS:
                return task.task_id, pb.SubmitReply(status=pb.SUBMIT_STATUS_LATE, message=str(error_of(error)))
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                self._outbox.remove(update)  # it will never be taken, so a restart must not find it
            raise

    def _persist(self, call: Callable[[], T]) -> T:
        """Repeats a call until it succeeds, fails for good, or is no longer wanted."""
        backoff = Backoff(self._cap_s)
        while True:
            self._go_on()
            try:
                return call()
            except ValueError:
                self._go_on()  # the channel was closed under the call, or something is wrong indeed
                raise
            except grpc.RpcError as raised:
                self._go_on()
                error = error_of(raised)
                if _closed(raised) and backoff.tries >= _CLOSED_TRIES:
                    raise Abandoned from raised
                if not isinstance(error, UnavailableError):
                    raise error from raised
                self._log.event("call_failed", reason=str(error), tries=backoff.tries + 1)
            with self._changed:
                self._changed.wait_for(lambda: self.stale, backoff.next_s())

    def _now(self) -> pb.Task:
        """The task in hand, with its newest id."""
        if self._current is None:
            raise Abandoned
        return self._current

    def _go_on(self) -> None:
        if self.stale:
            raise Abandoned

    def _forget(self) -> None:
        """Puts model and replica back to the base."""
        self._worker.reset()
        self._replica = Replica()

    def _member(self, task: pb.Task) -> Member:
        """What this client trains as in this round."""
        if not task.HasField("member"):
            return self._terms.member
        said = task.member
        return replace(self._terms.member, rank=said.rank, alpha=said.alpha, depth=said.depth)

    def _key(self, task: pb.Task) -> Key:
        member = self._member(task)
        template = hashlib.sha256(task.update.SerializeToString(deterministic=True)).hexdigest()
        return Key(self._terms.run_id, task.round, task.state_digest, template, member.rank, member.alpha)


def _closed(error: grpc.RpcError) -> bool:
    """Whether the coordinator says that the task's round is closed."""
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.NOT_FOUND


def _same_turn(one: pb.Task, other: pb.Task) -> bool:
    return (one.round, one.version, one.state_digest) == (other.round, other.version, other.state_digest)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    return dict(list(numbers.items())[: wire.MAX_METRICS])
