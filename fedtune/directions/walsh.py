"""The numba kernel that replays all directions of a hadamard pool at once, by a Walsh-Hadamard transform."""
# mypy: disable-error-code="untyped-decorator"
# (numba's decorators have no types)

from typing import Any

import numpy as np
from numba import njit

from fedtune.directions.kernels import ROWS, STREAM_D, STREAM_E, TILE, WORDS, add_into, words


@njit(nogil=True, cache=True)
def hadamard_into(key0: int, key1: int, coefficients: Any, unit: float, base: Any, tile: int, out: Any) -> None:
    """Adds a replay of a hadamard pool.

    A tile is 32 rows of 128 words. Coefficients lie turned, one word after another: the levels over words are then
    whole vectors apart, and a word's bits are the signs of neighbours. The levels over rows turn the tile back.
    """
    size = coefficients.shape[0]
    d, e = np.empty(WORDS, np.uint32), np.empty(WORDS, np.uint32)
    a, b, c = np.empty(TILE, np.int32), np.empty(TILE, np.int32), np.empty(TILE, np.int32)
    for i in range(TILE):
        c[i] = coefficients[(i % ROWS * WORDS + i // ROWS) % size]
    for start in range(0, base.shape[0], TILE):
        words(key0, key1, tile + start // TILE, 0, STREAM_D, 32, d)
        words(key0, key1, tile + start // TILE, 0, STREAM_E, 32, e)
        for v in range(WORDS):
            for row in range(ROWS):
                x = c[v * ROWS + row]
                a[v * ROWS + row] = np.int32(-x) if np.int32(e[v] << np.uint32(31 - row)) < 0 else x
        eights(a, 32)
        eights(a, 256)
        twos(a, 2048)
        if size == TILE:
            turn_four(a, b)
            turn_four(b, a)
            turn_two(a, b)
        else:
            turn(a, size // WORDS, b)
        for row in range(ROWS):
            for v in range(WORDS):
                x = b[row * WORDS + v]
                b[row * WORDS + v] = np.int32(-x) if np.int32(d[v] << np.uint32(31 - row)) < 0 else x
        end = min(start + TILE, base.shape[0])
        add_into(b, unit, base[start:end], out[start:end])


@njit(nogil=True, inline="always")
def butterfly(x: Any, y: Any) -> Any:
    """Returns x + y and x - y, kept in 32 bits: numba would widen them to 64."""
    return np.int32(x + y), np.int32(x - y)


@njit(nogil=True, inline="always")
def eights(a: Any, stride: int) -> None:
    """Three levels of the Walsh-Hadamard transform of a tile in place, between numbers `stride` apart and more."""
    s = stride
    for start in range(0, TILE, 8 * s):
        for i in range(start, start + s):
            x0, x4 = butterfly(a[i], a[i + 4 * s])
            x1, x5 = butterfly(a[i + s], a[i + 5 * s])
            x2, x6 = butterfly(a[i + 2 * s], a[i + 6 * s])
            x3, x7 = butterfly(a[i + 3 * s], a[i + 7 * s])
            x0, x2 = butterfly(x0, x2)
            x1, x3 = butterfly(x1, x3)
            x4, x6 = butterfly(x4, x6)
            x5, x7 = butterfly(x5, x7)
            a[i], a[i + s] = butterfly(x0, x1)
            a[i + 2 * s], a[i + 3 * s] = butterfly(x2, x3)
            a[i + 4 * s], a[i + 5 * s] = butterfly(x4, x5)
            a[i + 6 * s], a[i + 7 * s] = butterfly(x6, x7)


@njit(nogil=True, inline="always")
def twos(a: Any, stride: int) -> None:
    """One level, between numbers `stride` apart."""
    for start in range(0, TILE, 2 * stride):
        for i in range(start, start + stride):
            a[i], a[i + stride] = butterfly(a[i], a[i + stride])


@njit(nogil=True, inline="always")
def turn_four(a: Any, b: Any) -> None:
    """The two lowest levels; the two lowest bits of an index become its highest."""
    q = TILE // 4
    for i in range(q):
        x0, x1 = butterfly(a[4 * i], a[4 * i + 1])
        x2, x3 = butterfly(a[4 * i + 2], a[4 * i + 3])
        b[i], b[i + 2 * q] = butterfly(x0, x2)
        b[i + q], b[i + 3 * q] = butterfly(x1, x3)


@njit(nogil=True, inline="always")
def turn_two(a: Any, b: Any) -> None:
    """The lowest level; the lowest bit of an index becomes its highest."""
    for i in range(TILE // 2):
        b[i], b[i + TILE // 2] = butterfly(a[2 * i], a[2 * i + 1])


@njit(nogil=True, cache=True)
def turn(a: Any, rows: int, b: Any) -> None:
    """The levels over blocks of `rows` rows, fewer than 32; turns words of rows into rows of words."""
    stride = 1
    while stride < rows:
        twos(a, stride)
        stride *= 2
    for row in range(ROWS):
        for v in range(WORDS):
            b[row * WORDS + v] = a[v * ROWS + row]
