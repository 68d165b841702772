"""A packet: what fedtune sends inside Flower, one bag of bytes a message.

    "fedtune1" | count u32 | count x (length u32, bytes of one control message) | payload to the end     (little-endian)

The control messages are those of `proto/fedtune/wire/v1`; the payload is the method's own encoding. What a packet is
for travels beside it as the array's serialisation type:

    hello     coordinator -> node   Welcome                       node -> coordinator   Hello
    task      coordinator -> node   Welcome, FetchHeader, Task+   node -> coordinator   update: SubmitHeader
                                                                                    or  lack: FetchRequest
    bye       coordinator -> node   nothing                       node -> coordinator   nothing

A task holds one `Task` for each shape of update, so that all nodes that lack the same versions share one packet and
Flower stores it once.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedtune.errors import WireError, problem

HELLO, TASK, UPDATE, LACK = (f"fedtune.{name}.v1" for name in ("hello", "task", "update", "lack"))
"""Serialisation types of the arrays; `visit.BYE` is another."""

RESIDENT = "resident"
"""Feature of a node that keeps its model between rounds."""

_MAGIC = b"fedtune1"
_MAX_HEADERS = 4096


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet taken apart; `payload` is a view into what was read."""

    headers: tuple[bytes, ...]
    payload: memoryview


def pack(headers: Sequence[bytes], payload: Iterable[memoryview | bytes] = ()) -> bytes:
    """Puts a packet together; the payload is copied once."""
    parts: list[memoryview | bytes] = [_MAGIC, struct.pack("<I", len(headers))]
    for header in headers:
        parts += (struct.pack("<I", len(header)), header)
    return b"".join([*parts, *payload])


def unpack(data: memoryview | bytes) -> Packet:
    """Takes a packet apart; raises WireError when the bytes are none."""
    view = memoryview(data).cast("B")
    if bytes(view[:8]) != _MAGIC or view.nbytes < 12:
        raise WireError(problem("packet", "one of fedtune's", f"{view.nbytes} bytes that are none"))
    (count,), at = struct.unpack_from("<I", view, 8), 12
    headers: list[bytes] = []
    for _ in range(min(count, _MAX_HEADERS + 1)):
        if at + 4 > view.nbytes:
            raise WireError(problem("packet", f"{count} headers", f"an end after {len(headers)}"))
        (length,) = struct.unpack_from("<I", view, at)
        if at + 4 + length > view.nbytes:
            raise WireError(problem("packet: header", f"{length} bytes", f"an end after {view.nbytes - at - 4}"))
        headers.append(bytes(view[at + 4 : at + 4 + length]))
        at += 4 + length
    if count > _MAX_HEADERS:
        raise WireError(problem("packet", f"at most {_MAX_HEADERS} headers", count))
    return Packet(tuple(headers), view[at:])
