"""The ternary codec's inner work on a block, in numba's loops: the bits of `plain.py`, several times as fast.

Loops that collect write every value and step on only if it counts: nothing is predicted, so nothing is mispredicted.
"""
# mypy: disable-error-code="untyped-decorator"
# (numba's decorators have no types)

from typing import Any

import numpy as np
from numba import njit

from fedtune.codecs.plain import BLOCK, ESCAPE, ROW, as_bytes, in_all
from fedtune.tensors import Array


class Compiled:
    """Work on blocks, as `plain.Plain` does it."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        """Makes room for blocks of a dtype."""
        self._values = np.empty(BLOCK + 1, dtype)
        self._places = np.empty(BLOCK + 1, np.uint16)
        self._flags = np.empty(BLOCK, np.uint8)
        self._columns = np.empty((2, ROW), dtype)
        self._unsigned = np.dtype(f"u{dtype.itemsize}")

    def inside(self, block: Array, low: Array, high: Array) -> tuple[int, Array]:
        """Counts magnitudes above `high`, and finds those from `low` to it."""
        above = _flag(block, low, high, self._flags)
        count = _collect(block, self._flags, self._flags.view(np.uint64), self._values)
        return above, self._values[:count].copy()

    def inside_and_sums(self, block: Array, low: Array, high: Array) -> tuple[int, Array, tuple[float, float]]:
        """Does what `inside` does, and sums whole rows and their squares: down the columns, then these in float64."""
        self._columns[:] = 0
        _sum(block[: block.size // ROW * ROW], *self._columns)
        return *self.inside(block, low, high), in_all(*self._columns)

    def keep(self, block: Array, limit: Array, start: int, positions: Array, signs: Array) -> int:
        """Finds magnitudes of `limit` and more, and returns how many; writes start + place, and sign (int8)."""
        words, edge = block.view(self._unsigned), limit.view(self._unsigned)
        return int(_keep(words, edge, start, self._places, positions, signs))

    def signs(self, block: Array, limit: Array, out: Array) -> None:
        """Sets `out` (int8) to the signs of magnitudes of `limit` and more, and to 0 elsewhere."""
        _signs(block, limit, out)

    def quotients(self, places: Array, before: int, shift: int) -> Array:
        """Writes the gaps before ascending places, less their lowest `shift` bits, as bytes."""
        out = np.empty(places.size, np.uint8)
        if _quotients(places, before, shift, out) < ESCAPE:
            return out
        return as_bytes((np.diff(places, prepend=places.dtype.type(before)) - 1) >> shift)

    def pack(self, plane: Array, total: Array) -> None:
        """Sets `total` to 3 total + the digits of signs."""
        _pack(plane, total)

    def counts(self, data: Array) -> Array:
        """Counts how often each byte occurs."""
        lanes = np.zeros((4, 256), np.int64)
        _count(data, lanes)
        counts: Array = lanes.sum(axis=0)
        return counts

    def spell(self, data: Array, codes: Array, lengths: Array, at: int, words: int) -> Array:
        """Writes the codes of bytes behind one another, the first from bit `at` on, into so many words (uint64)."""
        out = np.zeros(2 * words, "<u4")
        _spell(data, codes | lengths << np.uint64(32), at, out)
        return out.view("<u8")


@njit(nogil=True, cache=True)
def _pack(plane: Any, total: Any) -> None:
    for i in range(plane.shape[0]):
        sign = np.uint8(plane[i])
        total[i] = np.uint8(np.uint8(np.uint8(3) * total[i]) + np.uint8((sign & np.uint8(1)) + (sign >> np.uint8(7))))


@njit(nogil=True, cache=True)
def _sum(block: Any, values: Any, squares: Any) -> None:
    """Adds to columns row by row: a row stays in the first cache, and a loop that writes one array is vectorised."""
    for start in range(0, block.shape[0], ROW):
        row = block[start : start + ROW]
        for i in range(ROW):
            values[i] += row[i]
        for i in range(ROW):
            squares[i] += row[i] * row[i]


@njit(nogil=True, cache=True)
def _flag(block: Any, low: Any, high: Any, flags: Any) -> int:
    above, size = 0, block.shape[0]
    for i in range(size):
        magnitude = abs(block[i])
        above += magnitude > high
        flags[i] = (magnitude >= low) & (magnitude <= high)
    flags[size : (size + 7) // 8 * 8] = 0
    return above


@njit(nogil=True, cache=True)
def _collect(block: Any, flags: Any, eights: Any, out: Any) -> int:
    """Writes the magnitudes that are marked, eight marks at a time: most are 0."""
    count, size = 0, block.shape[0]
    for word in range((size + 7) // 8):
        if eights[word]:
            for i in range(8 * word, min(8 * word + 8, size)):
                out[count] = abs(block[i])
                count += flags[i]
    return count


@njit(nogil=True, cache=True)
def _keep(words: Any, limit: Any, start: int, places: Any, positions: Any, signs: Any) -> Any:
    """Compares magnitudes as whole numbers: what is left of `limit` - 1 is negative where it is reached."""
    top, last = np.uint64(8 * words.itemsize - 1), np.uint64(63)
    magnitude, edge, count = (np.uint64(1) << top) - np.uint64(1), np.uint64(limit) - np.uint64(1), np.uint64(0)
    for i in range(words.shape[0]):
        places[count] = i
        count += (edge - (np.uint64(words[i]) & magnitude)) >> last
    for i in range(count):
        positions[i] = start + places[i]
        signs[i] = 1 - 2 * np.int8(np.uint64(words[places[i]]) >> top)
    return count


@njit(nogil=True, cache=True)
def _signs(block: Any, limit: Any, out: Any) -> None:
    for i in range(block.shape[0]):
        out[i] = np.int8(block[i] >= limit) - np.int8(block[i] <= -limit)


@njit(nogil=True, cache=True)
def _quotients(places: Any, before: int, shift: int, out: Any) -> Any:
    largest = (places[0] - before - 1) >> shift
    out[0] = largest
    for i in range(1, places.shape[0]):
        quotient = (places[i] - places[i - 1] - 1) >> shift
        out[i] = quotient
        largest = max(largest, quotient)
    return largest


@njit(nogil=True, cache=True)
def _count(data: Any, lanes: Any) -> None:
    """Neighbours are counted apart: adding to one number twice in a row would wait."""
    whole = data.shape[0] // 4 * 4
    for i in range(0, whole, 4):
        lanes[0, data[i]] += 1
        lanes[1, data[i + 1]] += 1
        lanes[2, data[i + 2]] += 1
        lanes[3, data[i + 3]] += 1
    for i in range(whole, data.shape[0]):
        lanes[0, data[i]] += 1


@njit(nogil=True, cache=True)
def _spell(data: Any, table: Any, at: int, out: Any) -> None:
    """Up to 31 bits wait, and two codes of at most 15 come: half a word is written each time, full or not."""
    five, half, lower = np.uint64(5), np.uint64(32), np.uint64((1 << 32) - 1)
    word, waiting, bits = np.int64(at >> 5), np.uint64(0), np.uint64(at & 31)
    even = data.shape[0] // 2 * 2
    for i in range(0, even, 2):
        first, second = table[data[i]], table[data[i + 1]]
        between = first >> half
        waiting |= ((first & lower) | ((second & lower) << between)) << bits
        bits += between + (second >> half)
        out[word] = np.uint32(waiting)
        full = bits >> five
        word += np.int64(full)
        waiting >>= full << five
        bits &= np.uint64(31)
    if even < data.shape[0]:
        waiting |= (table[data[even]] & lower) << bits
    out[word], out[word + 1] = np.uint32(waiting), np.uint32(waiting >> half)
