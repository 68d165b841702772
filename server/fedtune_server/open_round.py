"""The round that is being worked on: its rows mirrored in memory, and the running total of its updates."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedtune.errors import WireError
from fedtune.method import Method
from fedtune.rounds import Round
from fedtune.rules import View
from fedtune.tensors import Tensors
from fedtune_server.blobs import Blobs
from fedtune_server.records import RoundRow, TaskRow, UpdateRow


@dataclass(eq=False)
class OpenRound:
    """An open round.

    `began` and `quorum_at` are readings of the monotonic clock: a restarted coordinator starts the attempt's deadline
    anew, so a clock that jumps cannot end a round. `pending` holds a future per update on its way into the log.
    """

    row: RoundRow
    tasks: dict[str, TaskRow]
    updates: dict[str, UpdateRow]
    began: float
    total: "Total"
    quorum_at: float | None = None
    closing: bool = False
    pending: dict[str, "asyncio.Future[None]"] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    created: float = field(default_factory=time.monotonic)

    @property
    def number(self) -> int:
        """The round's number."""
        return self.row.round

    def outstanding(self) -> list[str]:
        """Clients that have a task and no accepted update."""
        return [client for client in self.row.selected if client not in self.updates]

    def view(self, now: float, present: Callable[[str], bool]) -> View:
        """Returns what the rules need to know."""
        return View(
            target=self.row.target,
            accepted=len(self.updates),
            outstanding=sum(present(client) for client in self.outstanding()) + len(self.pending.keys() - self.updates),
            elapsed_s=now - self.began,
            since_quorum_s=None if self.quorum_at is None else now - self.quorum_at,
            attempt=self.row.attempt,
        )

    def extend(self, tasks: Iterable[TaskRow]) -> RoundRow:
        """Returns the row with more clients selected; nothing changes yet."""
        return replace(self.row, selected=tuple(sorted({*self.row.selected, *(task.member.id for task in tasks)})))


Tasks = Mapping[str, TaskRow]


class Total:
    """The updates of one round, folded as they come.

    It is a cache of the log: `matches` says whether it holds exactly the accepted updates, and `rebuild` makes it so.
    """

    def __init__(self, method: Method, state: Tensors, number: int, blobs: Blobs) -> None:
        self._method, self._state, self._number, self._blobs = method, state, number, blobs
        self._round: Round | None = None

    def add(self, task: TaskRow, payload: memoryview, weight: int, accepted: Iterable[UpdateRow], tasks: Tasks) -> None:
        """Decodes, checks and folds one update; raises WireError and changes nothing when it is not what it must be."""
        if self._round is None:
            self._round = self._folded(accepted, tasks)
        try:
            self._round.add(task.member, payload, weight)
        except WireError:
            raise
        except Exception:
            self.forget()  # an accident, out of memory say, may strike in the middle of a sum
            raise

    def close(self, accepted: Iterable[UpdateRow], tasks: Tasks) -> Tensors:
        """Returns the next version of the state: a function of the accepted updates alone."""
        rows = list(accepted)
        if self._round is None or sorted(self._round.members) != sorted(row.client for row in rows):
            self._round = self._folded(rows, tasks)
        return self._round.close()

    def notes(self) -> dict[str, list[str]]:
        """What the method has to say of the updates it was closed with."""
        return self._round.notes() if self._round else {}

    def forget(self) -> None:
        """Drops the total, after an update that was folded could not be recorded."""
        self._round = None

    def _folded(self, accepted: Iterable[UpdateRow], tasks: Tasks) -> Round:
        folded = Round(self._method, self._state, self._number)
        for row in sorted(accepted, key=lambda row: row.client):
            folded.add(tasks[row.client].member, self._blobs.load(row.digest), row.weight)
        return folded
