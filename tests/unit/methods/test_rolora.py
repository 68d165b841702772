"""RoLoRA: B and A by turns, each round's mean exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import layers_of
from fedtune.method import Member
from fedtune.methods import RoLoRA
from fedtune.methods.rolora import trained_in


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_every_round_is_the_exact_mean_of_products(family, shapes, rank, weights, rounds, seed):
    method = RoLoRA(rank=rank, target_modules=("q_proj",))
    state = family.state(method, family.base(shapes), seed)
    for number in range(1, rounds + 1):
        replies = family.replies(method, state, [(0, 0, n) for n in weights], seed + number)
        after = family.close(method, state, replies)
        for layer in layers_of(state):
            want = family.mean_product(method, replies, layer, state)
            assert np.abs(2 * family.product(after, layer) - want).max() <= 1e-12 * max(np.abs(want).max(), 1)
        state = after
    assert state["turn"].tolist() == [rounds]


def test_odd_rounds_change_b_alone_and_even_ones_a_alone(base, base_folder, family):
    method = RoLoRA(rank=2)
    states, *_ = family.play(method, base, base_folder, [Member("a"), Member("b")], 4)
    for number in (1, 2, 3, 4):
        changed = {n[-1] for n in states[0] if n != "turn" and np.any(states[number][n] != states[number - 1][n])}
        assert changed == {trained_in(number)} == {"BABA"[number - 1]}


def test_who_was_there_receives_the_changed_factor_and_who_was_not_both(base, base_folder, family):
    method = RoLoRA(rank=2)
    states, *_ = family.play(method, base, base_folder, [Member("a")], 3)
    sides = {since: {n[-1] for n in method.broadcast(states[3], since) if n != "turn"} for since in (-1, 0, 1, 2)}
    assert sides == {-1: {"A", "B"}, 0: {"A", "B"}, 1: {"A", "B"}, 2: {"B"}}
    assert {n[-1] for n in method.broadcast(states[0], -1) if n != "turn"} == {"A", "B"}
    assert {n[-1] for n in method.broadcast(states[1], -1) if n != "turn"} == {"A", "B"}
    assert {n[-1] for n in method.broadcast(states[2], 1) if n != "turn"} == {"A"}


@pytest.mark.parametrize("missed", [{(2, "b")}, {(1, "b"), (2, "b")}, {(2, "b"), (3, "b")}])
def test_a_client_that_missed_a_round_trains_beside_the_right_factor(base, base_folder, family, missed):
    method = RoLoRA(rank=2)
    states, workers, _ = family.play(method, base, base_folder, [Member("a"), Member("b")], 4, missed)
    held = workers["b"].attached[1]
    assert all(np.array_equal(held[n], states[3][n]) for n in held)
