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
    """Adds `weight * values`; raises WireError for a magnitude of 2048 and more."""
    check_magnitude(values, name)
    x = values.astype(np.float64)
    high = np.rint(x * 2.0**20)
    low = np.rint((x - high * 2.0**-20) * 2.0**52)
    terms = ExactSum(high.astype(np.int64) * weight, low.astype(np.int64) * weight)
    return terms if total is None else ExactSum(total.high + terms.high, total.low + terms.low)


def check_magnitude(values: Array, name: str, scale: float = 1.0) -> None:
    """Raises WireError when `scale * values` holds a magnitude of 2048 and more."""
    if values.size:
        largest = max(float(values.max()), -float(values.min())) * scale
        if largest >= LIMIT:
            raise WireError(problem(name, f"magnitudes below {LIMIT:.0f}", largest, "Training diverged"))
