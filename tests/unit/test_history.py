"""Which part of a history a client lacks."""

import numpy as np
import pytest

from fedtune import history


def _state(*numbers, rank=1):
    state = {"private/m/l/A": np.ones((2, 3)), "adapter/A": np.ones((2, 3))}
    for number in numbers:
        r = rank if number else 0
        state |= history.numbered(number, {"l/A": np.ones((r, 3)), "l/B": np.ones((4, r))})
    return state


@pytest.mark.parametrize(
    ("held", "since", "sent"),
    [
        ((0, 1, 2), -1, {0, 1, 2}),
        ((0, 1, 2), 0, {1, 2}),
        ((0, 1, 2), 1, {2}),
        ((0, 1, 2), 2, set()),
        ((0, 5, 6), 5, {6}),
        ((0, 5, 6), 4, {0, 5, 6}),  # rounds 1 to 5 are one stack now: what this client has merged is in it, too
        ((0, 5, 6), 0, {5, 6}),  # nothing merged yet
        ((0,), -1, {0}),
        ((0,), 0, set()),
    ],
)
def test_a_client_gets_what_it_lacks_or_the_whole(held, since, sent):
    received = history.lacking(_state(*held), since)
    assert {int(name[:6]) for name in received} == sent
    assert all(history.is_past(name) for name in received)
    assert history.is_whole(received) == (0 in sent)


def test_the_rank_is_that_of_the_layer_with_most():
    state = _state(0, 1, 2, rank=3) | history.numbered(2, {"k/A": np.ones((9, 3)), "k/B": np.ones((4, 9))})
    assert history.rank(state) == 9
    assert history.rank(_state(0, 1, 2, 3, rank=4)) == 12
    assert history.rank(_state(0)) == 0


def test_it_begins_with_the_shapes_alone(base):
    state = history.begun(base, ("v_proj",), "bfloat16")
    assert history.last(state) == 0
    assert all(history.is_past(name) and name.startswith("000000/") and not array.size for name, array in state.items())
    factors = history.of_round(state, 0)
    assert [array.shape for array in factors.values()] == [(0, 16), (8, 0)] * 2
    assert {str(array.dtype) for array in factors.values()} == {"bfloat16"}


def test_rounds_are_found_in_order_and_what_is_beside_them_is_none():
    state = _state(12, 0, 2, 1)
    assert history.last(state) == 12
    assert not history.is_past("adapter/A")
    assert not history.is_past("private/m/l/A")
    assert history.of_round(state, 2).keys() == {"l/A", "l/B"}
    assert history.of_round(state, 7) == {}
    assert len(list(history.missed(state))) == 3
    assert "adapter/A" in history.after(state, 5)
    assert {name for name in history.after(state, 5) if history.is_past(name)} == {"000012/l/A", "000012/l/B"}


def test_joined_rounds_have_the_sum_of_their_products():
    rng = np.random.Generator(np.random.Philox(key=0))
    state, want = _state(0), np.zeros((4, 3))
    for number, rank in ((1, 2), (2, 0), (10, 3)):
        a, b = rng.normal(size=(rank, 3)), rng.normal(size=(4, rank))
        state |= history.numbered(number, {"l/A": a, "l/B": b})
        want += b @ a
    factors = history.joined(state)
    assert factors["l/A"].shape == (5, 3)
    assert np.allclose(factors["l/B"] @ factors["l/A"], want)
