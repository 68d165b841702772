"""Payloads: what a task brings is fetched, what training gave is submitted, both as raw frames."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedtune import wire
from fedtune.errors import StorageError, WireError, problem
from fedtune.rounds import Task, receive
from fedtune.wire.convert import manifest_from_proto, parse
from fedtune.wire.frames import Assembler
from fedtune.wire.v1 import coordinator_pb2 as pb
from fedtune_client.outbox import Update

IN_MEMORY = 256 * 2**20
"""Bytes up to which a payload is received into memory; a larger one goes into an unnamed file and is mapped."""


@dataclass(frozen=True)
class Transfer:
    """One client's way to move payloads. Failed calls raise grpc.RpcError, broken contracts WireError."""

    channel: grpc.Channel
    client_id: str
    folder: Path

    def fetch(self, message: pb.Task, have: int) -> Task:
        """Fetches what takes this client from version `have` to the task's version.

        Raises:
            WireError: the answer is not what was asked for, or its bytes are not those announced.
            StorageError: a large payload does not fit on the disk.
        """
        call: grpc.UnaryStreamMultiCallable[pb.FetchRequest, bytes] = self.channel.unary_stream(
            wire.FETCH, request_serializer=pb.FetchRequest.SerializeToString
        )
        frames = call(pb.FetchRequest(client_id=self.client_id, task_id=message.task_id, have=have))
        header = parse(pb.FetchHeader, next(frames, b""))
        broadcast = manifest_from_proto(header.broadcast)
        _agree("since", have, header.since)
        _agree("version", message.version, header.version)
        _agree("nbytes", broadcast.nbytes, header.nbytes)
        buffer = self._buffer(header.nbytes)
        _fill(buffer, header, frames)
        payload = receive(buffer, broadcast)
        update = manifest_from_proto(message.update)
        return Task(message.round, have, message.version, broadcast, payload, update)

    def submit(self, task_id: str, update: Update) -> pb.SubmitReply:
        """Sends an update from the outbox and returns the coordinator's answer."""
        call: grpc.StreamUnaryMultiCallable[bytes, pb.SubmitReply] = self.channel.stream_unary(
            wire.SUBMIT, response_deserializer=pb.SubmitReply.FromString
        )
        return call(self._frames(task_id, update))

    def _frames(self, task_id: str, update: Update) -> Iterator[bytes]:
        yield pb.SubmitHeader(
            client_id=self.client_id,
            task_id=task_id,
            weight=update.weight,
            nbytes=update.nbytes,
            sha256=update.sha256,
            metrics=update.metrics,
            state_digest=update.key.state_digest,
        ).SerializeToString()
        with update.file.open("rb", buffering=0) as stream:
            while frame := stream.read(wire.FRAME):
                yield frame

    def _buffer(self, nbytes: int) -> memoryview:
        """Returns writable memory of `nbytes` bytes."""
        if nbytes <= IN_MEMORY:
            return memoryview(bytearray(nbytes))
        try:
            with tempfile.TemporaryFile(dir=self.folder) as stream:
                stream.truncate(nbytes)
                if hasattr(os, "posix_fallocate"):
                    # Reserved now: writing through a map to a full disk would kill the process.
                    os.posix_fallocate(stream.fileno(), 0, nbytes)
                return memoryview(mmap.mmap(stream.fileno(), nbytes))
        except OSError as error:
            got = f"{self.folder}: {error.strerror}"
            raise StorageError(problem("client.folder", f"room for {nbytes} bytes", got)) from error


def _fill(buffer: memoryview, header: pb.FetchHeader, frames: Iterator[bytes]) -> None:
    """Writes all frames into `buffer` one after another."""

    def write(frame: bytes) -> None:
        buffer[assembler.received : assembler.received + len(frame)] = frame

    assembler = Assembler(header.nbytes, header.sha256, write)
    for frame in frames:
        assembler.add(frame)
    assembler.finish()


def _agree(name: str, want: int, got: int) -> None:
    if want != got:
        raise WireError(problem(f"fetch: {name}", want, got, "Coordinator and client differ in version?"))
