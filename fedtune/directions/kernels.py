"""numba kernels of `fedtune.directions.cpu`. Each works through whole tiles; the last one of a tensor may be short.

Loops run over 128 neighbouring weights, which share a bit number, so that a compiler can use its vectors.
"""
# mypy: disable-error-code="untyped-decorator"
# (numba's decorators have no types)

from typing import Any

import numpy as np
from numba import njit

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
HIGH = np.uint64(32)
TILE, WORDS, ROWS = 4096, 128, 32
STREAM_RADEMACHER, STREAM_D, STREAM_E, STREAM_GAUSSIAN = 1, 2, 3, 4


@njit(nogil=True, cache=True)
def words(key0: int, key1: int, tile: int, row: int, stream: int, lanes: int, out: Any) -> None:
    """Fills `out` (4 * lanes) with the four outputs of counters lanes * tile, ..., one output after another."""
    for j in range(lanes):
        c = np.uint64(tile) * np.uint64(lanes) + np.uint64(j)
        x0, x1, x2, x3 = np.uint32(c), np.uint32(c >> HIGH), np.uint32(row), np.uint32(stream)
        k0, k1 = np.uint32(key0), np.uint32(key1)
        for _ in range(10):
            p0, p1 = M0 * np.uint64(x0), M1 * np.uint64(x2)
            x0 = np.uint32(np.uint32(p1 >> HIGH) ^ x1 ^ k0)
            x2 = np.uint32(np.uint32(p0 >> HIGH) ^ x3 ^ k1)
            x1, x3 = np.uint32(p1), np.uint32(p0)
            k0, k1 = np.uint32(k0 + W0), np.uint32(k1 + W1)
        out[j], out[lanes + j], out[2 * lanes + j], out[3 * lanes + j] = x0, x1, x2, x3


@njit(nogil=True, cache=True)
def add_into(total: Any, unit: float, base: Any, out: Any) -> None:
    """Sets `out` to base + total * unit in float64, rounded once."""
    for i in range(base.shape[0]):
        out[i] = np.float64(base[i]) + np.float64(total[i]) * unit


@njit(nogil=True, cache=True)
def rademacher_into(
    key0: int, key1: int, ks: Any, coefficients: Any, unit: float, base: Any, tile: int, out: Any
) -> None:
    """Adds a replay of a rademacher pool: sum c - 2 * sum of c where the bit says minus."""
    w, a = np.empty(WORDS, np.uint32), np.empty(TILE, np.int32)
    all_of_them = np.int32(coefficients.sum())
    for start in range(0, base.shape[0], TILE):
        a[:] = all_of_them
        for n in range(ks.shape[0]):
            words(key0, key1, tile + start // TILE, ks[n], STREAM_RADEMACHER, 32, w)
            minus = np.int32(-2 * coefficients[n])
            for row in range(ROWS):
                bit = np.uint32(1 << row)
                for v in range(WORDS):
                    if w[v] & bit:
                        a[row * WORDS + v] += minus
        end = min(start + TILE, base.shape[0])
        add_into(a, unit, base[start:end], out[start:end])


@njit(nogil=True, cache=True)
def gaussian_into(
    key0: int, key1: int, ks: Any, coefficients: Any, unit: float, base: Any, tile: int, out: Any, table: Any
) -> None:
    """Adds a replay of a gaussian pool."""
    w, z, a = np.empty(2048, np.uint32), np.empty(TILE, np.int32), np.empty(TILE, np.int64)
    for start in range(0, base.shape[0], TILE):
        a[:] = 0
        for n in range(ks.shape[0]):
            normals(key0, key1, ks[n], tile + start // TILE, w, table, z)
            c = coefficients[n]
            for v in range(TILE):
                a[v] += c * np.int64(z[v])
        end = min(start + TILE, base.shape[0])
        add_into(a, unit, base[start:end], out[start:end])


@njit(cache=True)
def hadamard_pattern(size: int, k: int) -> Any:
    """Returns row k of H over a tile, as words of sign bits (128,)."""
    out = np.zeros(WORDS, np.uint32)
    for offset in range(TILE):
        both = offset % size & k
        for shift in (8, 4, 2, 1):
            both ^= both >> shift
        out[offset % WORDS] |= np.uint32((both & 1) << (offset // WORDS))
    return out


@njit(nogil=True, cache=True)
def flips_of(key0: int, key1: int, size: int, k: int, tile: int) -> int:
    """Returns, as 32 bits, which rows of 128 weights of a tile have E(b K + k) = -1."""
    rows, flips = size // WORDS, 0
    four = np.empty(4, np.uint32)
    for block in range(TILE // size):
        at = block * size + k
        v = at % WORDS
        words(key0, key1, np.uint64(tile) * np.uint64(32) + np.uint64(v % 32), 0, STREAM_E, 1, four)
        if (four[v // 32] >> np.uint32(at // WORDS)) & np.uint32(1):
            flips |= ((1 << rows) - 1) << (block * rows)
    return flips


@njit(nogil=True, cache=True)
def sign_words(key0: int, key1: int, k: int, pattern: Any, size: int, tile: int, d: Any, out: Any) -> None:
    """Fills `out` (128) with the sign bits of direction k over one tile.

    A hadamard pool (size above 0) reads D from `d`; a rademacher pool draws.
    """
    if size == 0:
        words(key0, key1, tile, k, STREAM_RADEMACHER, 32, out)
        return
    flips = np.uint32(flips_of(key0, key1, size, k, tile))
    for v in range(WORDS):
        out[v] = d[v] ^ pattern[v] ^ flips


@njit(nogil=True, cache=True)
def spread_signs(
    key0: int, key1: int, size: int,
    moved: int, change: Any, moved_pattern: Any,
    k: int, steps: Any, pattern: Any,
    weights: Any, tile: int, outs: Any,
) -> None:  # fmt: skip  # one direction is one line
    """Adds +- change to `weights` in place (unless moved < 0), then sets outs[j] to weights +- |steps[j]|.

    `change` (1,) and `steps` (S,) are the bits of numbers of the dtypes of `weights` and `outs`: a sign is put onto a
    number by flipping its highest bit.
    """
    d, w, before = np.empty(WORDS, np.uint32), np.empty(WORDS, steps.dtype), np.empty(WORDS, change.dtype)
    flipped, due = np.empty(WORDS, steps.dtype), np.empty(WORDS, change.dtype)
    step, moves = flipped.view(outs.dtype), due.view(weights.dtype)
    top = steps.dtype.type(1) << steps.dtype.type(8 * steps.itemsize - 1)
    pair = steps.shape[0] == 2 and steps[0] ^ steps[1] == top
    for start in range(0, weights.shape[0], TILE):
        here = tile + start // TILE
        if size:
            words(key0, key1, here, 0, STREAM_D, 32, d)
        sign_words(key0, key1, k, pattern, size, here, d, w)
        if moved >= 0:
            sign_words(key0, key1, moved, moved_pattern, size, here, d, before)
        for r in range(min(ROWS, (weights.shape[0] - start + WORDS - 1) // WORDS)):
            at = start + r * WORDS
            x = weights[at : at + WORDS]
            flip(w, r, steps[0], flipped)
            if moved >= 0:
                flip(before, r, change[0], due)
            if pair and moved >= 0:
                advance_pair(x, moves, step, outs[0, at : at + WORDS], outs[1, at : at + WORDS])
                continue
            if moved >= 0:
                for v in range(x.shape[0]):
                    x[v] += moves[v]
            for j in range(steps.shape[0]):
                flip(w, r, steps[j], flipped)
                y = outs[j, at : at + WORDS]
                for v in range(x.shape[0]):
                    y[v] = x[v] + step[v]


@njit(nogil=True, cache=True)
def advance_signs(
    key0: int, key1: int, size: int, ks: Any, changes: Any, patterns: Any, weights: Any, tile: int
) -> None:
    """Adds +- change to `weights` in place, one direction after another: a tile stays in the cache meanwhile.

    `changes` (M,) are of the dtype of `weights`; `patterns` (M, 128).
    """
    d, w = np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    for start in range(0, weights.shape[0], TILE):
        here = tile + start // TILE
        if size:
            words(key0, key1, here, 0, STREAM_D, 32, d)
        for n in range(ks.shape[0]):
            sign_words(key0, key1, ks[n], patterns[n], size, here, d, w)
            for r in range(min(ROWS, (weights.shape[0] - start + WORDS - 1) // WORDS)):
                x = weights[start + r * WORDS : start + (r + 1) * WORDS]
                for v in range(x.shape[0]):
                    x[v] += -changes[n] if np.int32(w[v] << np.uint32(31 - r)) < 0 else changes[n]


@njit(nogil=True, inline="always")
def advance_pair(x: Any, move: Any, step: Any, plus: Any, minus: Any) -> None:
    """Adds a move to x, and sets the two looks of a step: all in registers."""
    for v in range(x.shape[0]):
        here = x[v] + move[v]
        x[v] = here
        plus[v] = here + step[v]
        minus[v] = here - step[v]


@njit(nogil=True, inline="always")
def flip(signs: Any, row: int, bits: Any, out: Any) -> None:
    """Sets `out` (128) to `bits`, its highest bit flipped where bit `row` of `signs` is set."""
    up = out.dtype.type(8 * out.itemsize - 1 - row)
    top = out.dtype.type(1 << (8 * out.itemsize - 1))
    for v in range(WORDS):
        out[v] = (signs[v] << up & top) ^ bits  # a left shift: a compiler sees that 32 bits are enough for it


@njit(nogil=True, cache=True)
def spread_normals(
    key0: int, key1: int,
    moved: int, change: float,
    k: int, steps: Any,
    weights: Any, tile: int, outs: Any, table: Any,
) -> None:  # fmt: skip  # one direction is one line
    """Adds change * z_moved to `weights` in place (unless moved < 0), then sets outs[j] to weights + steps[j] * z_k."""
    words_ = np.empty(2048, np.uint32)
    z, before = np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    for start in range(0, weights.shape[0], TILE):
        here = tile + start // TILE
        normals(key0, key1, k, here, words_, table, z)
        x = weights[start : start + TILE]
        if moved >= 0:
            normals(key0, key1, moved, here, words_, table, before)
            add_into(before, change, x, x)
        for j in range(steps.shape[0]):
            add_into(z, steps[j], x, outs[j, start : start + TILE])


@njit(nogil=True, cache=True)
def normals(key0: int, key1: int, k: int, tile: int, scratch: Any, table: Any, out: Any) -> None:
    """Fills `out` (4096) with the integers of direction k over one tile of a gaussian pool."""
    words(key0, key1, tile, k, STREAM_GAUSSIAN, 512, scratch)
    for v in range(2048):
        low, high = scratch[v] & np.uint32(0xFFFF), scratch[v] >> np.uint32(16)
        x, y = np.int32(table[low & 0x7FFF]), np.int32(table[high & 0x7FFF])
        out[v] = -x if low >> 15 else x
        out[2048 + v] = -y if high >> 15 else y
