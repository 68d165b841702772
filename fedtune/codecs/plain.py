"""The ternary codec's inner work on a block, in numpy; `compiled.py` does the same in numba's loops.

A block is one-dimensional and holds at most `BLOCK` values, float32 or float64.
"""

from typing import Any

import numpy as np

from fedtune.tensors import Array

BLOCK = 1 << 16
"""Values at a time: places in a block are uint16, and half a megabyte stays in the cache."""
ESCAPE = 255


class Plain:
    """Work on blocks, with memory that is used again and again."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        """Makes room for blocks of a dtype."""
        self._magnitudes = np.empty(BLOCK, dtype)
        self._room = np.empty(BLOCK + BLOCK // 8 + 1, np.bool_)

    def not_below(self, block: Array, low: Array) -> tuple[Array, Array]:
        """Returns the places of magnitudes of `low` and more, uint16, and their values."""
        np.greater_equal(self._absolute(block), low, out=self._room[: block.size])
        places = self._true(block.size)
        return places.astype(np.uint16), block.take(places)

    def inside(self, block: Array, low: Array, high: Array) -> tuple[int, Array]:
        """Counts magnitudes above `high`, and finds those from `low` to it."""
        magnitudes = self._absolute(block)
        over = magnitudes > high
        np.not_equal(np.greater_equal(magnitudes, low), over, out=self._room[: block.size])
        return int(np.count_nonzero(over)), magnitudes.take(self._true(block.size))

    def keep(
        self, places: Array, values: Array, limit: Array, ties: int, start: int, out: tuple[Array, Array]
    ) -> tuple[int, int]:
        """Finds magnitudes above `limit`, and the first `ties` equal to it, in what `not_below` found.

        Writes start + place (int64) and sign (int8) to `out`; returns how many there are, and how many ties are left.
        """
        magnitudes = self._absolute(values)
        kept, left = magnitudes > limit, ties
        if ties:
            equal = np.flatnonzero(magnitudes == limit)[:ties]
            kept[equal] = True
            left -= equal.size
        at = kept.nonzero()[0]
        positions, signs = (array[: at.size] for array in out)
        positions[:] = places.take(at)
        positions += start
        np.multiply(np.signbit(values.take(at)).view(np.int8), -2, out=signs)
        signs += 1
        return at.size, left

    def signs(self, block: Array, limit: Array, out: Array) -> None:
        """Sets `out` (int8) to the signs of magnitudes above `limit`, and to 0 elsewhere."""
        np.subtract((block > limit).view(np.int8), (block < -limit).view(np.int8), out=out)

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

    def _absolute(self, block: Array) -> Array:
        return np.abs(block, out=self._magnitudes[: block.size])

    def _true(self, size: int) -> Array:
        """Lists where the first `size` values of the room are true.

        numpy jumps from one true value to the next while at most a tenth are, and walks through all where more are.
        The walk is the faster from a fiftieth on, so true values are put behind.
        """
        if np.count_nonzero(self._room[:size]) * 50 < size:
            return self._room[:size].nonzero()[0]
        more = size // 8 + 1
        self._room[size : size + more] = True
        return self._room[: size + more].nonzero()[0][:-more]


def as_bytes(quotients: Array) -> Array:
    """Writes numbers as q // 255 bytes of 255 and the byte q % 255."""
    if int(quotients.max()) < ESCAPE:
        return quotients.astype(np.uint8)
    escapes, rest = np.divmod(quotients, ESCAPE)
    out = np.full(quotients.size + int(escapes.sum()), ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = rest
    return out
