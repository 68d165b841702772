"""Factored products against the dense matrices they stand for."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.lowrank import inner, inner_products, recompress, squared_distances, squared_norm

SIZES, RANKS, SEEDS = st.integers(1, 24), st.integers(0, 40), st.integers(0, 2**32)


def _pair(rng, inputs, outputs, rank, scale=1.0):
    return rng.normal(size=(rank, inputs)) * scale, rng.normal(size=(outputs, rank))


def _rng(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def _dense(a_ri, b_or):
    return b_or.astype(np.float64) @ a_ri.astype(np.float64)


@settings(max_examples=300, deadline=None)
@given(SIZES, SIZES, RANKS, st.floats(1e-6, 1e6), SEEDS)
def test_the_product_stays_and_its_rank_is_the_true_one(inputs, outputs, rank, scale, seed):
    a, b = _pair(_rng(seed), inputs, outputs, rank, scale)
    got = recompress(a, b)
    want = _dense(a, b)
    assert np.linalg.norm(_dense(got.a_ri, got.b_or) - want) <= 1e-13 * np.linalg.norm(want)
    assert got.a_ri.shape == (min(rank, inputs, outputs), inputs)
    assert got.b_or.shape == (outputs, got.a_ri.shape[0])
    assert got.error < 1e-12


@settings(max_examples=200, deadline=None)
@given(SIZES, SIZES, st.integers(1, 40), st.integers(1, 12), SEEDS)
def test_the_leading_rows_are_the_best_slice(inputs, outputs, rank, kept, seed):
    a, b = _pair(_rng(seed), inputs, outputs, rank)
    u, s, vt = np.linalg.svd(_dense(a, b))
    best = (u[:, :kept] * s[:kept]) @ vt[:kept] if kept < len(s) else _dense(a, b)
    whole, few = recompress(a, b), recompress(a, b, rank=kept)
    norm = np.linalg.norm(s)
    assert np.linalg.norm(whole.b_or[:, :kept] @ whole.a_ri[:kept] - best) <= 1e-10 * norm
    assert np.array_equal(few.a_ri, whole.a_ri[:kept])
    assert np.array_equal(few.b_or, whole.b_or[:, :kept])
    assert few.error == pytest.approx(np.linalg.norm(s[kept:]) / norm, abs=1e-10)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, st.integers(1, 40), SEEDS)
def test_the_form_is_canonical_and_balanced(inputs, outputs, rank, seed):
    """Another pair of factors of the same product gives the same form, whatever it was multiplied with."""
    rng = _rng(seed)
    a, b = _pair(rng, inputs, outputs, rank)
    got = recompress(a, b)
    s = np.linalg.svd(_dense(a, b), compute_uv=False)[: len(got.singular)]
    assert np.allclose(got.singular, s, rtol=0, atol=1e-12 * s[0])
    assert np.allclose((got.a_ri**2).sum(axis=1), got.singular, rtol=1e-12)
    assert np.allclose((got.b_or**2).sum(axis=0), got.singular, rtol=1e-12)
    assert (np.diff(got.singular) <= 0).all()
    for row in got.a_ri:
        assert row[np.abs(row).argmax()] > 0
    mix = np.linalg.qr(rng.normal(size=(rank, rank)))[0]
    other = recompress(mix.T @ a, b @ mix)
    gap = np.diff(-got.singular).min() / s[0] if len(s) > 1 else 1.0
    if gap > 1e-3:
        assert np.allclose(got.a_ri, other.a_ri, atol=1e-8 * np.abs(got.a_ri).max())


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, st.integers(1, 40), st.floats(0.05, 0.999), SEEDS)
def test_an_energy_threshold_keeps_just_enough(inputs, outputs, rank, energy, seed):
    a, b = _pair(_rng(seed), inputs, outputs, rank)
    got = recompress(a, b, energy=energy)
    squares = np.linalg.svd(_dense(a, b), compute_uv=False) ** 2
    held = np.cumsum(squares) / squares.sum()
    kept = len(got.singular)
    assert held[kept - 1] >= energy - 1e-12
    assert kept == 1 or held[kept - 2] <= energy + 1e-12
    want = np.linalg.norm(_dense(got.a_ri, got.b_or) - _dense(a, b)) / np.sqrt(squares.sum())
    assert got.error == pytest.approx(want, abs=1e-7)


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(256, 256, 60), (300, 100, 80), (200, 100, 300)])
def test_float32_is_within_5e_6(inputs, outputs, rank):
    a, b = (x.astype(np.float32) for x in _pair(_rng(1), inputs, outputs, rank))
    got = recompress(a, b, dtype=np.float32)
    assert got.a_ri.dtype == got.b_or.dtype == np.float32
    assert np.linalg.norm(_dense(got.a_ri, got.b_or) - _dense(a, b)) <= 5e-6 * np.linalg.norm(_dense(a, b))


@pytest.mark.parametrize("fall", [0.0, 0.5, 2.0])
def test_the_randomised_slice_is_within_a_thousandth_of_the_best(fall):
    """A stack wider than the layer: 300 rows of 160 inputs, with flat, slowly and quickly falling singular values."""
    rng = _rng(2)
    a, b = np.linalg.qr(rng.normal(size=(300, 160)))[0], np.linalg.qr(rng.normal(size=(300, 160)))[0].T
    a = a * (1.0 + np.arange(160)) ** -fall
    got = recompress(a, b, rank=8)
    s = np.linalg.svd(_dense(a, b), compute_uv=False)
    best = np.linalg.norm(s[8:])
    error = np.linalg.norm(_dense(got.a_ri, got.b_or) - _dense(a, b))
    assert best <= error * (1 + 1e-12) <= best * 1.001
    assert got.error == pytest.approx(error / np.linalg.norm(s), rel=1e-6)


def test_products_that_are_zero_have_rank_0():
    for a, b in ((np.zeros((3, 5)), np.ones((4, 3))), (np.zeros((0, 5)), np.zeros((4, 0)))):
        got = recompress(a, b, energy=0.9)
        assert (got.a_ri.shape, got.b_or.shape, got.error) == ((0, 5), (4, 0), 0.0)


def test_parts_that_cancel_leave_nothing():
    a, b = _pair(_rng(3), 20, 10, 4)
    assert recompress(np.concatenate([a, a]), np.hstack([b, -b])).a_ri.shape == (0, 20)
    assert recompress(np.concatenate([a, a]), np.hstack([b, b])).a_ri.shape == (4, 20)


@pytest.mark.parametrize("wrong", [{"energy": 0.0}, {"energy": 1.1}, {"energy": float("nan")}, {"rank": -1}])
def test_wrong_limits_are_refused(wrong):
    with pytest.raises(ConfigError, match="rank and energy"):
        recompress(*_pair(_rng(0), 3, 3, 1), **wrong)


@settings(max_examples=100, deadline=None)
@given(SIZES, SIZES, st.lists(st.integers(0, 9), min_size=1, max_size=6), SEEDS)
def test_norms_products_and_distances_are_those_of_the_matrices(inputs, outputs, ranks, seed):
    rng = _rng(seed)
    pairs = [_pair(rng, inputs, outputs, rank) for rank in ranks]
    dense = [_dense(*pair) for pair in pairs]
    scale = 1e-12 * max(1.0, *(float((d**2).sum()) for d in dense))
    gram = inner_products(pairs)
    want = np.array([[(x * y).sum() for y in dense] for x in dense])
    assert np.array_equal(gram, gram.T)
    assert np.allclose(gram, want, rtol=0, atol=scale * 10)
    assert np.allclose(squared_distances(gram), [[((x - y) ** 2).sum() for y in dense] for x in dense], atol=scale * 40)
    for pair, matrix in zip(pairs, dense, strict=True):
        assert squared_norm(*pair) == pytest.approx((matrix**2).sum(), abs=scale)
    assert inner(pairs[0], pairs[-1]) == pytest.approx(want[0, -1], abs=scale)


def test_float32_factors_are_measured_in_float64():
    a, b = (x.astype(np.float32) for x in _pair(_rng(5), 50, 40, 6))
    assert squared_norm(a, b) == pytest.approx((_dense(a, b) ** 2).sum(), rel=1e-13)


def test_the_bits_do_not_depend_on_the_number_of_blas_threads():
    """A coordinator that is started again may be given other threads. These shapes differ without `one_thread`."""
    code = (
        "import numpy as np, sys; from fedtune.lowrank import recompress\n"
        "rng = np.random.default_rng(0)\n"
        "a, b = rng.normal(size=(200, 576)), rng.normal(size=(288, 200))\n"
        "got = recompress(a, b); sys.stdout.buffer.write(got.a_ri.tobytes() + got.b_or.tobytes())"
    )
    seen = set()
    for threads in ("1", "2", "3"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        seen.add(hashlib.sha256(done.stdout).hexdigest())
    assert len(seen) == 1
