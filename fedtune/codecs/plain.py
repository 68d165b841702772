"""The ternary codec's inner work on a block, in numpy; `compiled.py` does the same in numba's loops.

A block is one-dimensional and holds at most `BLOCK` values, float32 or float64.
"""

from typing import Any

import numpy as np

from fedtune.tensors import Array

BLOCK = 1 << 16
"""Values at a time: places in a block are uint16, and half a megabyte stays in the cache."""
ROW = 1 << 11
"""Columns of a block when it is summed."""
ESCAPE = 255
_SPELLED = 1 << 16
_WORD = (1 << 64) - 1
_ONE, _SIX, _HALF, _SIXTY_THREE, _LOWER = (np.uint64(n) for n in (1, 6, 32, 63, (1 << 32) - 1))


class Plain:
    """Work on blocks, with memory that is used again and again."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        """Makes room for blocks of a dtype."""
        self._magnitudes = np.empty(BLOCK, dtype)
        self._room = np.empty(BLOCK + BLOCK // 8 + 1, np.bool_)

    def inside(self, block: Array, low: Array, high: Array) -> tuple[int, Array]:
        """Counts magnitudes above `high`, and finds those from `low` to it."""
        magnitudes = self._absolute(block)
        over = magnitudes > high
        np.not_equal(np.greater_equal(magnitudes, low), over, out=self._room[: block.size])
        return int(np.count_nonzero(over)), magnitudes.take(self._true(block.size))

    def inside_and_sums(self, block: Array, low: Array, high: Array) -> tuple[int, Array, tuple[float, float]]:
        """Does what `inside` does, and sums whole rows and their squares: down the columns, then these in float64."""
        rows = block[: block.size // ROW * ROW].reshape(-1, ROW)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            down = rows.sum(axis=0), np.square(rows).sum(axis=0)
        return *self.inside(block, low, high), in_all(*down)

    def keep(self, block: Array, limit: Array, start: int, positions: Array, signs: Array) -> int:
        """Finds magnitudes of `limit` and more, and returns how many; writes start + place, and sign (int8)."""
        np.greater_equal(self._absolute(block), limit, out=self._room[: block.size])
        places = self._true(block.size)
        np.add(places, start, out=positions[: places.size], casting="same_kind")
        np.multiply(np.signbit(block.take(places)).view(np.int8), -2, out=signs[: places.size])
        signs[: places.size] += 1
        return places.size

    def signs(self, block: Array, limit: Array, out: Array) -> None:
        """Sets `out` (int8) to the signs of magnitudes of `limit` and more, and to 0 elsewhere."""
        np.subtract((block >= limit).view(np.int8), (block <= -limit).view(np.int8), out=out)

    def quotients(self, places: Array, before: int, shift: int) -> Array:
        """Writes the gaps before ascending places, less their lowest `shift` bits, as bytes (`gaps.py`)."""
        gaps = np.empty_like(places)
        gaps[0] = places[0] - before - 1
        np.subtract(places[1:], places[:-1], out=gaps[1:])
        gaps[1:] -= 1
        return as_bytes(gaps >> shift if shift else gaps)

    def pack(self, plane: Array, total: Array) -> None:
        """Sets `total` (uint8) to 3 total + the digits of signs: 0, 1 for plus, 2 for minus (-1 is 255)."""
        digits, total = plane.view(np.uint8), total[: plane.size]
        total *= 3
        total += digits & 1
        total += digits >> 7

    def counts(self, data: Array) -> Array:
        """Counts how often each byte occurs."""
        return np.bincount(data, minlength=256)

    def spell(self, data: Array, codes: Array, lengths: Array, at: int, words: int) -> Array:
        """Writes the codes of bytes behind one another, the first from bit `at` on, into so many words (uint64).

        Codes have at most 15 bits, so four fit into a word.
        """
        out, pairs = np.zeros(words, np.uint64), _pairs(codes, lengths)
        whole = data.size // 4 * 4
        for start in range(0, whole, _SPELLED):
            at = _spell(pairs, data[start : min(start + _SPELLED, whole)].view("<u2"), at, out)
        for byte in data[whole:]:
            long = int(codes[byte]) << at % 64
            out[at // 64] |= np.uint64(long & _WORD)
            out[at // 64 + 1] |= np.uint64(long >> 64)
            at += int(lengths[byte])
        return out

    def _absolute(self, block: Array) -> Array:
        return np.abs(block, out=self._magnitudes[: block.size])

    def _true(self, size: int) -> Array:
        """Lists where the first `size` values of the room are true.

        numpy jumps from one true value to the next while at most a tenth are, and walks through all where more are.
        The walk is the faster from a fiftieth on, so true values are put behind.
        """
        share = np.count_nonzero(self._room[:size]) / size
        if not 1 / 50 < share < 1 / 10:
            return self._room[:size].nonzero()[0]
        more = size // 8 + 1
        self._room[size : size + more] = True
        return self._room[: size + more].nonzero()[0][:-more]


def in_all(values: Array, squares: Array) -> tuple[float, float]:
    """Sums what columns sum to."""
    return float(values.sum(dtype=np.float64)), float(squares.sum(dtype=np.float64))


def as_bytes(quotients: Array) -> Array:
    """Writes numbers as q // 255 bytes of 255 and the byte q % 255."""
    if int(quotients.max()) < ESCAPE:
        return quotients.astype(np.uint8)
    escapes, rest = np.divmod(quotients, ESCAPE)
    out = np.full(quotients.size + int(escapes.sum()), ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = rest
    return out


def _pairs(codes: Array, lengths: Array) -> Array:
    """Codes of two bytes, and in the upper half of the word how many bits they have, for all pairs."""
    both = codes | codes[:, None] << lengths
    return (both | (lengths + lengths[:, None]) << _HALF).reshape(-1)


def _spell(table: Array, pairs: Array, at: int, out: Array) -> int:
    """Writes the codes of pairs of bytes, an even number of them, and returns where they end.

    Sums stand for `or`: no bit is set twice, and what overflows in the sum of all vanishes in differences.
    """
    found = table.take(pairs)
    first, second = found[0::2], found[1::2]
    bits = first >> _HALF
    four = (second & _LOWER) << bits
    four |= first & _LOWER
    bits += second >> _HALF
    ends = np.cumsum(bits)
    ends += np.uint64(at)
    starts = np.subtract(ends, bits, out=bits)
    words, shifts = starts >> _SIX, starts & _SIXTY_THREE
    last = np.append(np.flatnonzero(words[1:] != words[:-1]), words.size - 1)
    sums = np.cumsum(four << shifts)[last]
    here = int(words[0])
    out[here] |= sums[0]
    out[here + 1 : here + last.size] = np.diff(sums)
    out[here + 1 : here + last.size + 1] |= four[last] >> _ONE >> (_SIXTY_THREE - shifts[last])
    return int(ends[-1])
