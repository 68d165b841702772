"""Who is connected, and who was a moment ago."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedtune.errors import FedtuneError
from fedtune.method import Member
from fedtune.wire.v1 import coordinator_pb2 as pb


@dataclass(eq=False)
class Session:
    """One live Join stream.

    `stated` is the client as its own configuration says, `member` as it was admitted. `outbox` ends with None;
    `reason` says why when the coordinator ends it.
    """

    member: Member
    stated: Member
    outbox: "asyncio.Queue[pb.ServerMessage | None]" = field(default_factory=asyncio.Queue)
    ready: bool = False
    examples: int = 0
    offered: str = ""
    progress: pb.Progress = field(default_factory=pb.Progress)
    reason: FedtuneError | None = None
    ended: bool = False

    @property
    def id(self) -> str:
        """The client's id."""
        return self.member.id

    def push(self, message: pb.ServerMessage) -> None:
        """Queues a message for the client."""
        if not self.ended:
            self.outbox.put_nowait(message)

    def end(self, reason: FedtuneError | None = None) -> None:
        """Ends the stream after what is queued."""
        if not self.ended:
            self.ended, self.reason = True, reason
            self.outbox.put_nowait(None)


class Roster:
    """All live sessions; `changed` is called when one comes, goes or turns ready."""

    def __init__(self, changed: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.sessions: dict[str, Session] = {}
        self.known: dict[str, Member] = {}
        self._changed, self._clock = changed, clock
        self._left: dict[str, float] = {}
        self._since = clock()

    def enter(self, session: Session) -> Session | None:
        """Adds a session; returns the one of the same id that it replaces."""
        before = self.sessions.get(session.id)
        self.sessions[session.id] = session
        self.known[session.id] = session.member
        self._changed()
        return before

    def leave(self, session: Session) -> bool:
        """Removes a session; false when another one has replaced it."""
        if self.sessions.get(session.id) is not session:
            return False
        del self.sessions[session.id]
        self._left[session.id] = self._clock()
        self._changed()
        return True

    def set_ready(self, session: Session, examples: int, member: Member) -> None:
        """Marks a session as one that may be selected, as `member`."""
        session.ready, session.examples, session.member = True, examples, member
        self.known[session.id] = member
        self._changed()

    def ready(self) -> list[str]:
        """Ids of the clients that may be selected."""
        return sorted(client for client, session in self.sessions.items() if session.ready)

    def present(self, client: str, return_s: float) -> bool:
        """Whether a client is connected, or left (or this process began) less than `return_s` seconds ago."""
        if client in self.sessions:
            return True
        return self._clock() - self._left.get(client, self._since) < return_s
