"""Count, mean and squared deviation of a vector, block by block."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from fedtune.codecs.plain import ROW
from fedtune.tensors import Array


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with n - 1 in the denominator, as `torch.std` has it; 0 for fewer than two values."""
        return sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def plus(self, other: "Moments") -> "Moments":
        """Joins the moments of two vectors (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        squares = self.squares + other.squares + apart * apart * self.count * other.count / count
        return Moments(count, mean, squares)


def of_block(block: Array, sums: tuple[float, float] | None) -> Moments:
    """Computes the moments of a block; the squares are not finite unless all values are.

    Args:
        block: one-dimensional, not empty.
        sums: of the values of its whole rows and of their squares (`plain.sums`), where these may stand for exact ones:
            the deviation is then right to about 1e-8 of itself, else to 1e-14. They are left aside where squares leave
            the range of float32 or much would cancel.
    """
    size = block.size // ROW * ROW
    if sums is None or not size:
        return _exact(block)
    mean, squares = sums[0] / size, sums[1]
    if not (1e-20 * size < squares < 1e30 and mean * mean * size < 1e-2 * squares):
        return _exact(block)
    whole = Moments(size, mean, squares - mean * mean * size)
    return whole.plus(_exact(block[size:])) if size < block.size else whole


def _exact(block: Array) -> Moments:
    wide = block.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(wide.sum()) / wide.size
        wide -= mean
        return Moments(wide.size, mean, float(np.square(wide, out=wide).sum()))
