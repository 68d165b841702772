"""The ternary codec's inner work on a block, in numba's loops: the bits of `plain.py`, several times as fast.

Loops that collect write every value and step on only if it counts: nothing is predicted, so nothing is mispredicted.
"""
# mypy: disable-error-code="untyped-decorator"
# (numba's decorators have no types)

from typing import Any

import numpy as np
from numba import njit

from fedtune.codecs.plain import BLOCK, ESCAPE, as_bytes
from fedtune.tensors import Array


class Compiled:
    """Work on blocks, as `plain.Plain` does it."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        """Makes room for blocks of a dtype."""
        self._values = np.empty(BLOCK + 1, dtype)
        self._places = np.empty(BLOCK + 1, np.uint16)

    def not_below(self, block: Array, low: Array) -> tuple[Array, Array]:
        """Returns the places of magnitudes of `low` and more, uint16, and their values."""
        count = _not_below(block, low, self._places, self._values)
        return self._places[:count].copy(), self._values[:count].copy()

    def inside(self, block: Array, low: Array, high: Array) -> tuple[int, Array]:
        """Counts magnitudes above `high`, and finds those from `low` to it."""
        above, count = _inside(block, low, high, self._values)
        return above, self._values[:count].copy()

    def keep(
        self, places: Array, values: Array, limit: Array, ties: int, start: int, out: tuple[Array, Array]
    ) -> tuple[int, int]:
        """Finds magnitudes above `limit`, and the first `ties` equal to it, in what `not_below` found."""
        count, left = _keep(places, values, limit, ties, start, *out)
        return count, left

    def signs(self, block: Array, limit: Array, out: Array) -> None:
        """Sets `out` (int8) to the signs of magnitudes above `limit`, and to 0 elsewhere."""
        _signs(block, limit, out)

    def quotients(self, places: Array, before: int, shift: int) -> Array:
        """Writes the gaps before ascending places, less their lowest `shift` bits, as bytes."""
        out = np.empty(places.size, np.int64)
        return as_bytes(out) if _quotients(places, before, shift, out) >= ESCAPE else out.astype(np.uint8)

    def pack(self, plane: Array, total: Array) -> None:
        """Sets `total` to 3 total + the digits of signs."""
        _pack(plane, total)


@njit(nogil=True, cache=True)
def _pack(plane: Any, total: Any) -> None:
    for i in range(plane.shape[0]):
        sign = np.uint8(plane[i])
        total[i] = np.uint8(np.uint8(np.uint8(3) * total[i]) + np.uint8((sign & np.uint8(1)) + (sign >> np.uint8(7))))


@njit(nogil=True, cache=True)
def _not_below(block: Any, low: Any, places: Any, values: Any) -> int:
    count = 0
    for i in range(block.shape[0]):
        places[count] = i
        count += abs(block[i]) >= low
    for i in range(count):
        values[i] = block[places[i]]
    return count


@njit(nogil=True, cache=True)
def _inside(block: Any, low: Any, high: Any, out: Any) -> tuple[int, int]:
    above, count = 0, 0
    for i in range(block.shape[0]):
        magnitude = abs(block[i])
        out[count] = magnitude
        above += magnitude > high
        count += (magnitude >= low) & (magnitude <= high)
    return above, count


@njit(nogil=True, cache=True)
def _keep(places: Any, values: Any, limit: Any, ties: int, start: int, positions: Any, signs: Any) -> tuple[int, int]:
    count = 0
    for i in range(values.shape[0]):
        magnitude = abs(values[i])
        tie = (magnitude == limit) & (ties > 0)
        positions[count] = start + places[i]
        signs[count] = 1 - 2 * (values[i] < 0)
        count += (magnitude > limit) | tie
        ties -= tie
    return count, ties


@njit(nogil=True, cache=True)
def _signs(block: Any, limit: Any, out: Any) -> None:
    for i in range(block.shape[0]):
        out[i] = np.int8(block[i] > limit) - np.int8(block[i] < -limit)


@njit(nogil=True, cache=True)
def _quotients(places: Any, before: int, shift: int, out: Any) -> Any:
    largest = (places[0] - before - 1) >> shift
    out[0] = largest
    for i in range(1, places.shape[0]):
        quotient = (places[i] - places[i - 1] - 1) >> shift
        out[i] = quotient
        largest = max(largest, quotient)
    return largest
