"""Balanced factors have the same product and equal singular values."""

import ml_dtypes
import numpy as np
import pytest

from fedtune.balance import balance, balanced, lengthened


@pytest.mark.parametrize("shape", [(4, 30, 20), (8, 5, 40), (8, 40, 5), (1, 7, 7), (16, 3, 2)])
def test_the_product_stays_and_the_norms_meet(shape):
    rank, inputs, outputs = shape
    rng = np.random.Generator(np.random.Philox(1))
    a, b = rng.normal(size=(rank, inputs)), 0.001 * rng.normal(size=(outputs, rank))
    a2, b2 = balance(a, b)
    assert a2.shape == a.shape
    assert b2.shape == b.shape
    np.testing.assert_allclose(b2 @ a2, b @ a, atol=1e-14)
    assert np.linalg.norm(a2) == pytest.approx(np.linalg.norm(b2))


def test_dtypes_and_untrained_adapters_stay():
    factors = {"x/A": np.ones((2, 3), ml_dtypes.bfloat16), "x/B": np.zeros((4, 2), ml_dtypes.bfloat16)}
    out = balanced(factors)
    assert {k: (v.dtype, v.shape) for k, v in out.items()} == {k: (v.dtype, v.shape) for k, v in factors.items()}
    assert not out["x/A"].astype(np.float32).any()


def test_lengthened_rows_have_the_length_of_fresh_ones_and_the_product_stays():
    rng = np.random.Generator(np.random.Philox(2))
    a, b, fresh = rng.normal(size=(3, 9)), rng.normal(size=(5, 3)), 0.1 * rng.normal(size=(7, 9))
    a[1] = 0.0
    a2, b2 = lengthened(a, b, fresh)
    np.testing.assert_allclose(b2 @ a2, b @ a, atol=1e-12)
    want = np.sqrt((fresh**2).sum() / 7)
    np.testing.assert_allclose(np.linalg.norm(a2, axis=1), [want, 0.0, want])
    np.testing.assert_array_equal(b2[:, 1], b[:, 1])


def test_beside_a_fresh_side_of_zeros_nothing_is_lengthened():
    a, b = np.ones((2, 3)), np.ones((4, 2))
    a2, b2 = lengthened(a, b, np.zeros((2, 3)))
    np.testing.assert_array_equal(a2, a)
    np.testing.assert_array_equal(b2, b)
