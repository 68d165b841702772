"""numba loops of the ternary codec, for large vectors; each gives the bits of the numpy code that calls it.

Vectors have one dimension. Loops that collect write every value and step on only if it counts, so what they write to
needs room for one value more than is found, and no branch is mispredicted.
"""
# mypy: disable-error-code="untyped-decorator"
# (numba's decorators have no types)

from typing import Any

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def not_below(part: Any, low: float, places: Any, values: Any) -> int:
    """Collects places and values of magnitudes of `low` and more; returns how many."""
    count = 0
    for i in range(part.shape[0]):
        value = part[i]
        places[count] = i
        values[count] = value
        count += abs(value) >= low
    return count


@njit(nogil=True, cache=True)
def inside(part: Any, low: float, high: float, out: Any) -> tuple[int, int]:
    """Counts magnitudes above `high`, and collects those from `low` to it; returns both counts."""
    above, count = 0, 0
    for i in range(part.shape[0]):
        magnitude = abs(part[i])
        out[count] = magnitude
        over = magnitude > high
        above += over
        count += (magnitude >= low) & (not over)
    return above, count


@njit(nogil=True, cache=True)
def keep(places: Any, values: Any, limit: float, ties: int, signs: Any) -> tuple[int, int]:
    """Moves the places of magnitudes above `limit`, and the first `ties` equal to it, to the front, with their signs.

    Returns how many there are, and how many ties are left.
    """
    count = 0
    for i in range(values.shape[0]):
        value = values[i]
        magnitude = abs(value)
        tie = (magnitude == limit) & (ties > 0)
        places[count] = places[i]
        signs[count] = 1 - 2 * (value < 0)
        count += (magnitude > limit) | tie
        ties -= tie
    return count, ties


@njit(nogil=True, cache=True)
def signs(part: Any, limit: float, out: Any) -> None:
    """Sets `out` to the signs of magnitudes above `limit`, and to 0 elsewhere."""
    for i in range(part.shape[0]):
        out[i] = np.int8(part[i] > limit) - np.int8(part[i] < -limit)


@njit(nogil=True, cache=True)
def quotients(places: Any, before: int, shift: int, out: Any) -> int:
    """Sets `out` (uint8) to the gaps before `places`, without their lowest `shift` bits; returns the largest."""
    largest = (places[0] - before - 1) >> shift
    out[0] = largest
    for i in range(1, places.shape[0]):
        quotient = (places[i] - places[i - 1] - 1) >> shift
        out[i] = quotient
        largest = max(largest, quotient)
    return largest


@njit(nogil=True, cache=True)
def pack(plane: Any, total: Any) -> None:
    """Sets `total` (uint8) to 3 total + the digits of signs: 0, 1 for plus, 2 for minus."""
    for i in range(plane.shape[0]):
        sign = np.uint8(plane[i])
        total[i] = np.uint8(3) * total[i] + (sign & np.uint8(1)) + (sign >> np.uint8(7))
