"""Fast paths of stacking beside their slow ways."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.method import Member
from fedtune.stacking import Reply, Stack, stacked

EMPTY = {"x/A": np.zeros((0, 5), np.float32), "x/B": np.zeros((7, 0), np.float32)}


def _reply(number, rank, seed, size=1.0, dtype=np.float32, scale=2.0):
    rng = np.random.Generator(np.random.Philox(key=seed + number))
    factors = {"x/A": rng.normal(0, size, (rank, 5)).astype(dtype), "x/B": rng.normal(0, size, (7, rank)).astype(dtype)}
    return Reply(Member(f"c{number}", rank), 1 + number, scale, factors)


def _refused(reply):
    try:
        Stack().add(reply, keep=True)
    except WireError:
        return True
    return False


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32), st.floats(-1, 5), st.floats(0.01, 100))
def test_what_the_norms_let_pass_the_entries_let_pass_too(rank, seed, exponent, scale):
    """The norms are only looked at in float32; in float64 every entry is."""
    fast = _reply(0, rank, seed, 10**exponent, scale=scale)
    slow = fast._replace(factors={name: array.astype(np.float64) for name, array in fast.factors.items()})
    assert _refused(fast) == _refused(slow)


@pytest.mark.parametrize("value", [3e38, np.inf, 1e20])
def test_a_norm_that_overflows_lets_nothing_pass(value):
    reply = _reply(0, 2, 0)
    reply.factors["x/B"][3, 1] = value
    assert _refused(reply)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from(["<f4", "<f2", "<f8"]), st.booleans())
def test_stacked_rows_are_those_of_a_plain_concatenation(ranks, dtype, turned):
    """Equal shapes are moved row by row, others value by value; `turned` factors are not in C order."""
    parts = [_reply(i, rank, 0, dtype=dtype).factors for i, rank in enumerate(ranks)]
    if turned:
        parts = [{name: np.asfortranarray(array) for name, array in part.items()} for part in parts]
    both = stacked(*((0.5, part) for part in parts))
    assert np.array_equal(both["x/B"], np.concatenate([part["x/B"] for part in parts], axis=1))
    assert both["x/B"].dtype == np.dtype(dtype)


def test_factors_of_rank_zero_stack_to_rank_zero():
    both = stacked((0.5, EMPTY), (0.5, EMPTY))
    assert both["x/A"].shape == (0, 5)
    assert both["x/B"].shape == (7, 0)
