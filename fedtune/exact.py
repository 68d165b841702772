"""Sums that do not depend on the order of their terms.

Floating-point addition rounds, so the same updates summed in another order give other bits. Integers do not. A value
x is split into two 32-bit digits of a fixed-point number with 52 bits behind the point,

    x = high * 2^-20 + low * 2^-52,    |low| <= 2^31,

each is multiplied by the integer weight and added into an int64. The bounds |x| < 2^11 and total weight < 2^31 keep
both sums below 2^62: they cannot overflow.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.errors import WireError, problem
from fedtune.tensors import Array

LIMIT = 2048.0
_BLOCK = 2**14
MAX_TOTAL_WEIGHT = 2**31 - 1  # `fedtune.rounds.Round` sees to it


@dataclass(frozen=True, slots=True)
class ExactSum:
    """sum_k weight_k * x_k as two int64 digits; 16 bytes a value."""

    high: npt.NDArray[np.int64]
    low: npt.NDArray[np.int64]

    def mean(self, weight: int, dtype: np.dtype[np.generic]) -> Array:
        """Divides by the total weight in float64 and rounds to `dtype`.

        Guarantees: with a single term, float32 values of magnitude 2^-29 and above, and +0, come back bit for bit;
        -0 comes back as +0.
        """
        return ((self.high / weight) * 2.0**-20 + (self.low / weight) * 2.0**-52).astype(dtype)


def add(total: ExactSum | None, values: Array, weight: int, name: str) -> ExactSum:
    """Adds `weight * values` into `total`, in place, and returns it; None starts a new sum.

    Raises:
        WireError: a magnitude of 2048 and more; `total` is as it was.
    """
    check_magnitude(values, name)
    if total is None:
        total = ExactSum(np.zeros(values.shape, np.int64), np.zeros(values.shape, np.int64))
    x, high, low = values.reshape(-1), total.high.reshape(-1), total.low.reshape(-1)
    for start in range(0, x.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        _add_block(x[part], weight, high[part], low[part])
    return total


def add_at(total: ExactSum, places: Array | None, signs: Array, value: float, weight: int) -> None:
    """Adds `weight * value * sign` to a flattened sum, in place.

    Args:
        total: the sum, contiguous.
        places: distinct; None for all, one after another.
        signs: for each of them -1 or 1, or 0, which adds nothing (int8).
        value: below 2048 in magnitude, as `check_magnitude` says.
        weight: of the update.

    Guarantees: the same sum as `add` of the dense array.
    """
    one = ExactSum(np.zeros(1, np.int64), np.zeros(1, np.int64))
    _add_block(np.array([value]), weight, one.high, one.low)
    digits = [(total.high.reshape(-1), one.high[0]), (total.low.reshape(-1), one.low[0])]
    for start in range(0, signs.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        here, wide = part if places is None else places[part], signs[part].astype(np.int64)
        for flat, term in digits:
            flat[here] += wide * term


def check_magnitude(values: Array, name: str, scale: float = 1.0) -> None:
    """Raises WireError when `scale * values` holds a magnitude of 2048 and more."""
    if values.size:
        largest = max(float(values.max()), -float(values.min())) * scale
        if largest >= LIMIT:
            raise WireError(problem(name, f"magnitudes below {LIMIT:.0f}", largest, "Training diverged"))


def _add_block(x: Array, weight: int, high: npt.NDArray[np.int64], low: npt.NDArray[np.int64]) -> None:
    """Adds a block small enough to stay in the cache through all of its passes; every step but `rint` is exact."""
    rest = x.astype(np.float64)
    rest *= 2.0**20
    digit = np.rint(rest)
    rest -= digit
    rest *= 2.0**32
    for total, value in ((high, digit), (low, np.rint(rest))):
        term = value.astype(np.int64)
        term *= weight
        total += term
