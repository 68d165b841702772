"""Every backend gives the reference's bits: any pool, dtype, length, place, number of threads and order of blocks."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions import TILE, Pool, cpu, portable, reference

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BF16])
POOLS = st.one_of(
    st.builds(Pool, st.sampled_from(["rademacher", "gaussian"]), st.integers(0, 2**64 - 1), st.integers(1, 20)),
    st.builds(Pool, st.just("hadamard"), st.integers(0, 2**64 - 1), st.sampled_from([128, 256, 512, 2048, 4096])),
)
PLACES = st.sampled_from([0, 3 * TILE, 2**32 * TILE // 32 - TILE, 2**40])
LENGTHS = st.sampled_from([1, 127, 128, 1000, TILE, TILE + 1, 2 * TILE + 129])


def _weights(seed, count, dtype):
    return (np.random.default_rng(seed).normal(size=count) * 0.05).astype(dtype)


def _coefficients(seed, pool):
    """A dozen seeds in use: the reference walks over the weights once for each."""
    rng = np.random.default_rng(seed)
    used = rng.choice(pool.size, min(pool.size, 12), replace=False)
    c = np.zeros(pool.size, np.int32)
    c[used] = rng.integers(-(2**31) // 12, 2**31 // 12, len(used))
    return c


def _tensor(array):
    return (
        torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        if array.dtype == BF16
        else (torch.from_numpy(array.copy()))
    )


def _bytes(tensor):
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy().tobytes()


@settings(max_examples=40, deadline=None)
@given(POOLS, DTYPES, LENGTHS, PLACES, st.integers(17, 60), st.integers(0, 2**32), st.sampled_from([1, 2, 3]))
def test_replay(pool, dtype, count, first, exponent, seed, threads):
    base, c = _weights(seed, count, dtype), _coefficients(seed, pool)
    want, got = np.empty_like(base), np.empty_like(base)
    reference.replay(pool, c, exponent, base, first, want)
    cpu.replay(pool, c, exponent, base, first, got, threads)
    other = torch.empty_like(_tensor(base))
    portable.replay(pool, c, exponent, _tensor(base), first, other)
    assert got.tobytes() == want.tobytes()
    assert _bytes(other) == want.tobytes()


@settings(max_examples=40, deadline=None)
@given(POOLS, DTYPES, DTYPES, LENGTHS, PLACES, st.floats(-1, 1), st.integers(0, 2**32), st.integers(1, 2), st.data())
def test_perturb(pool, dtype, out_dtype, count, first, scale, seed, threads, data):
    k = data.draw(st.integers(0, pool.size - 1))
    base = _weights(seed, count, dtype)
    want, got = np.empty(count, out_dtype), np.empty(count, out_dtype)
    reference.perturb(pool, k, scale, base, first, want)
    cpu.perturb(pool, k, scale, base, first, got, threads)
    assert got.tobytes() == want.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    POOLS, DTYPES, DTYPES, LENGTHS, PLACES, st.lists(st.floats(-1, 1), min_size=1, max_size=3),
    st.none() | st.floats(-1e-3, 1e-3), st.integers(0, 2**32), st.integers(1, 2), st.data(),
)  # fmt: skip
def test_spread(pool, dtype, out_dtype, count, first, scales, change, seed, threads, data):
    k, moved = data.draw(st.integers(0, pool.size - 1)), data.draw(st.integers(0, pool.size - 1))
    move = None if change is None else (moved, change)
    base = _weights(seed, count, dtype)
    want, got = (np.empty((len(scales), count), out_dtype) for _ in "ab")
    by_reference, by_cpu, by_torch = base.copy(), base.copy(), _tensor(base)
    reference.spread(pool, k, scales, by_reference, first, want, move)
    cpu.spread(pool, k, scales, by_cpu, first, got, move, threads)
    assert got.tobytes() == want.tobytes()
    assert by_cpu.tobytes() == by_reference.tobytes()
    outs = torch.empty_like(_tensor(want))
    portable.spread(pool, k, scales, by_torch, first, outs, move)
    assert _bytes(outs) == want.tobytes()
    assert _bytes(by_torch) == by_reference.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    POOLS, DTYPES, LENGTHS, PLACES, st.lists(st.floats(-1e-2, 1e-2), max_size=5), st.integers(0, 2**32),
    st.integers(1, 2), st.data(),
)  # fmt: skip
def test_advance(pool, dtype, count, first, changes, seed, threads, data):
    """Moves one after another; each is rounded."""
    moves = [(data.draw(st.integers(0, pool.size - 1)), change) for change in changes]
    base = _weights(seed, count, dtype)
    want, by_cpu, by_torch = base.copy(), base.copy(), _tensor(base)
    for k, change in moves:
        reference.perturb(pool, k, change, want, first, want)
    cpu.advance(pool, moves, by_cpu, first, threads)
    portable.advance(pool, moves, by_torch, first)
    assert by_cpu.tobytes() == want.tobytes()
    assert _bytes(by_torch) == want.tobytes()


def test_many_tiles_are_dealt_out_to_threads():
    pool = Pool("hadamard", 7, 4096)
    base = _weights(1, 200 * TILE + 17, np.float32)
    outs = [np.empty((2, len(base)), np.float32) for _ in "ab"]
    moved = [base.copy(), base.copy()]
    for threads, out, weights in zip((1, 3), outs, moved, strict=True):
        cpu.spread(pool, 5, (1e-3, -1e-3), weights, TILE, out, (9, 1e-4), threads)
    assert outs[0].tobytes() == outs[1].tobytes()
    assert moved[0].tobytes() == moved[1].tobytes() != base.tobytes()


@pytest.mark.parametrize("kind", ["hadamard", "rademacher", "gaussian"])
def test_order_of_blocks_does_not_matter(kind):
    pool = Pool(kind, 7, 4096 if kind == "hadamard" else 50)
    base, c = _weights(1, 5 * TILE + 17, np.float32), _coefficients(1, pool)
    whole, parts = np.empty_like(base), np.empty_like(base)
    cpu.replay(pool, c, 30, base, TILE, whole)
    for block in (3, 0, 5, 1, 4, 2):
        span = slice(block * TILE, (block + 1) * TILE)
        cpu.replay(pool, c, 30, base[span], TILE + block * TILE, parts[span])
    assert parts.tobytes() == whole.tobytes()


def test_the_full_pool_equals_the_reference():
    pool = Pool("hadamard", 99, 4096)
    base, c = _weights(2, TILE + 40, np.float32), _coefficients(2, pool)
    want, got = np.empty(40, np.float32), np.empty_like(base)
    reference.replay(pool, c, 35, base[TILE:], 9 * TILE, want)
    cpu.replay(pool, c, 35, base, 8 * TILE, got)
    assert got[TILE:].tobytes() == want.tobytes()


def test_narrow_base_may_be_replayed_into_wide_weights():
    pool = Pool("hadamard", 5, 128)
    base, c = _weights(3, 200, BF16), _coefficients(3, pool)
    want, got = np.empty(200, np.float32), np.empty(200, np.float32)
    reference.replay(pool, c, 30, base, 0, want)
    cpu.replay(pool, c, 30, base, 0, got)
    assert got.tobytes() == want.tobytes()
