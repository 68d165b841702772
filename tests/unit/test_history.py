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
