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
def hadamard_into(key0: int, key1: int, coefficients: Any, unit: float, base: Any, tile: int, out: Any) -> None:
    """Adds a replay of a hadamard pool."""
    size = coefficients.shape[0]
    d, e = np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    a, b = np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    for start in range(0, base.shape[0], TILE):
        words(key0, key1, tile + start // TILE, 0, STREAM_D, 32, d)
        words(key0, key1, tile + start // TILE, 0, STREAM_E, 32, e)
        for row in range(ROWS):
            shift = np.uint32(31 - row)
            c, x = coefficients[row * WORDS % size :], a[row * WORDS : (row + 1) * WORDS]
            for v in range(WORDS):
                m = np.int32(np.uint32(e[v] << shift)) >> 31
                x[v] = (c[v] ^ m) - m
        for block in range(0, TILE, size):
            transform(a[block : block + size], b[block : block + size])
        for row in range(ROWS):
            shift = np.uint32(31 - row)
            x = a[row * WORDS : (row + 1) * WORDS]
            for v in range(WORDS):
                m = np.int32(np.uint32(d[v] << shift)) >> 31
                x[v] = (x[v] ^ m) - m
        end = min(start + TILE, base.shape[0])
        add_into(a, unit, base[start:end], out[start:end])


@njit(nogil=True, cache=True)
def transform(a: Any, b: Any) -> None:
    """Walsh-Hadamard transform of `a` in place, with `b` as scratch; the length is a power of two."""
    width = 1
    while width * 16 <= a.shape[0]:
        pass_of_four(a, b)
        pass_of_four(b, a)
        width *= 16
    rest = a.shape[0] // width
    if rest >= 4:
        pass_of_four(a, b)
        a[:] = b
    if rest in (2, 8):
        pass_of_two(a, b)
        a[:] = b


@njit(nogil=True, cache=True)
def pass_of_four(a: Any, b: Any) -> None:
    """Two levels of the transform."""
    q = a.shape[0] // 4
    for i in range(q):
        x0, x1, x2, x3 = a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]
        s, d, t, u = x0 + x1, x0 - x1, x2 + x3, x2 - x3
        b[i], b[i + q], b[i + 2 * q], b[i + 3 * q] = s + t, d + u, s - t, d - u


@njit(nogil=True, cache=True)
def pass_of_two(a: Any, b: Any) -> None:
    """One level of the transform."""
    q = a.shape[0] // 2
    for i in range(q):
        x0, x1 = a[2 * i], a[2 * i + 1]
        b[i], b[i + q] = x0 + x1, x0 - x1


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
    w, a = np.empty(2048, np.uint32), np.empty(TILE, np.int64)
    for start in range(0, base.shape[0], TILE):
        a[:] = 0
        for n in range(ks.shape[0]):
            words(key0, key1, tile + start // TILE, ks[n], STREAM_GAUSSIAN, 512, w)
            c = coefficients[n]
            for v in range(2048):
                low, high = w[v] & np.uint32(0xFFFF), w[v] >> np.uint32(16)
                x, y = np.int64(table[low & 0x7FFF]), np.int64(table[high & 0x7FFF])
                a[v] += c * (-x if low >> 15 else x)
                a[2048 + v] += c * (-y if high >> 15 else y)
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
def sign_words(
    key0: int, key1: int, stream: int, row: int, pattern: Any, size: int, k: int, tile: int, scratch: Any, out: Any
) -> None:
    """Fills `out` (128) with the sign bits of one direction over one tile; `size` is 0 for a rademacher pool."""
    words(key0, key1, tile, row, stream, 32, out)
    if size == 0:
        return
    words(key0, key1, tile, 0, STREAM_E, 32, scratch)
    rows, flips = size // WORDS, 0
    for block in range(TILE // size):
        at = block * size + k
        if (scratch[at % WORDS] >> np.uint32(at // WORDS)) & np.uint32(1):
            flips |= ((1 << rows) - 1) << (block * rows)
    for v in range(WORDS):
        out[v] ^= pattern[v] ^ np.uint32(flips)


@njit(nogil=True, cache=True)
def perturb_signs(
    key0: int, key1: int, stream: int, row: int, pattern: Any, size: int, k: int,
    step: Any, base: Any, tile: int, out: Any,
) -> None:  # fmt: skip  # one direction is one line
    """Sets `out` to base +- step."""
    w, e = np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    for start in range(0, base.shape[0], TILE):
        sign_words(key0, key1, stream, row, pattern, size, k, tile + start // TILE, e, w)
        for r in range(ROWS):
            at = start + r * WORDS
            x, y = base[at : at + WORDS], out[at : at + WORDS]
            for v in range(x.shape[0]):
                y[v] = x[v] - step if (w[v] >> np.uint32(r)) & np.uint32(1) else x[v] + step


@njit(nogil=True, cache=True)
def advance_signs(
    key0: int, key1: int,
    stream: int, row: int, pattern: Any, k: int, change: Any,
    stream2: int, row2: int, pattern2: Any, ahead: int, step: Any,
    size: int, weights: Any, tile: int, out: Any,
) -> None:  # fmt: skip  # one direction is one line
    """Adds +- change to `weights` in place and sets `out` to weights +- step."""
    w, w2, e = np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    for start in range(0, weights.shape[0], TILE):
        here = tile + start // TILE
        sign_words(key0, key1, stream, row, pattern, size, k, here, e, w)
        sign_words(key0, key1, stream2, row2, pattern2, size, ahead, here, e, w2)
        for r in range(ROWS):
            at = start + r * WORDS
            x, y = weights[at : at + WORDS], out[at : at + WORDS]
            bit = np.uint32(r)
            for v in range(x.shape[0]):
                moved = x[v] - change if (w[v] >> bit) & np.uint32(1) else x[v] + change
                x[v] = moved
                y[v] = moved - step if (w2[v] >> bit) & np.uint32(1) else moved + step
