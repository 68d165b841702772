"""Selection against a full sort, and moments against float64, at sizes on both sides of every shortcut."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtune.codecs.backend import using
from fedtune.codecs.moments import Moments
from fedtune.codecs.top import kept_count, pick, working

FEW_VALUES = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 2.0])


def oracle(parts, count):
    """Places that a stable sort by magnitude keeps, zeros never."""
    magnitudes = np.abs(np.concatenate(parts)) if parts else np.zeros(0)
    order = np.argsort(-magnitudes, kind="stable")[:count]
    return np.sort(order[magnitudes[order] > 0])


def chosen(parts, count, way="size"):
    found, start = [np.zeros(0, np.int64)], 0
    with using(way):
        picks = pick(parts, count)
    for part, one in zip(parts, picks, strict=True):
        places = np.flatnonzero(one.signs) if one.positions is None else one.positions
        signs = one.signs[places] if one.positions is None else one.signs
        np.testing.assert_array_equal(signs, np.sign(part[places]))
        assert one.count == places.size
        found.append(places + start)
        start += part.size
    return np.concatenate(found)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=arrays(np.float32, st.integers(1, 60), elements=FEW_VALUES), data=st.data())
def test_ties_are_kept_from_the_first_and_zeros_never(values, data):
    count = data.draw(st.integers(0, values.size + 2))
    at = data.draw(st.integers(0, values.size))
    parts = [values[:at], values[at:]]
    for way in ("numpy", "numba"):
        np.testing.assert_array_equal(chosen(parts, count, way), oracle(parts, count))


LARGE = 300_001


def moments(values, way="numpy"):
    with using(way):
        return pick([values], 1, with_moments=True)[0].moments


def large(kind):
    rng = np.random.Generator(np.random.Philox(5))
    values = rng.normal(size=LARGE).astype(np.float32)
    if kind == "ties":
        values = np.round(values * 4) / 4
    if kind == "equal":
        values[:] = -3
    if kind == "sorted":
        values.sort()
    if kind == "misleading":  # one value in every step of the sample is huge, so that the bracket is wrong
        values[:: LARGE // (1 << 16) | 1] = 1000.0
    if kind == "float64":
        values = values.astype(np.float64) * 1e-300
    if kind == "spiked":
        values[:] = 0
        values[7::1000] = rng.normal(size=values[7::1000].size)
    return values


@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "sorted", "misleading", "float64", "spiked"])
@pytest.mark.parametrize("count", [1, 17, 3000, 60_000, 150_000, LARGE - 1, LARGE])
def test_large_vectors_are_cut_exactly(kind, count):
    values = large(kind)
    parts = [values[:100_000], values[100_000:100_000], values[100_000:]]
    for way in ("numpy", "numba"):
        np.testing.assert_array_equal(chosen(parts, count, way), oracle(parts, count))


def test_nothing_is_kept_of_nothing():
    assert pick([], 0) == []
    (one,) = pick([np.zeros(0, np.float32)], 3)
    assert one.count == one.signs.size == 0


@pytest.mark.parametrize(
    ("density", "size", "count"),
    [(0, 10, 0), (1e-9, 10, 1), (0.05, 100, 5), (0.07, 100, 7), (1, 7, 7), (0.5, 0, 0), (0.999, 10, 10)],
)
def test_densities_become_counts(density, size, count):
    assert kept_count(density, size) == count


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(-1e6, 1e6, width=32)), st.integers(0, 50))
def test_moments_of_parts_join_to_those_of_the_whole(values, at):
    joined = moments(values[:at]).plus(moments(values[at:]))
    wide = values.astype(np.float64)
    assert joined.count == values.size
    if values.size > 1:
        assert joined.std == pytest.approx(wide.std(ddof=1), rel=1e-10, abs=1e-9)


def test_the_deviation_of_a_large_vector_far_from_zero_is_exact():
    values = (np.random.Generator(np.random.Philox(3)).normal(size=LARGE) + 1e4).astype(np.float32)
    assert moments(values).std == pytest.approx(values.astype(np.float64).std(ddof=1), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e15, 1e30])
def test_the_deviation_keeps_its_digits_at_every_magnitude(scale):
    values = (np.random.Generator(np.random.Philox(4)).normal(size=LARGE) * scale).astype(np.float32)
    assert moments(values).std == pytest.approx(values.astype(np.float64).std(ddof=1), rel=3e-8)
    assert moments(values, "numba") == moments(values)


@pytest.mark.parametrize("way", ["numpy", "numba"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [5, LARGE])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_squares_are_not_finite_where_a_value_is_not(way, value, size, count):
    values = np.ones(size, np.float32)
    values[size // 2 :] = value
    with using(way):
        (one,) = pick([values], count, with_moments=True)
    assert not np.isfinite(one.moments.squares)


def test_one_value_has_no_deviation():
    assert moments(np.ones(1, np.float32)).std == 0.0
    assert Moments().std == 0.0


def test_narrow_types_are_worked_on_as_float32():
    assert working(np.ones((2, 3), np.float16)).dtype == np.float32
    assert working(np.ones((2, 3), np.float64)).dtype == np.float64
