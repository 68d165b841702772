"""Exact selection of the k largest magnitudes, and the moments of a vector, in passes over blocks that stay in cache.

A sample gives a bracket: two magnitudes between which the k-th largest lies with near certainty. One pass sifts out
what is not below it, and only what is inside is partitioned. A wrong bracket is noticed by the counts, and the sifting
is done again without one: the result is exact in either case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from fedtune.codecs.backend import Work, work
from fedtune.codecs.plain import BLOCK
from fedtune.tensors import Array

_SMALL = 1 << 17
_SAMPLE = 1 << 16
_SMALL_SAMPLE = 1 << 12
_DENSE = 0.3  # from this share on places take more room than a sign for every value
_SAFETY = 5.0  # standard deviations of the sample's rank


@dataclass(frozen=True, slots=True)
class Pick:
    """What is kept of one vector.

    Attributes:
        count: how many values.
        signs: -1 or 1 for each of `positions`; without positions -1, 0 or 1 for every value. int8.
        positions: ascending places, int64.
    """

    count: int
    signs: Array
    positions: Array | None = None


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is kept: every magnitude above `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int


@dataclass(frozen=True, slots=True)
class _Sifted:
    """What of one vector is not below a bracket: how many above it, and the magnitudes inside.

    Where little is, also for each block the places in it, uint16, and the values.
    """

    above: int
    inside: Array
    blocks: list[tuple[Array, Array]] | None = None


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


def pick(parts: Sequence[Array], count: int) -> list[Pick]:
    """Keeps the `count` largest magnitudes of the vectors `parts` taken as one; zeros never.

    Args:
        parts: one-dimensional, finite, all of the same dtype.
        count: at least 0. Of equal magnitudes at the edge the first are kept.
    """
    size = sum(part.size for part in parts)
    how = work(size, parts[0].dtype if parts else np.float32)
    if not 0 < count < size:
        cut = _Cut(0.0 if count else inf, 0)
        return [_pick_dense(part, cut, how)[0] for part in parts]
    sifted, cut = _sift(parts, count, *(_bracket(parts, count, size) if size > _SMALL else (0.0, inf)), how)
    picks = []
    for part, one in zip(parts, sifted, strict=True):
        found, cut = _pick_dense(part, cut, how) if one.blocks is None else _pick_sparse(one.blocks, cut, how)
        picks.append(found)
    return picks


def moments(part: Array) -> Moments:
    """Computes the moments of one vector; the squares are not finite unless all values are.

    The deviation is right to about 1e-14 of itself; that of more than 131072 float32 values to about 1e-8, as blocks
    are then summed in float32 (pairwise) where nothing cancels.
    """
    total, exact = Moments(), part.dtype != np.float32 or part.size <= _SMALL
    buffer = np.empty(0 if exact else BLOCK, np.float32)
    for at in range(0, part.size, BLOCK):
        block = part[at : at + BLOCK]
        one = None if exact else _quick_moments(block, buffer[: block.size])
        total = total.plus(one or _exact_moments(block))
    return total


def _exact_moments(block: Array) -> Moments:
    wide = block.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(wide.sum()) / wide.size
        wide -= mean
        return Moments(wide.size, mean, float(np.square(wide, out=wide).sum()))


def _quick_moments(block: Array, buffer: Array) -> Moments | None:
    """Computes in float32; None where that would lose digits."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        mean, squares = float(block.sum()) / block.size, float(np.square(block, out=buffer).sum())
    safe = 1e-20 * block.size < squares < 1e30 and mean * mean * block.size < 1e-2 * squares
    return Moments(block.size, mean, squares - mean * mean * block.size) if safe else None


def _sift(parts: Sequence[Array], count: int, low: float, high: float, how: Work) -> tuple[list[_Sifted], _Cut]:
    """Finds the cut, and for vectors of which little is kept what is not below `low`."""
    sifted = [_sift_one(part, low, high, how) for part in parts]
    left = count - sum(one.above for one in sifted)
    inside = np.concatenate([one.inside for one in sifted])
    if not 0 < left <= inside.size:
        return _sift(parts, count, 0.0, inf, how)
    value = np.partition(inside, inside.size - left)[inside.size - left]
    ties = left - int(np.count_nonzero(inside > value))
    return sifted, _Cut(float(value), ties if value > 0 else 0)


def _sift_one(part: Array, low: float, high: float, how: Work) -> _Sifted:
    low, high = part.dtype.type(low), part.dtype.type(high)
    sample = np.abs(part[:: part.size // _SMALL_SAMPLE + 1])
    dense = part.size > 0 and np.count_nonzero(sample >= low) >= _DENSE * sample.size
    above, inside, blocks = 0, [part[:0]], []
    for at in range(0, part.size, BLOCK):
        block = part[at : at + BLOCK]
        if not dense:
            blocks.append(how.not_below(block, low))
            block = blocks[-1][1]
        over, found = how.inside(block, low, high)
        above += over
        inside.append(found)
    return _Sifted(above, np.concatenate(inside), None if dense else blocks)


def _pick_sparse(blocks: Sequence[tuple[Array, Array]], cut: _Cut, how: Work) -> tuple[Pick, _Cut]:
    """Keeps what is beyond the cut, and returns the cut for the vectors that follow, with the ties that are left."""
    most, count, left = sum(places.size for places, _ in blocks), 0, cut.ties
    positions, signs = np.empty(most + 1, np.int64), np.empty(most + 1, np.int8)
    for number, (places, values) in enumerate(blocks):
        out, limit = (positions[count:], signs[count:]), values.dtype.type(cut.value)
        found, left = how.keep(places, values, limit, left, number * BLOCK, out)
        count += found
    return Pick(count, signs[:count], positions[:count]), _Cut(cut.value, left)


def _pick_dense(part: Array, cut: _Cut, how: Work) -> tuple[Pick, _Cut]:
    """Keeps as `_pick_sparse`, with a sign for every value."""
    signs, left, limit = np.empty(part.size, np.int8), cut.ties, part.dtype.type(cut.value)
    for at in range(0, part.size, BLOCK):
        block, out = part[at : at + BLOCK], signs[at : at + BLOCK]
        how.signs(block, limit, out)
        if left:
            equal = np.flatnonzero(np.abs(block) == limit)[:left]
            out[equal] = np.sign(block[equal])
            left -= equal.size
    return Pick(int(np.count_nonzero(signs)), signs), _Cut(cut.value, left)


def _bracket(parts: Sequence[Array], count: int, size: int) -> tuple[float, float]:
    """Guesses two magnitudes between which the `count`-th largest lies."""
    step = max(1, size // _SAMPLE) | 1
    sample = np.sort(np.abs(np.concatenate([part[::step] for part in parts])))
    share = count / size
    rank, slack = sample.size * (1 - share), _SAFETY * sqrt(sample.size * share * (1 - share)) + 4
    low, high = int(rank - slack), int(rank + slack) + 1
    return (sample[low] if low >= 0 else 0.0), (sample[high] if high < sample.size else inf)
