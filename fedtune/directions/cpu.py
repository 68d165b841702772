"""The directions on a CPU at the speed of memory: kernels compiled by numba, over tiles that fit the first cache.

`hadamard` is replayed by a Walsh-Hadamard transform in constant geometry: every pass reads quadruples and writes to
four quarters, which rotates the index by two bits, so that after log2 K bits all are in their places again.
`rademacher` adds each coefficient under the mask of its sign bits. Bits equal `reference`, for any number of threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fedtune.directions.kernels import (
    advance_signs,
    gaussian_into,
    hadamard_into,
    hadamard_pattern,
    perturb_signs,
    rademacher_into,
)
from fedtune.directions.pool import TILE, Coefficients, Pool, check_first, check_replay, step_of, unit_of
from fedtune.directions.quantiles import quantiles
from fedtune.tensors import Array

_CHUNK = 16 * TILE  # narrow weights are widened so many at a time
_NO_PATTERN = np.zeros(128, np.uint32)
Kernel = Callable[[Array, int, Array], None]


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
    k0, k1 = pool.keys
    step = step_of(pool, scale, out.dtype == np.float64)
    stream, row, pattern = _signs_of(pool, k)
    size = pool.size if pool.kind == "hadamard" else 0

    def kernel(source: Array, tile: int, target: Array) -> None:
        if pool.kind == "gaussian":
            one = np.array([k]), np.array([1])
            gaussian_into(k0, k1, *one, step, source, tile, target, quantiles())
        else:
            perturb_signs(k0, k1, stream, row, pattern, size, k, target.dtype.type(step), source, tile, target)

    _over(kernel, base, first, out, threads)


def advance(
    pool: Pool,
    k: int,
    change: float,
    ahead: int,
    scale: float,
    weights: Array,
    first: int,
    out: Array,
    threads: int = 1,
) -> None:
    """Adds change * z_k to `weights` in place, sets `out` to weights + scale * z_ahead: one pass over memory."""
    if pool.kind == "gaussian" or weights.dtype != out.dtype or weights.dtype not in (np.float32, np.float64):
        perturb(pool, k, change, weights, first, weights, threads)
        perturb(pool, ahead, scale, weights, first, out, threads)
        return
    double = weights.dtype == np.float64
    kind = weights.dtype.type
    change, scale = step_of(pool, change, double), step_of(pool, scale, double)
    now, then = _signs_of(pool, k), _signs_of(pool, ahead)
    size = pool.size if pool.kind == "hadamard" else 0
    k0, k1 = pool.keys

    def kernel(source: Array, tile: int, target: Array) -> None:
        advance_signs(k0, k1, *now, k, kind(change), *then, ahead, kind(scale), size, source, tile, target)

    _over(kernel, weights, first, out, threads)


def _signs_of(pool: Pool, k: int) -> tuple[int, int, Any]:
    """Stream and row of a direction's signs, and the 128 words of H's row k over a tile."""
    if pool.kind == "hadamard":
        return 2, 0, hadamard_pattern(pool.size, k)
    return 1, k, _NO_PATTERN


def _over(kernel: Kernel, base: Array, first: int, out: Array, threads: int) -> None:
    """Runs a kernel over spans of whole tiles, one a thread."""
    check_first(first)
    tiles = -(-len(base) // TILE)
    step = max(1, -(-tiles // threads)) * TILE

    def run(start: int) -> None:
        span = slice(start, start + step)
        _widened(kernel, base[span], (first + start) // TILE, out[span])

    if tiles * TILE <= step:
        run(0)
        return
    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(run, range(0, len(base), step)))


def _widened(kernel: Kernel, base: Array, tile: int, out: Array) -> None:
    """Gives the kernel float32 where weights are narrower, a chunk at a time."""
    wide = (np.float32, np.float64)
    if base.dtype in wide and out.dtype in wide:
        kernel(base, tile, out)
        return
    for start in range(0, len(base), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        source = np.asarray(base[chunk], base.dtype if base.dtype in wide else np.float32)
        target = np.empty(len(source), out.dtype if out.dtype in wide else np.float32)
        kernel(source, tile + start // TILE, target)
        out[chunk] = target.astype(out.dtype)
