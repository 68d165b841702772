"""Exact selection of the k largest magnitudes, and the moments of a vector, in passes over blocks that stay in cache.

The k-th largest magnitude is found from a bracket: a sample says between which two values it lies with near certainty,
one pass counts what is above and collects what is inside, and only that is sorted out. A wrong bracket is noticed by
the count, and the whole vector is partitioned instead: the result is exact in either case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from fedtune.tensors import Array

BLOCK = 1 << 16
_SMALL = 1 << 17
_SAMPLE = 1 << 16
_SMALL_SAMPLE = 1 << 12
_SAFETY = 5.0  # standard deviations of the sample's rank


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept: every magnitude above `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int


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


def working(array: Array) -> Array:
    """Returns the values in one dimension, in a type to compute in: float64 for float64, float32 for the others."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat if flat.dtype == np.float64 else flat.astype(np.float32, copy=False)


def kept_count(density: float, size: int) -> int:
    """Returns how many of `size` values a density keeps: the nearest whole number, but one at least above density 0."""
    return min(size, max(1, round(density * size))) if density > 0 else 0


def find_cut(parts: Sequence[Array], count: int) -> Cut:
    """Finds what keeps exactly `count` values of the vectors `parts` taken as one, or all that are not zero if fewer.

    Args:
        parts: one-dimensional, finite, all of the same dtype.
        count: at least 0. Of equal magnitudes at the edge the first are kept.
    """
    size = sum(part.size for part in parts)
    if count <= 0:
        return Cut(inf, 0)
    if count >= size:
        return Cut(0.0, 0)
    cut = _bracketed(parts, count, size) if size > _SMALL else None
    return cut or _edge(np.concatenate([np.abs(part) for part in parts]), count, 0)


def select(part: Array, cut: Cut) -> tuple[Array, Cut]:
    """Finds what of one vector is kept.

    Returns:
        Ascending positions (int64), and the cut for the vectors that follow, with the ties that are left.
    """
    found, left, limit = [], cut.ties, part.dtype.type(cut.value)
    for at, block in _blocks(part):
        if not left:
            places = np.flatnonzero(block > limit)
        else:
            places = np.flatnonzero(block >= limit)
            equal = np.flatnonzero(block[places] == limit)
            places = np.delete(places, equal[left:])
            left -= min(left, equal.size)
        if at:
            places += at
        found.append(places)
    positions = np.concatenate(found) if found else np.zeros(0, np.int64)
    return positions, Cut(cut.value, left)


def select_dense(part: Array, cut: Cut) -> tuple[Array, Cut]:
    """Finds what of one vector is kept, as -1, 0 or 1 for every value (int8); otherwise as `select`."""
    signs, left, limit = np.empty(part.size, np.int8), cut.ties, part.dtype.type(cut.value)
    for at, block in _blocks(part):
        kept = block >= limit if left else block > limit
        if left:
            equal = np.flatnonzero(block == limit)
            kept[equal[left:]] = False
            left -= min(left, equal.size)
        values = part[at : at + BLOCK]
        np.subtract(kept, (kept & np.signbit(values)).view(np.int8) << 1, out=signs[at : at + BLOCK], dtype=np.int8)
    return signs, Cut(cut.value, left)


def share_above(part: Array, cut: Cut) -> float:
    """Estimates the share of a vector that is kept, from a sample; it only decides which form is prepared."""
    sample = np.abs(part[:: part.size // _SMALL_SAMPLE + 1])
    return float(np.count_nonzero(sample >= cut.value)) / max(sample.size, 1)


def moments(part: Array) -> Moments:
    """Computes the moments of one vector."""
    total = Moments()
    for at in range(0, part.size, BLOCK):
        block = part[at : at + BLOCK].astype(np.float64)
        mean = float(block.sum()) / block.size
        block -= mean
        total = total.plus(Moments(block.size, mean, float(np.dot(block, block))))
    return total


def _bracketed(parts: Sequence[Array], count: int, size: int) -> Cut | None:
    """Looks for the cut inside a bracket; None when it is not there."""
    low, high = _bracket(parts, count, size)
    above, inside = 0, []
    for part in parts:
        for _, block in _blocks(part):
            over = block > high
            above += int(np.count_nonzero(over))
            inside.append(block[np.greater(block >= low, over)])
    candidates = np.concatenate(inside)
    return _edge(candidates, count - above, above) if 0 < count - above <= candidates.size else None


def _bracket(parts: Sequence[Array], count: int, size: int) -> tuple[float, float]:
    """Guesses two magnitudes between which the `count`-th largest lies."""
    step = max(1, size // _SAMPLE) | 1
    sample = np.sort(np.abs(np.concatenate([part[::step] for part in parts])))
    share = count / size
    rank, slack = sample.size * (1 - share), _SAFETY * sqrt(sample.size * share * (1 - share)) + 4
    low, high = int(rank - slack), int(rank + slack) + 1
    return (sample[low] if low >= 0 else 0.0), (sample[high] if high < sample.size else inf)


def _edge(magnitudes: Array, count: int, above: int) -> Cut:
    """Returns the cut at the `count`-th largest of `magnitudes`, `above` more being larger than all of them."""
    place = magnitudes.size - count
    value = np.partition(magnitudes, place)[place]
    ties = count - int(np.count_nonzero(magnitudes > value))
    return Cut(float(value), ties if value > 0 else 0)


def _blocks(part: Array) -> Iterator[tuple[int, Array]]:
    """Yields the magnitudes of `part` block by block, each in the same memory, with the place where it starts."""
    buffer = np.empty(min(BLOCK, part.size), part.dtype)
    for at in range(0, part.size, BLOCK):
        block = part[at : at + BLOCK]
        yield at, np.abs(block, out=buffer[: block.size])
