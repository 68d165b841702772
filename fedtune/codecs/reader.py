"""Reading bytes that nobody vouches for: every step is bounded, and every failure is a WireError."""

import zlib

import numpy as np

from fedtune.errors import WireError, problem
from fedtune.tensors import Array

_VARINT_BYTES = 9  # 63 bits


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
