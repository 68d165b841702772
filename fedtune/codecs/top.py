"""Exact selection of the k largest magnitudes, in passes over blocks that stay in cache.

A sample gives a bracket: two magnitudes between which the k-th largest lies with near certainty. One pass counts what
is above the bracket and takes out what is inside, and only that is partitioned; another keeps what is beyond the cut.
A wrong bracket is noticed by the counts, and the first pass is done again without one: the result is exact in either
case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import numpy as np

from fedtune.codecs.backend import Work, work
from fedtune.codecs.moments import Moments, of_block
from fedtune.codecs.plain import BLOCK
from fedtune.tensors import Array

_SMALL = 1 << 17
_SAMPLE = 1 << 16
_DENSE = 0.3  # from this share on places take more room than a sign for every value
_SAFETY = 5.0  # standard deviations of the sample's rank
_INT32 = 1 << 31


@dataclass(frozen=True, slots=True)
class Pick:
    """What is kept of one vector.

    Attributes:
        count: how many values.
        signs: -1 or 1 for each of `positions`; without positions -1, 0 or 1 for every value. int8.
        positions: ascending places, int32, or int64 where these do not reach.
        moments: of the whole vector, if they were asked for.
    """

    count: int
    signs: Array
    positions: Array | None
    moments: Moments


@dataclass(frozen=True, slots=True)
class _Cut:
    """What is kept: every magnitude above `value`, and the first `ties` of those equal to it (None: all)."""

    value: float
    ties: int | None = None


@dataclass(frozen=True, slots=True)
class _Seen:
    """What of one vector is above a bracket, and the magnitudes inside it, block by block."""

    above: int
    inside: list[Array]
    moments: Moments


def working(array: Array) -> Array:
    """Returns the values in one dimension, in a type to compute in: float64 for float64, float32 for the others."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat if flat.dtype == np.float64 else flat.astype(np.float32, copy=False)


def kept_count(density: float, size: int) -> int:
    """Returns how many of `size` values a density keeps: the nearest whole number, but one at least above density 0."""
    return min(size, max(1, round(density * size))) if density > 0 else 0


def pick(parts: Sequence[Array], count: int, with_moments: bool = False) -> list[Pick]:
    """Keeps the `count` largest magnitudes of the vectors `parts` taken as one; zeros never.

    Args:
        parts: one-dimensional, all of the same dtype; finite, unless moments are asked for: then nothing is kept where
            one is not, and the squares of its part's moments are not finite either.
        count: at least 0. Of equal magnitudes at the edge the first are kept.
        with_moments: whether to compute them.
    """
    size = sum(part.size for part in parts)
    how = work(size, parts[0].dtype if parts else np.float32)
    some = 0 < count < size
    low, high = _bracket(parts, count, size) if some and size > _SMALL else (0.0 if some else inf, inf)
    seen = [_see(part, low, high, how, with_moments) for part in parts]
    if not all(isfinite(one.moments.squares) for one in seen):
        return [Pick(0, np.zeros(0, np.int8), np.zeros(0, np.int32), one.moments) for one in seen]
    cut = _cut(seen, count) if some else _Cut(0.0 if count else inf)
    if cut is None:
        seen = [_see(part, 0.0, inf, how, with_moments) for part in parts]
        cut = _cut(seen, count) or _Cut(inf)
    picks = []
    for part, one in zip(parts, seen, strict=True):
        found, cut = _keep(part, one, cut, how)
        picks.append(found)
    return picks


def _bracket(parts: Sequence[Array], count: int, size: int) -> tuple[float, float]:
    """Guesses two magnitudes between which the `count`-th largest lies."""
    step = max(1, size // _SAMPLE) | 1
    sample = np.sort(np.abs(np.concatenate([part[::step] for part in parts])))
    share = count / size
    rank, slack = sample.size * (1 - share), _SAFETY * sqrt(sample.size * share * (1 - share)) + 4
    low, high = int(rank - slack), int(rank + slack) + 1
    return (sample[low] if low >= 0 else 0.0), (sample[high] if high < sample.size else inf)


def _see(part: Array, low: float, high: float, how: Work, with_moments: bool) -> _Seen:
    low, high = part.dtype.type(low), part.dtype.type(high)
    above, inside, total = 0, [], Moments()
    quick = with_moments and part.size > _SMALL and part.dtype == np.float32
    for at in range(0, part.size, BLOCK):
        block, sums = part[at : at + BLOCK], None
        if quick:
            over, found, sums = how.inside_and_sums(block, low, high)
        else:
            over, found = how.inside(block, low, high)
        if with_moments:
            total = total.plus(of_block(block, sums))
        above += over
        inside.append(found)
    return _Seen(above, inside, total)


def _cut(seen: Sequence[_Seen], count: int) -> _Cut | None:
    """Finds the cut; None where the bracket does not hold it."""
    left = count - sum(one.above for one in seen)
    inside = np.concatenate([block for one in seen for block in one.inside])
    if not 0 < left <= inside.size:
        return None
    value = np.partition(inside, inside.size - left)[inside.size - left]
    ties = left - int(np.count_nonzero(inside > value))
    return _Cut(float(value), ties if ties < np.count_nonzero(inside == value) else None)


def _keep(part: Array, seen: _Seen, cut: _Cut, how: Work) -> tuple[Pick, _Cut]:
    """Keeps what is beyond the cut, and returns the cut for the vectors that follow, with the ties that are left."""
    limit = max(part.dtype.type(cut.value), np.nextafter(part.dtype.type(0), part.dtype.type(1)))
    most = seen.above + sum(int(np.count_nonzero(block >= limit)) for block in seen.inside) if cut.value else part.size
    late, cut = _late(part, seen, limit, cut)
    if most >= _DENSE * part.size:
        return Pick(*_dense(part, limit, late, how), None, seen.moments), cut
    return Pick(*_sparse(part, limit, late, how, most), seen.moments), cut


def _late(part: Array, seen: _Seen, limit: Array, cut: _Cut) -> tuple[dict[int, Array], _Cut]:
    """Finds the ties that are not kept: for each block that has any their places, and the ties left for others."""
    left, late = cut.ties, {}
    if left is None:
        return {}, cut
    for number, inside in enumerate(seen.inside):
        ties = int(np.count_nonzero(inside == limit))
        if ties > left:
            block = part[number * BLOCK : (number + 1) * BLOCK]
            late[number * BLOCK] = np.flatnonzero(np.abs(block) == limit)[left:]
        left -= min(left, ties)
    return late, _Cut(cut.value, left)


def _sparse(part: Array, limit: Array, late: dict[int, Array], how: Work, most: int) -> tuple[int, Array, Array]:
    """Signs and places of what is kept."""
    positions = np.empty(most + 1, np.int32 if part.size < _INT32 else np.int64)
    signs, count = np.empty(most + 1, np.int8), 0
    for at in range(0, part.size, BLOCK):
        end = count + how.keep(part[at : at + BLOCK], limit, at, positions[count:], signs[count:])
        if at in late:
            on_time = ~np.isin(positions[count:end], late[at] + at)
            kept = count + int(np.count_nonzero(on_time))
            positions[count:kept], signs[count:kept] = positions[count:end][on_time], signs[count:end][on_time]
            end = kept
        count = end
    return count, signs[:count], positions[:count]


def _dense(part: Array, limit: Array, late: dict[int, Array], how: Work) -> tuple[int, Array]:
    """A sign for every value."""
    signs = np.empty(part.size, np.int8)
    for at in range(0, part.size, BLOCK):
        how.signs(part[at : at + BLOCK], limit, signs[at : at + BLOCK])
        if at in late:
            signs[late[at] + at] = 0
    return int(np.count_nonzero(signs)), signs
