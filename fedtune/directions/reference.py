"""The directions written as plainly as possible: slow, and what every other backend must equal bit for bit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtune.directions.philox import philox
from fedtune.directions.pool import (
    STREAM_D,
    STREAM_E,
    STREAM_GAUSSIAN,
    STREAM_RADEMACHER,
    TILE,
    Coefficients,
    Move,
    Pool,
    check_first,
    check_replay,
    step_of,
    unit_of,
)
from fedtune.directions.quantiles import quantiles
from fedtune.tensors import Array

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


def direction(pool: Pool, k: int, first: int, count: int) -> Ints:
    """Returns z_k at positions `first`, ..., `first + count - 1`, as integers in units of 2**-pool.bits."""
    i = np.arange(first, first + count, dtype=np.int64)
    if pool.kind == "rademacher":
        return signs(pool, STREAM_RADEMACHER, k, i)
    if pool.kind == "gaussian":
        return normals(pool, k, i)
    block, j = i // pool.size, i % pool.size
    return signs(pool, STREAM_D, 0, i) * hadamard(j & k) * signs(pool, STREAM_E, 0, block * pool.size + k)


def signs(pool: Pool, stream: int, row: int, i: Ints) -> Ints:
    """Returns the signs (+1, -1) at positions `i` of a stream."""
    tile, offset = i // TILE, i % TILE
    word, bit = offset % 128, offset // 128
    outputs = philox((32 * tile + word % 32).astype(np.uint64), row, stream, pool.keys)
    chosen = outputs[word // 32, np.arange(len(i))].astype(np.int64)
    return 1 - 2 * ((chosen >> bit) & 1)


def hadamard(both: Ints) -> Ints:
    """Returns (-1)**popcount of each number below 2**16."""
    for shift in (8, 4, 2, 1):
        both = both ^ (both >> shift)
    return 1 - 2 * (both & 1)


def normals(pool: Pool, k: int, i: Ints) -> Ints:
    """Returns normal numbers in 1/4096 at positions `i` of direction `k`."""
    tile, offset = i // TILE, i % TILE
    word, half = offset % 2048, offset // 2048
    outputs = philox((512 * tile + word % 512).astype(np.uint64), k, STREAM_GAUSSIAN, pool.keys)
    u = (outputs[word // 512, np.arange(len(i))].astype(np.int64) >> (16 * half)) & 0xFFFF
    magnitude: Ints = quantiles()[u & 0x7FFF].astype(np.int64)
    return (1 - 2 * (u >> 15)) * magnitude


def replay(pool: Pool, coefficients: Coefficients, exponent: int, base: Array, first: int, out: Array) -> None:
    """Sets `out` to base + 2**-exponent * sum_k c_k z_k, rounded once.

    Args:
        pool: the directions.
        coefficients: c_k, int32 (K,), of summed magnitude below 2**31.
        exponent: of the unit of the coefficients.
        base: weights of one tensor, one-dimensional.
        first: where the tensor begins in the pool.
        out: where the result goes; may be `base`, may have another dtype.
    """
    check_replay(pool, coefficients)
    check_first(first)
    total = np.zeros(len(base), np.int64)
    for k in np.flatnonzero(coefficients).tolist():
        total += int(coefficients[k]) * direction(pool, k, first, len(base))
    out[:] = rounded(base.astype(np.float64) + total.astype(np.float64) * unit_of(pool, exponent), out.dtype)


def perturb(pool: Pool, k: int, scale: float, base: Array, first: int, out: Array) -> None:
    """Sets `out` to base + scale * z_k, rounded once; `scale` is rounded first (`pool.step_of`)."""
    check_first(first)
    step = step_of(pool, scale, out.dtype == np.float64)
    out[:] = rounded(base.astype(np.float64) + direction(pool, k, first, len(base)) * step, out.dtype)


def advance(pool: Pool, moves: Sequence[Move], weights: Array, first: int) -> None:
    """Adds change * z_k to `weights` in place for each move (k, change) in turn, each sum rounded."""
    for move in moves:
        perturb(pool, *move, weights, first, weights)


def spread(
    pool: Pool, k: int, scales: Sequence[float], weights: Array, first: int, outs: Array, move: Move | None = None
) -> None:
    """Adds change * z_moved to `weights` in place, then sets each `outs[j]` to weights + scales[j] * z_k.

    Args:
        pool: the directions.
        k: number of the direction to look along.
        scales: how far; one a row of `outs`.
        weights: of one tensor, one-dimensional (N,).
        first: where they begin in the pool.
        outs: where the results go (S, N).
        move: direction and change that are due before, if any.
    """
    advance(pool, [move] if move else [], weights, first)
    for scale, out in zip(scales, outs, strict=True):
        perturb(pool, k, scale, weights, first, out)


def rounded(values: Doubles, dtype: "np.dtype[np.generic]") -> Array:
    """Rounds float64 to `dtype`; to narrower ones than float32 through float32."""
    return values if dtype == np.float64 else values.astype(np.float32).astype(dtype)
