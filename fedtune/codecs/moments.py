"""Count, mean and squared deviation of a vector, block by block."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from fedtune.codecs.plain import BLOCK
from fedtune.tensors import Array

_SMALL = 1 << 17
_ROW = 1 << 11


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


def moments(part: Array) -> Moments:
    """Computes the moments of one vector; the squares are not finite unless all values are.

    The deviation is right to about 1e-14 of itself; that of more than 131072 float32 values to about 1e-8, as rows of
    2048 are then summed in float32 where nothing cancels.
    """
    total = Moments()
    for at in range(0, part.size, BLOCK):
        total = total.plus(of_block(part[at : at + BLOCK], part.size))
    return total


def of_block(block: Array, size: int) -> Moments:
    """Computes the moments of one block of a vector of `size` values."""
    exact = block.dtype != np.float32 or size <= _SMALL
    return (None if exact else _quick(block)) or _exact(block)


def _exact(block: Array) -> Moments:
    wide = block.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(wide.sum()) / wide.size
        wide -= mean
        return Moments(wide.size, mean, float(np.square(wide, out=wide).sum()))


def _quick(block: Array) -> Moments | None:
    """Computes in float32; None where that would lose digits."""
    rows = block[: block.size // _ROW * _ROW].reshape(-1, _ROW)
    rest = block[rows.size :].reshape(1, -1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        mean = sum(_products(part, np.ones_like(part[:1])) for part in (rows, rest)) / block.size
        squares = sum(_products(part, part) for part in (rows, rest))
    safe = 1e-20 * block.size < squares < 1e30 and mean * mean * block.size < 1e-2 * squares
    return Moments(block.size, mean, squares - mean * mean * block.size) if safe else None


def _products(left: Array, right: Array) -> float:
    """Sums the inner products of rows; each is short enough for BLAS to stay in one thread."""
    return float(np.matmul(left[:, None], right[:, :, None]).sum(dtype=np.float64))
