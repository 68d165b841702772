"""Sparse signs as bytes: how many zeros lie before each kept place, and one bit for each sign.

Where k of n places are kept, a gap g is cut into its lowest s bits, which look random and are written as they are, and
the quotient g >> s, written as q // 255 bytes of 255 and the byte q % 255. Here s = max(0, bit length of n // k, less
6), so the mean quotient is below 64. Gaps are geometric, so Huffman codes of the quotients come within one per cent of
the entropy. This is Golomb's code (1966) with a better code for the quotient than the unary one.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fedtune.codecs.backend import work
from fedtune.codecs.deflate import section
from fedtune.codecs.plain import ESCAPE
from fedtune.codecs.reader import Reader
from fedtune.errors import WireError, problem
from fedtune.tensors import Array

Positions = npt.NDArray[np.int64] | npt.NDArray[np.int32]
Signs = npt.NDArray[np.int8]

_QUOTIENT_BITS = 6
_BLOCK = 1 << 15


def encode(sizes: Sequence[int], positions: Sequence[Positions]) -> bytes:
    """Writes the ascending places that are kept of vectors of `sizes`, at least one of each."""
    parts, lows, how = [], [], work(sum(sizes))
    for size, places in zip(sizes, positions, strict=True):
        shift, last = low_bits(size, places.size), -1
        quotients = []
        for at in range(0, places.size, _BLOCK):
            block = places[at : at + _BLOCK]
            quotients.append(how.quotients(block, last, shift))
            if shift:
                gaps = np.diff(block, prepend=last) - 1
                lows.append((gaps[:, None] >> np.arange(shift) & 1).astype(np.uint8).reshape(-1))
            last = int(block[-1])
        parts.append(np.concatenate(quotients))
    bits = np.concatenate(lows) if lows else np.zeros(0, np.uint8)
    return section(parts, how) + np.packbits(bits, bitorder="little").tobytes()


def decode(reader: Reader, sizes: Sequence[int], counts: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Reads `counts` ascending places, at least one each, of vectors of `sizes`.

    Raises:
        WireError: the bytes hold fewer or more, or places that are not there.
    """
    shifts = [low_bits(size, count) for size, count in zip(sizes, counts, strict=True)]
    total, longest = sum(counts), sum((n >> s) // ESCAPE for n, s in zip(sizes, shifts, strict=True))
    gaps = _quotients(np.frombuffer(reader.inflate(total, total + longest, "gaps"), np.uint8), total)
    packed = np.asarray(read_bits(reader, sum(s * k for s, k in zip(shifts, counts, strict=True)), "low bits of gaps"))
    places, used = [], 0
    for size, shift, (low, high) in zip(sizes, shifts, pairwise(np.cumsum([0, *counts])), strict=True):
        part = gaps[low:high]
        if int(part.max()) > size >> shift:
            raise WireError(problem("gaps", f"places below {size}", "others"))
        if shift:
            bits = packed[used : used + part.size * shift].reshape(part.size, shift)
            part = (part << shift) + (bits @ (1 << np.arange(shift, dtype=np.int64)))
            used += bits.size
        part += 1
        part[0] -= 1
        places.append(np.cumsum(part, out=part))
        if int(places[-1][-1]) >= size:
            raise WireError(problem("gaps", f"places below {size}", "others"))
    return places


def low_bits(size: int, count: int) -> int:
    """Returns how many low bits of a gap are written as they are, where `count` of `size` places are kept."""
    return max(0, (size // count).bit_length() - _QUOTIENT_BITS)


def encode_signs(signs: Signs) -> bytes:
    """Packs signs (-1 or 1), eight to a byte, the first in the lowest bit; 1 stands for minus."""
    return np.packbits(signs < 0, bitorder="little").tobytes()


def decode_signs(reader: Reader, count: int) -> Signs:
    """Reads `count` signs; raises WireError when unused bits are set."""
    return np.int8(1) - 2 * read_bits(reader, count, "signs").view(np.int8)


def read_bits(reader: Reader, count: int, what: str) -> Array:
    """Reads `count` bits, the first from the lowest of the first byte; raises WireError when unused ones are set."""
    packed = reader.array(np.dtype(np.uint8), -(-count // 8), what)
    if count % 8 and packed[-1] >> (count % 8):
        raise WireError(problem(what, "unused bits of 0", f"a last byte of {packed[-1]}"))
    return np.unpackbits(packed, count=count, bitorder="little")


def _quotients(data: Array, count: int) -> npt.NDArray[np.int64]:
    """Joins escapes with the bytes that end them; raises WireError unless that gives `count` numbers."""
    ends = np.flatnonzero(data != ESCAPE) if data.size > count or (data == ESCAPE).any() else None
    if ends is None:
        return data.astype(np.int64)
    if ends.size != count or int(ends[-1]) != data.size - 1:
        raise WireError(problem("gaps", f"{count} whole ones", f"{ends.size}, or one cut short"))
    quotients: npt.NDArray[np.int64] = data[ends] + ESCAPE * (np.diff(ends, prepend=-1) - 1)
    return quotients
