"""Join and Status: who a client is, whether it fits the run, and what there is to do."""

import asyncio
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict

import grpc
import grpc.aio
from google.protobuf.message import Message

from fedtune import __version__
from fedtune.capability import planned
from fedtune.errors import FedtuneError, ModelError, ProtocolError, UnavailableError, WireError, problem
from fedtune.method import Member
from fedtune.rounds import admit
from fedtune.wire import CLIENT_ID, FEATURES, PROTOCOL_MAJOR, PROTOCOL_MINOR
from fedtune.wire.convert import capability_from_proto
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune_server import records
from fedtune_server.engine import Engine
from fedtune_server.guard import Context, Patience, SilentError
from fedtune_server.ledger import CONTROL, DOWN, UP
from fedtune_server.listen import check_identity
from fedtune_server.roster import Session
from fedtune_server.run import COMPLETED, Run


class ReplacedError(FedtuneError):
    """Another connection took this client's place."""


class Control:
    """The two calls that carry messages."""

    def __init__(self, run: Run, engine: Engine, patience: Patience) -> None:
        self._run, self._engine, self._patience = run, engine, patience
        self._told: set[str] = set()
        self.draining = False

    def dismiss_all(self, message: str = "") -> None:
        """Tells every client that the run is over, and ends its stream."""
        for session in self._engine.roster.sessions.values():
            self._dismiss(session, message)

    def drain(self) -> None:
        """Ends every stream because this process stops; clients come back to the next one."""
        self.draining = True
        for session in self._engine.roster.sessions.values():
            session.end(UnavailableError("The coordinator is shutting down"))

    def untold(self, clients: Iterable[str], return_s: float) -> bool:
        """Whether one of `clients` is here, or was a moment ago, and has not heard yet that the run is over."""
        return any(c not in self._told and self._engine.roster.present(c, return_s) for c in clients)

    async def join(self, context: Context) -> None:
        """Serves one client's stream until it hangs up, is replaced, or the run ends."""
        if self.draining:
            raise UnavailableError("The coordinator is shutting down")
        hello = (await self._read(context, "hello", self._patience.hello_s)).hello
        stated = self._stated(hello, context)
        session = Session(admit(self._run.shared.method, stated), stated)
        self._note(session.id, UP, hello)
        before = self._engine.roster.enter(session)
        if before is not None:
            before.end(ReplacedError(f"Another program joined as {session.id}; each client needs an id of its own"))
        self._run.events.emit("client_joined", **session.member.described(), software=_shown(hello))
        try:
            session.push(pb.ServerMessage(welcome=self._welcome(session.member)))
            if self._run.outcome:
                self._dismiss(session)
            await self._talk(context, session)
        finally:
            session.ended = True
            if self._engine.roster.leave(session):
                self._run.events.emit("client_left", client=session.id)

    def status(self) -> pb.StatusReply:
        """Describes the run."""
        run, engine = self._run, self._engine
        return pb.StatusReply(
            run_id=run.run_id,
            name=run.config.run.name,
            phase=engine.phase,
            round=engine.round_number,
            rounds=run.config.rounds.count,
            clients=[self._client(member) for _, member in sorted(engine.roster.known.items())],
            bytes_up=run.book.total(UP),
            bytes_down=run.book.total(DOWN),
        )

    def _dismiss(self, session: Session, message: str = "") -> None:
        outcome = pb.OUTCOME_COMPLETED if self._run.outcome == COMPLETED else pb.OUTCOME_FAILED
        session.push(pb.ServerMessage(finished=pb.Finished(outcome=outcome, message=message)))
        session.end()
        self._told.add(session.id)

    async def _talk(self, context: Context, session: Session) -> None:
        """Reads and writes side by side; the first to end ends both."""
        tasks = [
            asyncio.create_task(self._listen(context, session)),
            asyncio.create_task(self._speak(context, session)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        if isinstance(session.reason, ReplacedError):
            await context.abort(grpc.StatusCode.ABORTED, str(session.reason))
        if session.reason is not None:
            raise session.reason

    async def _listen(self, context: Context, session: Session) -> None:
        ready = (await self._read(context, "ready", self._patience.ready_s)).ready
        self._note(session.id, UP, ready)
        self._fits(ready, session.member)
        if session.ended:
            return
        self._run.events.emit("client_ready", client=session.id, examples=ready.examples)
        self._engine.roster.set_ready(session, ready.examples, await self._planned(session, ready))
        await self._engine.offer(session)
        while (message := await context.read()) is not grpc.aio.EOF:
            if not isinstance(message, pb.ClientMessage) or message.WhichOneof("kind") != "progress":
                raise WireError(problem(f"message of {session.id}", "progress", "another kind"))
            self._note(session.id, UP, message)
            session.progress = message.progress

    async def _speak(self, context: Context, session: Session) -> None:
        while (message := await session.outbox.get()) is not None:
            self._note(session.id, DOWN, message)
            await context.write(message)

    async def _read(self, context: Context, kind: str, seconds: float) -> pb.ClientMessage:
        try:
            message = await asyncio.wait_for(context.read(), seconds)
        except TimeoutError:
            raise SilentError(problem("first messages", f"{kind} within {seconds:g} s", "nothing")) from None
        if message is grpc.aio.EOF:
            raise UnavailableError(f"the client hung up before its {kind}")
        if not isinstance(message, pb.ClientMessage) or message.WhichOneof("kind") != kind:
            raise WireError(problem("first messages", kind, "another kind of message"))
        return message

    async def _planned(self, session: Session, ready: pb.Ready) -> Member:
        """The client with the adapter planned for it: the one of before, if it was here and asked for the same."""
        seconds, stated = self._run.config.rounds.plan_s, session.stated
        if not seconds or stated.depth or not ready.HasField("capability"):
            return session.member
        able = capability_from_proto(ready.capability)
        member = planned(self._run.shared.method, self._run.version.state, stated, able, seconds)
        asked = json.dumps([stated.rank, stated.alpha, seconds])
        member = await self._engine.insist(lambda: self._run.store.commit(records.keep_plan(stated.id, asked, member)))
        predicted = able.seconds.of(member.depth, member.rank)
        self._run.events.emit("client_planned", **member.described(), seconds=predicted, capability=asdict(able))
        return member

    def _stated(self, hello: pb.Hello, context: Context) -> Member:
        """Checks who is there; returns the client as it says."""
        if hello.protocol_major != PROTOCOL_MAJOR:
            want = f"{PROTOCOL_MAJOR}.x, as fedtune {__version__} speaks"
            got = f"{hello.protocol_major}.{hello.protocol_minor} from {_shown(hello)}"
            raise ProtocolError(problem("protocol", want, got, "Install the same version of fedtune on both sides"))
        if not re.fullmatch(CLIENT_ID, hello.client_id):
            raise WireError(problem("client.id", "1 to 64 of a-z, 0-9 and - inside", repr(hello.client_id[:80])))
        missing = sorted(set(FEATURES) - set(hello.features))
        if missing:
            raise ProtocolError(
                problem("features", ", ".join(FEATURES), f"no {', '.join(missing)}", "Update the client")
            )
        if not (math.isfinite(hello.alpha) and hello.alpha >= 0):
            raise WireError(problem("client.alpha", "a finite number, at least 0", hello.alpha))
        check_identity(context, hello.client_id)
        return Member(hello.client_id, hello.rank, hello.alpha, hello.depth)

    def _fits(self, ready: pb.Ready, member: Member) -> None:
        """Checks that the client understood the settings and loaded the same weights."""
        digest = self._run.shared.digest()
        if ready.settings_digest != digest:
            remedy = "Install the same version of fedtune on both sides"
            raise ProtocolError(problem(f"settings of {member.id}", digest, ready.settings_digest[:64], remedy))
        if ready.base_digest != self._run.base.digest:
            want, got = f"SHA-256 {self._run.base.digest} ({self._run.base.name})", ready.base_digest[:64]
            raise ModelError(
                problem(f"base model of {member.id}", want, got, "Use the coordinator's model and revision")
            )
        if ready.examples < 1:
            raise ProtocolError(problem(f"examples of {member.id}", "at least 1", 0, "Check the client's [data]"))

    def _welcome(self, member: Member) -> pb.Welcome:
        return pb.Welcome(
            protocol_major=PROTOCOL_MAJOR,
            protocol_minor=PROTOCOL_MINOR,
            features=FEATURES,
            run_id=self._run.run_id,
            settings_json=self._run.shared.to_json(),
            settings_digest=self._run.shared.digest(),
            base_digest=self._run.base.digest,
            rank=member.rank,
            alpha=member.alpha,
        )

    def _client(self, member: Member) -> pb.ClientStatus:
        engine, session = self._engine, self._engine.roster.sessions.get(member.id)
        work, progress = engine.open, session.progress if session else pb.Progress()
        state = "idle" if session else "gone"
        if session and work and member.id in work.row.selected:
            state = "submitted" if member.id in work.updates else "training"
        return pb.ClientStatus(
            client_id=member.id,
            state=state,
            rank=member.rank,
            depth=member.depth,
            round=progress.round,
            step=progress.step,
            steps=progress.steps,
            loss=progress.loss,
        )

    def _note(self, client: str, direction: str, message: Message) -> None:
        self._run.book.count(self._engine.round_number, client, direction, CONTROL, message.ByteSize())


def _shown(hello: pb.Hello) -> str:
    """What the client says it is, fit for a log."""
    return "".join(char for char in hello.software[:64] if char.isprintable()) or "unnamed software"
