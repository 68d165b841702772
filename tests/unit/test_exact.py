"""Order-free sums against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import exact
from fedtune.errors import WireError
from fedtune.tensors import DTYPES

F32 = np.dtype(np.float32)
VALUES = st.floats(-2047.75, 2047.75, width=32)
TERMS = st.lists(st.tuples(st.lists(VALUES, min_size=4, max_size=4), st.integers(1, 10**6)), min_size=1, max_size=8)


def _sum(terms, dtype=F32):
    total = None
    for values, weight in terms:
        total = exact.add(total, np.array(values, dtype), weight, "x")
    return total


def _fixed(x):
    """The fixed-point number that `add` stores for x: 52 bits behind the point, half to even."""
    return Fraction(round(Fraction(float(x)) * 2**52), 2**52)


@settings(max_examples=300, deadline=None)
@given(TERMS)
def test_digits_are_the_exact_sum(terms):
    total = _sum(terms)
    for i in range(4):
        oracle = sum((_fixed(np.float32(values[i])) * weight for values, weight in terms), Fraction(0))
        assert Fraction(int(total.high[i]), 2**20) + Fraction(int(total.low[i]), 2**52) == oracle


@settings(max_examples=300, deadline=None)
@given(TERMS)
def test_mean_is_the_oracle_mean_rounded(terms):
    weight = sum(w for _, w in terms)
    mean = _sum(terms).mean(weight, np.dtype(np.float64))
    for i in range(4):
        oracle = sum((Fraction(float(np.float32(values[i]))) * w for values, w in terms), Fraction(0)) / weight
        # Half a unit of 2^-52 per term, and the roundings of one division and one addition in float64.
        assert abs(Fraction(float(mean[i])) - oracle) <= Fraction(1, 2**53) + abs(oracle) / 2**50 + Fraction(1, 2**70)


@settings(max_examples=200, deadline=None)
@given(st.data(), TERMS)
def test_any_order_gives_the_same_bits(data, terms):
    other = data.draw(st.permutations(terms))
    weight = sum(w for _, w in terms)
    assert _sum(terms).mean(weight, F32).tobytes() == _sum(other).mean(weight, F32).tobytes()


def test_float32_sums_do_depend_on_order():
    """Why this module exists: the same four values in two orders, summed plainly."""
    a, b, c, d = (np.float32(v) for v in (1000.0, 1e-4, -1000.0, 1e-4))
    assert ((a + b) + c) + d != ((a + c) + b) + d


@settings(max_examples=500, deadline=None)
@given(st.floats(2.0**-29, 2047.75, width=32), st.sampled_from([1, -1]), st.integers(1, 2**31 - 1))
def test_a_single_float32_comes_back_bit_for_bit(value, sign, weight):
    x = np.array([sign * value, 0.0], np.float32)
    assert exact.add(None, x, weight, "x").mean(weight, F32).tobytes() == x.tobytes()


def test_below_the_documented_range_a_single_value_is_rounded_to_2_to_minus_52():
    x = np.array([2.0**-40 * (1 + 2.0**-23)], np.float32)
    assert exact.add(None, x, 1, "x").mean(1, F32)[0] == np.float32(2.0**-40)
    assert abs(float(exact.add(None, np.array([1e-30], np.float32), 1, "x").mean(1, F32)[0])) <= 2.0**-53


def test_negative_zero_comes_back_as_zero():
    mean = exact.add(None, np.array([-0.0], np.float32), 3, "x").mean(3, F32)
    assert mean.tobytes() == np.float32(0.0).tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [2048.0, -2048.0, 60000.0, -60000.0])
def test_magnitudes_of_2048_and_more_are_refused(dtype, value):
    for at in range(3):
        x = np.zeros(3, DTYPES[dtype])
        x[at] = value
        with pytest.raises(WireError, match=r"A of k: expected magnitudes below 2048, got .* Training diverged"):
            exact.add(None, x, 1, "A of k")


def test_the_largest_sums_do_not_overflow():
    largest = np.array([np.nextafter(np.float32(2048), np.float32(0)), -np.nextafter(np.float32(2048), np.float32(0))])
    total = None
    for _ in range(3):
        total = exact.add(total, largest, exact.MAX_TOTAL_WEIGHT // 3, "x")
    assert np.array_equal(total.mean(exact.MAX_TOTAL_WEIGHT // 3 * 3, F32), largest)


def test_largest_low_digits_do_not_overflow():
    x = np.array([2.0**-21 - 2.0**-45, -(2.0**-21 - 2.0**-45)], np.float32)
    total = exact.add(None, x, exact.MAX_TOTAL_WEIGHT, "x")
    assert [int(h) * 2**32 + int(n) for h, n in zip(total.high, total.low, strict=True)] == [
        int(Fraction(float(v)) * 2**52) * exact.MAX_TOTAL_WEIGHT for v in x
    ]


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0)])
def test_odd_shapes_pass(shape):
    x = np.ones(shape, np.float32)
    assert exact.add(None, x, 2, "x").mean(2, F32).shape == shape


def test_add_changes_the_total_and_not_the_values():
    x = np.ones(2, np.float32)
    total = exact.add(None, x, 1, "x")
    assert exact.add(total, x, 5, "x") is total
    assert total.high.tolist() == [6 * 2**20, 6 * 2**20]
    assert x.tolist() == [1, 1]


def test_a_refused_value_leaves_the_total_as_it_was():
    total = exact.add(None, np.ones(2, np.float32), 1, "x")
    with pytest.raises(WireError):
        exact.add(total, np.array([1, 2048], np.float32), 5, "x")
    assert total.high.tolist() == [2**20, 2**20]


@pytest.mark.parametrize("size", [2**14 - 1, 2**14, 2**14 + 1, 3 * 2**14 + 5])
def test_large_arrays_are_summed_as_small_ones_are(size):
    x = np.random.Generator(np.random.Philox(key=size)).normal(size=size).astype(np.float32)
    total = exact.add(exact.add(None, x, 3, "x"), x[::-1], 2, "x")
    for part in (slice(0, 7), slice(size - 7, size), slice(size // 2, size // 2 + 7)):
        small = exact.add(exact.add(None, x[part], 3, "x"), x[::-1][part], 2, "x")
        assert np.array_equal(small.high, total.high[part])
        assert np.array_equal(small.low, total.low[part])


@pytest.mark.parametrize(("scale", "fails"), [(1.0, False), (1.99, False), (2.0, True), (float("inf"), True)])
def test_check_magnitude_takes_the_scale_into_account(scale, fails):
    x = np.array([3.0, -1024.0], np.float32)
    if fails:
        with pytest.raises(WireError):
            exact.check_magnitude(x, "x", scale)
    else:
        exact.check_magnitude(x, "x", scale)
