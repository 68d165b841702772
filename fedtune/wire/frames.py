"""Payloads as frames: cutting buffers into pieces that gRPC likes, and putting pieces together without trust."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

from fedtune.errors import WireError, problem
from fedtune.wire import FRAME, MAX_FRAME


def cut(buffers: Iterable[memoryview | bytes], size: int = FRAME) -> Iterator[bytes]:
    """Yields the bytes of all buffers, in order, as frames of exactly `size` bytes and one shorter last frame."""
    pending: list[memoryview] = []
    held = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while held + view.nbytes >= size:
            pending.append(view[: size - held])
            view = view[size - held :]
            yield b"".join(pending)
            pending, held = [], 0
        if view.nbytes:
            pending.append(view)
            held += view.nbytes
    if held:
        yield b"".join(pending)


def sha256(buffers: Iterable[memoryview | bytes]) -> str:
    """SHA-256 of the bytes of all buffers (64 hex digits)."""
    sha = hashlib.sha256()
    for buffer in buffers:
        sha.update(buffer)
    return sha.hexdigest()


class Assembler:
    """Passes frames on to `write` and refuses the first byte too many.

    Guarantees: never more than `nbytes` bytes reach `write`; after `finish` exactly `nbytes` did, and their SHA-256
    is `sha256`.
    """

    def __init__(self, nbytes: int, sha256: str, write: Callable[[bytes], object]) -> None:
        self.received = 0
        self._nbytes, self._sha256, self._write = nbytes, sha256, write
        self._hash = hashlib.sha256()

    def add(self, frame: bytes) -> None:
        """Takes the next frame; raises WireError for one that is empty, too large or more than was announced."""
        if not 1 <= len(frame) <= MAX_FRAME:
            raise WireError(problem("frame", f"1 to {MAX_FRAME} bytes", f"{len(frame)} bytes"))
        if self.received + len(frame) > self._nbytes:
            raise WireError(
                problem("payload", f"exactly {self._nbytes} bytes", f"{self.received + len(frame)} or more")
            )
        self._hash.update(frame)
        self._write(frame)
        self.received += len(frame)

    def finish(self) -> None:
        """Ends the payload; raises WireError when bytes are missing or are not the ones announced."""
        if self.received != self._nbytes:
            raise WireError(problem("payload", f"exactly {self._nbytes} bytes", f"{self.received} bytes"))
        if self._hash.hexdigest() != self._sha256:
            raise WireError(problem("payload: SHA-256", self._sha256[:64], self._hash.hexdigest()))
