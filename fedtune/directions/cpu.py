"""The directions on a CPU at the speed of memory: kernels compiled by numba, over tiles that fit the first cache.

`hadamard` is replayed by a Walsh-Hadamard transform (`walsh`): the levels over the 128 words of a tile work on whole
vectors in place; those over its 32 rows read quadruples and write to four quarters, which brings all to their places.
`rademacher` adds each coefficient under the mask of its sign bits. Bits equal `reference`, for any number of threads.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.directions.kernels import (
    advance_signs,
    gaussian_into,
    hadamard_pattern,
    rademacher_into,
    spread_normals,
    spread_signs,
)
from fedtune.directions.pool import TILE, Coefficients, Move, Pool, check_first, check_replay, step_of, unit_of
from fedtune.directions.quantiles import quantiles
from fedtune.directions.walsh import hadamard_into
from fedtune.tensors import Array

_CHUNK = 16 * TILE  # narrow weights are widened so many at a time
_NO_PATTERN = np.zeros(128, np.uint32)
_WIDE = (np.dtype(np.float32), np.dtype(np.float64))
_LEAST = 64  # tiles a thread: fewer are not worth one
Kernel = Callable[[Array, int, Array], None]
Dtype: TypeAlias = np.dtype[Any]


def replay(
    pool: Pool, coefficients: Coefficients, exponent: int, base: Array, first: int, out: Array, threads: int = 1
) -> None:
    """Sets `out` to base + 2**-exponent * sum_k c_k z_k, rounded once; see `reference.replay`."""
    check_replay(pool, coefficients)
    k0, k1 = pool.keys
    unit = unit_of(pool, exponent)
    used = np.flatnonzero(coefficients)
    c = coefficients[used].astype(np.int64)

    def kernel(source: Array, tile: int, target: Array) -> None:
        if pool.kind == "hadamard":
            hadamard_into(k0, k1, coefficients, unit, source, tile, target)
        elif pool.kind == "rademacher":
            rademacher_into(k0, k1, used, c, unit, source, tile, target)
        else:
            gaussian_into(k0, k1, used, c, unit, source, tile, target, quantiles())

    _over(kernel, base, first, out, threads)


def perturb(pool: Pool, k: int, scale: float, base: Array, first: int, out: Array, threads: int = 1) -> None:
    """Sets `out` to base + scale * z_k, rounded once; see `reference.perturb`."""
    _over(_spreading(pool, k, (scale,), None, np.dtype(np.float32), out.dtype), base, first, out[None], threads)


def advance(pool: Pool, moves: Sequence[Move], weights: Array, first: int, threads: int = 1) -> None:
    """Adds change * z_k to `weights` in place for each move (k, change) in turn, each sum rounded.

    One pass over memory, for float32 and float64 weights. See `reference.advance`.
    """
    if weights.dtype not in _WIDE or pool.kind == "gaussian":
        for move in moves:
            perturb(pool, *move, weights, first, weights, threads)
        return
    double = weights.dtype == np.float64
    ks = np.array([k for k, _ in moves], np.int64)
    changes = np.array([step_of(pool, change, double) for _, change in moves], weights.dtype)
    patterns = np.stack([_NO_PATTERN, *(_pattern(pool, k) for k, _ in moves)])[1:]
    size = pool.size if pool.kind == "hadamard" else 0

    def signs(source: Array, tile: int, _: Array) -> None:
        advance_signs(*pool.keys, size, ks, changes, patterns, source, tile)

    _over(signs, weights, first, weights, threads)


def spread(
    pool: Pool,
    k: int,
    scales: Sequence[float],
    weights: Array,
    first: int,
    outs: Array,
    move: Move | None = None,
    threads: int = 1,
) -> None:
    """Adds change * z_moved to `weights` in place, then sets each `outs[j]` to weights + scales[j] * z_k.

    One pass over memory, for float32 and float64 weights. See `reference.spread`.
    """
    if move and weights.dtype not in _WIDE:
        advance(pool, [move], weights, first, threads)
        move = None
    _over(_spreading(pool, k, scales, move, weights.dtype, outs.dtype), weights, first, outs, threads)


def _spreading(pool: Pool, k: int, scales: Sequence[float], move: Move | None, kind: Dtype, out_kind: Dtype) -> Kernel:
    """Makes the kernel of `spread` for weights and results of some dtypes."""
    double = out_kind == np.float64
    steps = np.array([step_of(pool, scale, double) for scale in scales], np.float64)
    moved, change = move or (-1, 0.0)
    change = step_of(pool, change, kind == np.float64)
    if pool.kind == "gaussian":

        def normal(source: Array, tile: int, targets: Array) -> None:
            spread_normals(*pool.keys, moved, change, k, steps, source, tile, targets, quantiles())

        return normal
    size = pool.size if pool.kind == "hadamard" else 0
    now, before = _pattern(pool, k), _pattern(pool, max(moved, 0))
    # Signs times a step of 24 bits: float32 arithmetic gives the bits of float64 rounded once (`pool.step_of`).
    exact, typed = _bits(np.array([change]), kind == np.float64), _bits(steps, double)

    def signs(source: Array, tile: int, targets: Array) -> None:
        spread_signs(*pool.keys, size, moved, exact, before, k, typed, now, source, tile, targets)

    return signs


def _bits(numbers: npt.NDArray[np.float64], double: bool) -> Array:
    return numbers.view(np.uint64) if double else numbers.astype(np.float32).view(np.uint32)


@lru_cache(4096)
def _pattern(pool: Pool, k: int) -> Any:
    """The 128 words of H's row k over a tile."""
    return hadamard_pattern(pool.size, k) if pool.kind == "hadamard" else _NO_PATTERN


def _over(kernel: Kernel, base: Array, first: int, out: Array, threads: int) -> None:
    """Runs a kernel over spans of whole tiles, one a thread; `out` has the weights on its last axis."""
    check_first(first)
    tiles = -(-len(base) // TILE)
    step = max(_LEAST, -(-tiles // threads)) * TILE

    def run(start: int) -> None:
        span = slice(start, start + step)
        _widened(kernel, base[span], (first + start) // TILE, out[..., span])

    if tiles * TILE <= step:
        run(0)
        return
    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(run, range(0, len(base), step)))


def _widened(kernel: Kernel, base: Array, tile: int, out: Array) -> None:
    """Gives the kernel float32 where weights are narrower, a chunk at a time."""
    if base.dtype in _WIDE and out.dtype in _WIDE:
        kernel(base, tile, out)
        return
    for start in range(0, len(base), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        source = np.asarray(base[chunk], base.dtype if base.dtype in _WIDE else np.float32)
        target = np.empty(out[..., chunk].shape, out.dtype if out.dtype in _WIDE else np.float32)
        kernel(source, tile + start // TILE, target)
        out[..., chunk] = target.astype(out.dtype)
