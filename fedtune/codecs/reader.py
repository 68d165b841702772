"""Reading bytes that nobody vouches for: every step is bounded, and every failure is a WireError."""

import zlib
from math import log

import numpy as np

from fedtune.errors import WireError, problem
from fedtune.tensors import Array

_VARINT_BYTES = 9  # 63 bits
_NEW_CODES_BITS = 600


class Reader:
    """Walks through a payload from its first byte to its last."""

    def __init__(self, payload: memoryview | bytes, largest: int) -> None:
        """Takes `payload`; raises WireError when it has more than `largest` bytes."""
        self._view, self._at = memoryview(payload).cast("B"), 0
        if self._view.nbytes > largest:
            raise WireError(problem("payload", f"at most {largest} bytes", f"{self._view.nbytes} bytes"))

    def take(self, nbytes: int, what: str) -> memoryview:
        """Returns the next `nbytes` bytes."""
        left = self._view.nbytes - self._at
        if nbytes > left:
            raise WireError(problem(what, f"{nbytes} bytes", f"{left} bytes before the end of the payload"))
        self._at += nbytes
        return self._view[self._at - nbytes : self._at]

    def array(self, dtype: np.dtype[np.generic], count: int, what: str) -> Array:
        """Returns the next `count` values as a read-only view."""
        values = np.frombuffer(self.take(count * dtype.itemsize, what), np.uint8).view(dtype)
        values.flags.writeable = False
        return values

    def varint(self, largest: int, what: str) -> int:
        """Returns the next LEB128 number, which must be at most `largest` and written in as few bytes as it takes."""
        value = 0
        for index in range(_VARINT_BYTES):
            byte = self.take(1, what)[0]
            value |= (byte & 127) << (7 * index)
            if byte < 128:
                if value > largest or (index and not byte):
                    break
                return value
        raise WireError(problem(what, f"a number from 0 to {largest}", f"{value} or a longer one"))

    def inflate(self, shortest: int, longest: int, what: str) -> bytes:
        """Returns what the next section, a length and a raw DEFLATE stream, inflates to.

        Raises:
            WireError: it is no such stream, or does not inflate to `shortest` to `longest` bytes.
        """
        packed = self.take(self.varint(self._view.nbytes, f"{what}: length"), what)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(packed, longest + 1)
        except zlib.error as error:
            raise WireError(problem(what, "a DEFLATE stream", error)) from error
        if not inflater.eof or inflater.unused_data or not shortest <= len(data) <= longest:
            want = f"a DEFLATE stream of {shortest} to {longest} bytes"
            raise WireError(problem(what, want, f"{len(data)} bytes, or a stream that is cut off or too long"))
        return data

    def end(self) -> None:
        """Raises WireError when bytes are left."""
        left = self._view.nbytes - self._at
        if left:
            raise WireError(problem("payload", "nothing after the last section", f"{left} more bytes"))


def varint(value: int) -> bytes:
    """Writes a number from 0 to 2**63 - 1 as LEB128: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


class Deflater:
    """Entropy coding with what every machine has: raw DEFLATE, Huffman codes only, no matches.

    DEFLATE renews its codes every 32 thousand bytes. Where the statistics change in between it pays to renew them
    sooner: bytes made for density p cost about log2(e) / 2 * ln(p / q)^2 bits each more than they must under codes
    made for density q, and new codes cost about 600 bits.
    """

    def __init__(self) -> None:
        self._deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
        self._parts: list[bytes] = []
        self._density, self._bytes = 0.0, 0

    def begin(self, density: float) -> None:
        """Says that what follows has another density; renews the codes when that is worth its bits."""
        if self._bytes and 0.72 * self._bytes * log(density / self._density) ** 2 > _NEW_CODES_BITS:
            self._parts.append(self._deflater.flush(zlib.Z_BLOCK))
            self._bytes = 0
        if not self._bytes:
            self._density = density

    def add(self, data: Array) -> None:
        """Takes more bytes (uint8, contiguous)."""
        self._parts.append(self._deflater.compress(data.data))
        self._bytes += data.size

    def section(self) -> bytes:
        """Ends the stream and returns it behind its length."""
        stream = b"".join([*self._parts, self._deflater.flush()])
        return varint(len(stream)) + stream
