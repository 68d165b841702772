"""Sums by seed, clipping and multi-Krum on K-vectors, against the same written as loops."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import RoundError
from fedtune.kspace import UNIT, Sum, counted, joined, levels, packed, probabilities, trusted, unpacked

K = 16


def _update(seeds, scalars):
    return {"seeds": np.array(seeds, np.int32), "scalars": np.array(scalars, np.float32)}


def _sum(client, seeds, scalars, weight=1, clip=0.0, directions=1):
    return Sum.of(_update(seeds, scalars), K, directions, client, weight, clip)


@given(
    st.lists(st.tuples(st.integers(-1, K - 1), st.floats(-(2**15), 2**15, width=32)), min_size=1, max_size=40),
    st.integers(1, 2**20),
    st.integers(1, 3),
)
def test_a_sum_is_the_loop_over_pairs(pairs, weight, directions):
    got = _sum("a", [s for s, _ in pairs], [g for _, g in pairs], weight, directions=directions)
    want, counts = [0.0] * K, [0] * K
    for s, g in pairs:
        if s >= 0:
            want[s], counts[s] = want[s] + g / directions, counts[s] + 1
    assert np.abs(got.mean() * UNIT - want).max() <= len(pairs) * UNIT
    assert got.counts.tolist() == counts
    assert (got.scalars == got.mean().astype(object) * weight).all()


def test_a_long_vector_is_scaled_to_the_limit_and_a_short_one_is_not_touched():
    long, short = _sum("a", [0, 1], [30.0, -40.0], clip=5.0), _sum("b", [0, 1], [3.0, -4.0], clip=5.0)
    assert (long.mean() * UNIT)[:2] == pytest.approx([3, -4], abs=2 * UNIT)
    assert (short.mean() * UNIT)[:2].tolist() == [3, -4]
    assert long.plus(short).clipped == {"a"}


@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_krum_leaves_out_the_far_ones_in_any_order(seed, f):
    rng = np.random.default_rng(seed)
    near = {f"c{i}": _sum(f"c{i}", range(K), rng.normal(size=K)) for i in range(f + 3)}
    far = {f"a{i}": _sum(f"a{i}", range(K), 1000 + rng.normal(size=K)) for i in range(f)}
    replies = list({**near, **far}.items())
    rng.shuffle(replies)
    assert set(trusted(dict(replies), f)) == set(near)


def test_ties_go_by_name_whoever_came_first():
    replies = {c: _sum(c, [0], [1.0]) for c in "edcba"}
    kept = [set(trusted(dict(order), 1)) for order in itertools.permutations(replies.items())]
    assert kept == [set("abcd")] * len(kept)


def test_too_few_replies_for_krum_are_refused():
    with pytest.raises(RoundError, match="at least 2"):
        trusted({c: _sum(c, [0], [1.0]) for c in "abcd"}, 1)


def test_joining_adds_everything():
    total = joined({c: _sum(c, [1, 1, 2], [1.0, 2.0, 4.0], weight) for c, weight in (("a", 1), ("b", 3))})
    assert (total.members, total.weight) == ({"a", "b"}, 4)
    assert (total.mean() * UNIT)[:3].tolist() == [0, 3, 4]
    assert total.counts[:3].tolist() == [0, 4, 2]


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_histories_stop_at_their_limit_in_any_order(numbers):
    want = min(sum(numbers), 2**62)
    for order in itertools.permutations(numbers):
        total = np.zeros(1, np.int64)
        for number in order:
            total = counted(total, np.array([number]))
        assert total[0] == want


def test_a_history_at_its_limit_does_not_wrap_around():
    full = replace(_sum("a", [1], [1.0]), sizes=np.full(K, 2**62), counts=np.full(K, 2**40))
    both = full.plus(replace(full, members=frozenset("b")))
    assert (both.sizes == 2**62).all()
    assert (both.counts == 2**41).all()
    assert probabilities(levels(both.sizes, both.counts)).sum() == pytest.approx(1)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=50))
def test_packed_numbers_come_back_to_half_a_unit(numbers):
    change = np.array(numbers)
    bits, exponent = packed(change, 60)
    got = unpacked(bits)
    assert np.abs(got * 2.0**-exponent - change).max() <= 2.0**-exponent / 2
    assert np.abs(got).max() <= 2**22
    assert np.abs(got.astype(np.int64)).sum() < 2**31


@given(st.lists(st.integers(-(2**23), 2**23 - 1), min_size=1))
def test_24_bits_come_back(numbers):
    bits = np.array(numbers, "<i4").view(np.uint8).reshape(-1, 4)[:, :3]
    assert unpacked(bits).tolist() == numbers
