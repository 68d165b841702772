"""Fetch and Submit: payloads as raw frames, bounded before they are read and checked before they count."""

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio

from fedtune.codecs import raw
from fedtune.errors import UnavailableError, WireError, problem
from fedtune.method import Method
from fedtune.tensors import Manifest
from fedtune.wire import MAX_METRICS
from fedtune.wire.convert import manifest_to_proto, parse
from fedtune.wire.frames import Assembler, cut
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune_server import records
from fedtune_server.blobs import Draft
from fedtune_server.engine import Engine
from fedtune_server.guard import Context, DuplicateError, NoTaskError, Patience, SilentError
from fedtune_server.ledger import CONTROL, DOWN, PAYLOAD, UP
from fedtune_server.listen import check_identity
from fedtune_server.records import TaskRow
from fedtune_server.run import Run
from fedtune_server.versions import Version

T = TypeVar("T")
LATE = "The round is closed; wait for the next task"


@dataclass(frozen=True, slots=True)
class Broadcast:
    """What brings a client from one version to another, ready to be sent to any number of clients."""

    header: bytes
    buffers: tuple[memoryview, ...]


class Transfer:
    """The two calls that carry payloads."""

    def __init__(self, run: Run, engine: Engine, patience: Patience) -> None:
        self._run, self._engine, self._patience = run, engine, patience
        self._sent: dict[tuple[int, int], asyncio.Task[Broadcast]] = {}
        self._receiving: dict[str, asyncio.Task[None]] = {}

    async def fetch(self, data: bytes, context: Context) -> None:
        """Sends what the client's model lacks: one header, then frames."""
        request = parse(pb.FetchRequest, data)
        check_identity(context, request.client_id)
        task = self._engine.task_of(request.client_id, request.task_id)
        if task is None:
            raise NoTaskError(LATE)
        version = self._run.version
        if not -1 <= request.have <= version.number:
            raise WireError(problem("have", f"-1 to {version.number}", request.have, "Start the client from its base"))
        broadcast = await self._broadcast(version, request.have)
        self._count(task, UP, CONTROL, len(data))
        await self._write(context, broadcast.header)
        self._count(task, DOWN, CONTROL, len(broadcast.header))
        for frame in cut(broadcast.buffers):
            await self._write(context, frame)
            self._count(task, DOWN, PAYLOAD, len(frame))

    async def submit(self, context: Context) -> pb.SubmitReply:
        """Takes one update. ACCEPTED means that it is durable and part of the round."""
        data = await self._read(context, time.monotonic() + self._patience.frame_s)
        header = parse(pb.SubmitHeader, data)
        check_identity(context, header.client_id)
        task = self._engine.task_of(header.client_id, header.task_id)
        if task is None:
            return await self._known_or_late(header)
        self._count(task, UP, CONTROL, len(data))
        try:
            self._check(header, task)
            reply = await self._receive(context, header, task)
        except (WireError, DuplicateError, SilentError) as error:
            self._engine.metrics.refused += 1
            self._run.events.emit("update_refused", round=task.round, client=task.member.id, reason=str(error))
            raise
        self._count(task, DOWN, CONTROL, reply.ByteSize())
        return reply

    async def _receive(self, context: Context, header: pb.SubmitHeader, task: TaskRow) -> pb.SubmitReply:
        """Reads the frames into a draft; a newer stream of the same client ends an older one."""
        client = task.member.id
        older = self._receiving.get(client)
        if older is not None:
            older.cancel()
        draft = self._run.blobs.draft()
        reading = self._receiving[client] = asyncio.create_task(self._frames(context, header, draft))
        try:
            await asyncio.wait([reading])
            if reading.cancelled():
                raise UnavailableError("A newer stream of this client took over")
            reading.result()
        except BaseException:
            draft.close()
            raise
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if self._receiving.get(client) is reading:
                del self._receiving[client]
        # From here on a client that hangs up changes nothing: the update is complete.
        return await asyncio.shield(asyncio.create_task(self._accept(task, header, draft)))

    async def _accept(self, task: TaskRow, header: pb.SubmitHeader, draft: Draft) -> pb.SubmitReply:
        with draft:
            if await self._engine.accept(task, header, draft):
                return pb.SubmitReply(status=pb.SUBMIT_STATUS_ACCEPTED)
            return self._late(task.member.id)

    async def _frames(self, context: Context, header: pb.SubmitHeader, draft: Draft) -> None:
        """Reads exactly what was announced, within a time that fits its size."""
        assembler = Assembler(header.nbytes, header.sha256, draft.write)
        deadline = time.monotonic() + self._patience.submit_s + header.nbytes / self._patience.min_rate
        while frame := await self._read(context, deadline, last=True):
            await asyncio.to_thread(assembler.add, frame)
        assembler.finish()

    def _check(self, header: pb.SubmitHeader, task: TaskRow) -> None:
        """Refuses by the header alone, before a byte of payload is read."""
        version, limit = self._run.version, self._run.config.server.max_update_mb * 2**20
        fewest, most = self._run.shared.method.sizes(version.state, task.member)
        if header.nbytes > limit:
            raise WireError(
                problem("payload", f"at most {limit} bytes (server.max_update_mb)", f"{header.nbytes} bytes")
            )
        if not fewest <= header.nbytes <= most:
            want = f"exactly {most} bytes" if fewest == most else f"{fewest} to {most} bytes"
            raise WireError(problem("payload", want, f"{header.nbytes} bytes"))
        if len(header.sha256) != 64:
            raise WireError(problem("sha256", "64 hex digits", f"{len(header.sha256)} characters"))
        if header.state_digest != version.digest:
            remedy = "The client's model has drifted; start it again"
            raise WireError(problem("state_digest", version.digest, header.state_digest[:64] or "nothing", remedy))
        if len(header.metrics) > MAX_METRICS or any(len(key) > 64 for key in header.metrics):
            raise WireError(problem("metrics", f"at most {MAX_METRICS} short names", len(header.metrics)))
        bad = [key for key, value in header.metrics.items() if not math.isfinite(value)]
        if bad:
            raise WireError(problem(f"metrics: {bad[0]}", "a finite number", header.metrics[bad[0]]))

    async def _known_or_late(self, header: pb.SubmitHeader) -> pb.SubmitReply:
        """A round that is closed still answers ACCEPTED to the bytes it took: the first answer may have been lost."""
        find = records.find_update(header.client_id, header.task_id)
        if await self._run.store.commit(find) == header.sha256:
            return pb.SubmitReply(status=pb.SUBMIT_STATUS_ACCEPTED)
        return self._late(header.client_id)

    def _late(self, client: str) -> pb.SubmitReply:
        self._engine.metrics.late += 1
        self._run.events.emit("update_late", client=client)
        return pb.SubmitReply(status=pb.SUBMIT_STATUS_LATE, message=LATE)

    async def _broadcast(self, version: Version, since: int) -> Broadcast:
        """Prepares a broadcast once for all clients that lack the same."""
        key = (version.number, since)
        if key not in self._sent:
            self._sent = {known: task for known, task in self._sent.items() if known[0] == version.number}
            self._sent[key] = asyncio.create_task(asyncio.to_thread(prepare, self._run.shared.method, version, since))
        return await asyncio.shield(self._sent[key])

    async def _read(self, context: Context, deadline: float, last: bool = False) -> bytes:
        """Returns the next frame; empty at the end when `last` allows the stream to end here."""
        patience = min(self._patience.frame_s, deadline - time.monotonic())
        try:
            frame = await asyncio.wait_for(context.read(), max(patience, 0.001))
        except TimeoutError:
            raise SilentError(problem("stream", f"the next frame within {patience:.0f} s", "nothing")) from None
        if frame is grpc.aio.EOF and last:
            return b""
        if not isinstance(frame, bytes) or not frame:
            raise WireError(problem("stream", "a frame", "an empty one" if frame == b"" else "its end"))
        return frame

    async def _write(self, context: Context, frame: bytes) -> None:
        await in_time(context.write(frame), self._patience.frame_s)

    def _count(self, task: TaskRow, direction: str, kind: str, nbytes: int) -> None:
        self._run.book.count(task.round, task.member.id, direction, kind, nbytes)


def prepare(method: Method, version: Version, since: int) -> Broadcast:
    """Builds the header and the buffers of one broadcast; the buffers are views of the state."""
    received = {} if since == version.number else dict(method.broadcast(version.state, since))
    manifest = Manifest.of(received)
    buffers = tuple(raw.encode(received, manifest))
    sha = hashlib.sha256()
    for buffer in buffers:
        sha.update(buffer)
    header = pb.FetchHeader(
        since=since,
        version=version.number,
        broadcast=manifest_to_proto(manifest),
        nbytes=manifest.nbytes,
        sha256=sha.hexdigest(),
    )
    return Broadcast(header.SerializeToString(), buffers)


async def in_time(call: Awaitable[T], seconds: float) -> T:
    """Waits for a peer to take what it asked for; raises SilentError when it does not."""
    try:
        return await asyncio.wait_for(call, seconds)
    except TimeoutError:
        raise SilentError(problem("stream", f"a reader within {seconds:g} s", "none")) from None
