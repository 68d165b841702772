"""The rounds of a run: starts them, takes updates into them, closes them.

Everything here runs on the event loop, so plain attributes are safe; arithmetic, hashing and the disk run on threads.
The log comes first: a task is recorded before it is sent, an update before it is acknowledged, a round before the next
one starts. After kill -9 the same object is built again from the log and goes on.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from fedtune import rules
from fedtune.errors import RoundError, StorageError, problem
from fedtune.method import Member
from fedtune.selection import asked, select
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune_server import closing, records
from fedtune_server.blobs import Draft
from fedtune_server.intake import same, take, task_message
from fedtune_server.metrics import Metrics
from fedtune_server.open_round import OpenRound, Total
from fedtune_server.records import RoundRow, TaskRow, UpdateRow
from fedtune_server.roster import Roster, Session
from fedtune_server.run import COMPLETED, FAILED, Run

T = TypeVar("T")
TICK_S = 0.5
WAITING_S = 10.0
"""Seconds without enough clients after which the log says so."""
RETURN_S = 5.0
"""Seconds that a client whose connection broke (or who has yet to find a restarted coordinator) counts as here."""


class Engine:
    """Drives one run to its end."""

    def __init__(self, run: Run, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.metrics = run, metrics
        self.open: OpenRound | None = None
        self._clock = clock
        self._changed = asyncio.Event()
        self._began = clock()
        self._waits_since: float | None = None
        self._rounds = run.config.rounds
        self.roster = Roster(self._changed.set, clock)
        self._returning: tuple[str, ...] = ()
        self.return_s = min(RETURN_S, self._rounds.grace_s)

    @property
    def phase(self) -> str:
        """`waiting`, `training`, `finished` or `failed`."""
        if self.run.outcome:
            return "finished" if self.run.outcome == COMPLETED else "failed"
        return "training" if self.open else "waiting"

    @property
    def round_number(self) -> int:
        """The round that is open or comes next; the last one when the run is complete."""
        return min(self.run.version.number + 1, self._rounds.count)

    @property
    def cohort(self) -> tuple[str, ...]:
        """The clients selected for the latest round."""
        return self.open.row.selected if self.open else self._returning

    def resume(self) -> None:
        """Takes up what the log holds; raises StorageError when it cannot be read.

        A round that used up its attempts, and with it the run, gets all of them again.
        """
        store = self.run.store
        row = store.call(records.read_round)
        if row is None:
            return
        self._returning = row.selected
        updates = store.call(records.read_updates(row.round))
        if row.round == self.run.version.number + 1:
            self.open = self._opened(row, store.call(records.read_tasks(row.round)), updates)
            self._note_quorum(self.open)
            if self.run.outcome == FAILED:
                self.open.row = replace(row, attempt=0)
                self.run.set_meta(outcome="")
        keep = {blob for blob, _ in self.run.version.row.tensors.values()}
        self.run.blobs.sweep(keep | ({u.digest for u in updates.values()} if self.open else set()), drafts=True)

    async def drive(self) -> None:
        """Returns when every round is closed; raises RoundError when a round has used up its attempts."""
        while not self.run.complete:
            self._changed.clear()
            pause = await self._step()
            if pause > 0:
                await self._sleep(min(pause, TICK_S))
        await self.insist(lambda: asyncio.to_thread(closing.complete, self.run))

    async def _step(self) -> float:
        """Does what is due; returns how long nothing will be."""
        if self.open is None:
            return await self._start() if self._may_start() else TICK_S
        if self.open.row.attempt == 0:
            if not self._may_start():
                return TICK_S
            await self._retry(self.open)
        view = self.open.view(self._clock(), lambda client: self.roster.present(client, self.return_s))
        move = rules.decide(view, self._rounds)
        if move is rules.Move.WAIT:
            return rules.wait_s(view, self._rounds)
        if move is rules.Move.CLOSE:
            await self.insist(self._close)
        elif move is rules.Move.RETRY:
            await self._retry(self.open)
        else:
            await self._fail(self.open, view)
        return 0

    def _may_start(self) -> bool:
        """Enough clients are ready, and those of the round before have had time to find a restarted coordinator."""
        ready = self.roster.ready()
        back = set(self._returning) <= set(ready) or self._clock() - self._began >= self.return_s
        enough = len(ready) >= rules.needed(self._rounds) and back
        self._note_waiting(len(ready), enough)
        return enough

    def _note_waiting(self, ready: int, enough: bool) -> None:
        """Says once, after a while, that a round waits for clients."""
        if enough:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = self._clock()
        elif self._clock() - self._waits_since >= WAITING_S:
            self._waits_since = math.inf  # it has been said
            self.run.events.emit("waiting", round=self.round_number, clients=rules.needed(self._rounds), ready=ready)

    async def _start(self) -> float:
        ready, number = self.roster.ready(), self.run.version.number + 1
        target = self._rounds.clients or len(ready)
        chosen = select(self.run.shared.seed, number, 1, ready, asked(target, self._rounds.over_select))
        row = RoundRow(number, 1, "open", target, chosen, time.time())
        tasks = {client: self._task(number, 1, self.roster.known[client]) for client in chosen}
        await self.insist(lambda: self._record(row, tasks.values()))
        self._returning = chosen
        self._announce(self._opened(row, tasks, {}))
        return 0

    async def _retry(self, work: OpenRound) -> None:
        """Another attempt at the same round: what was accepted stays, the rest is drawn anew among who is here."""
        ready, number, attempt = self.roster.ready(), work.number, work.row.attempt + 1
        free = sorted(set(ready) - work.updates.keys())
        target = self._rounds.clients or max(self._rounds.min_clients, len(free) + len(work.updates))
        count = max(0, asked(target, self._rounds.over_select) - len(work.updates))
        chosen = select(self.run.shared.seed, number, attempt, free, count)
        row = RoundRow(number, attempt, "open", target, tuple(sorted({*chosen, *work.updates})), time.time())
        tasks = {c: work.tasks.get(c) or self._task(number, attempt, self.roster.known[c]) for c in chosen}
        await self.insist(lambda: self._record(row, tasks.values()))
        work.row, work.began = row, self._clock()
        work.tasks.update(tasks)
        self._note_quorum(work)
        self._announce(work)

    async def _fail(self, work: OpenRound, view: rules.View) -> None:
        want = f"{rules.quorum_of(self._rounds, view.target)} updates within {self._rounds.deadline_s:g} s"
        remedy = "Start more clients, or change rounds.deadline_s, rounds.quorum or rounds.attempts, and start it again"
        text = problem(f"round {work.number}", want, f"{view.accepted} in each of {view.attempt} attempts", remedy)
        self.run.events.emit("round_failed", round=work.number, attempt=view.attempt, accepted=view.accepted)
        await self.insist(lambda: asyncio.to_thread(self.run.set_meta, outcome=FAILED))
        self.run.events.emit("run_finished", outcome=FAILED, digest=self.run.version.digest, rounds=work.number - 1)
        raise RoundError(text)

    async def offer(self, session: Session) -> None:
        """Gives a client that has just become ready its task, if the open round has one for it."""
        while (work := self.open) is not None and session.id in work.pending:
            await asyncio.wait([work.pending[session.id]])
        if work is None or work.closing or session.id in work.updates:
            return
        task = work.tasks.get(session.id) if session.id in work.row.selected else None
        if task is None and not self._wants_more(work):
            return
        if task is None or task.member != session.member:
            task = replace(task, member=session.member) if task else self._newcomer(work, session)
            work.row = work.extend([task])
            work.tasks[session.id] = task
            await self._record(work.row, [task])
        self._push(work, session)

    def _newcomer(self, work: OpenRound, session: Session) -> TaskRow:
        return self._task(work.number, work.row.attempt, session.member)

    def _wants_more(self, work: OpenRound) -> bool:
        """From the second attempt on, a round that lacks clients takes those who come."""
        here = sum(self.roster.present(client, 0) for client in work.outstanding())
        return work.row.attempt > 1 and len(work.updates) + here < work.row.target

    def _announce(self, work: OpenRound) -> None:
        self.open = work
        row = work.row
        self.run.events.emit("round_started", round=row.round, attempt=row.attempt, selected=list(row.selected))
        for client in row.selected:
            session = self.roster.sessions.get(client)
            if session is not None and session.ready and client not in work.updates:
                self._push(work, session)

    def _push(self, work: OpenRound, session: Session) -> None:
        task = work.tasks[session.id]
        if session.offered == task.task_id or task.member != session.member:
            return
        remaining_s = max(0.0, self._rounds.deadline_s - (self._clock() - work.began))
        session.offered = task.task_id
        session.push(task_message(self.run, task, remaining_s))
        self.run.events.emit("task_pushed", round=task.round, client=session.id)

    def task_of(self, client: str, task_id: str) -> TaskRow | None:
        """Returns the open task of this client and id, or None when the round is closed or never had it."""
        task = self.open.tasks.get(client) if self.open and not self.open.closing else None
        return task if task is not None and secrets.compare_digest(task.task_id.encode(), task_id.encode()) else None

    async def accept(self, task: TaskRow, header: pb.SubmitHeader, draft: Draft) -> bool:
        """Takes a complete update into the round; false when the round closed meanwhile.

        Raises:
            DuplicateError: another update of this client is part of the round.
            WireError: the update is not what it must be.
            StorageError: the disk refused; the client may send it again.
        """
        client = task.member.id
        while (work := self.open) is not None and client in work.pending:
            await asyncio.wait([work.pending[client]])
        if work is None or work.closing or work.tasks.get(client) != task:
            return False
        if client in work.updates:
            return same(work.updates[client], header)
        done = work.pending[client] = asyncio.get_running_loop().create_future()
        try:
            await take(self.run, work, task, header, draft, self.metrics)
            self._note_quorum(work)
        finally:
            del work.pending[client]
            done.set_result(None)
            self._changed.set()
        return True

    async def _close(self) -> None:
        work = self.open
        if work is None:
            return
        work.closing = True
        while work.pending:
            await asyncio.wait(list(work.pending.values()))
        version = await asyncio.to_thread(closing.close, self.run, work)
        self.run.version, self.open = version, None
        for session in self.roster.sessions.values():
            session.progress = pb.Progress()

    async def insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Repeats a step until the disk takes it. Meanwhile the run is unhealthy, and nothing is lost."""
        pause = 0.5
        while True:
            try:
                value = await step()
                self.run.healthy = True
                return value
            except StorageError as error:
                self.run.healthy = False
                self.run.events.emit("storage_failed", reason=str(error), retry_s=pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 10.0)

    async def _record(self, row: RoundRow, tasks: Iterable[TaskRow]) -> None:
        await self.run.store.commit(records.write_round(row, list(tasks)))

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return

    def _opened(self, row: RoundRow, tasks: dict[str, TaskRow], updates: dict[str, UpdateRow]) -> OpenRound:
        total = Total(self.run.shared.method, self.run.version.state, row.round, self.run.blobs)
        return OpenRound(row, tasks, updates, self._clock(), total)

    def _task(self, number: int, attempt: int, member: Member) -> TaskRow:
        return TaskRow(number, attempt, secrets.token_hex(16), member)

    def _note_quorum(self, work: OpenRound) -> None:
        reached = len(work.updates) >= rules.quorum_of(self._rounds, work.row.target)
        work.quorum_at = (work.quorum_at or self._clock()) if reached else None
