"""When rounds close: every line of the rules, on both sides of its edge."""

import pytest

from fedtune.config.schema import RoundsConfig
from fedtune.rules import Move, View, decide, needed, quorum_of, wait_s

ROUNDS = RoundsConfig(quorum=0.5, grace_s=10, deadline_s=100, attempts=2)


def view(accepted=0, outstanding=4, elapsed=0.0, since=None, attempt=1, target=4):
    return View(target, accepted, outstanding, elapsed, since, attempt)


@pytest.mark.parametrize(
    ("seen", "move"),
    [
        (view(), Move.WAIT),
        (view(accepted=4, outstanding=0, since=0.0), Move.CLOSE),
        (view(accepted=4, outstanding=1, since=0.0), Move.CLOSE),  # over-selected: enough is enough
        (view(accepted=1, outstanding=0), Move.WAIT),  # all others died: they may come back before the deadline
        (view(accepted=2, outstanding=1, since=0.0), Move.WAIT),
        (view(accepted=2, outstanding=0, since=0.0), Move.CLOSE),
        (view(accepted=2, outstanding=2, since=9.9), Move.WAIT),
        (view(accepted=2, outstanding=2, since=10.0), Move.CLOSE),
        (view(accepted=3, outstanding=1, elapsed=100, since=1.0), Move.CLOSE),
        (view(accepted=1, outstanding=3, elapsed=99.9), Move.WAIT),
        (view(accepted=1, outstanding=3, elapsed=100), Move.RETRY),
        (view(accepted=0, outstanding=0, elapsed=100), Move.RETRY),
        (view(accepted=1, outstanding=3, elapsed=100, attempt=2), Move.FAIL),
    ],
)
def test_decide(seen, move):
    assert decide(seen, ROUNDS) == move


def test_quorum_of_all_waits_for_all():
    strict = RoundsConfig(quorum=1.0, grace_s=0, deadline_s=100)
    assert decide(view(accepted=3, outstanding=1), strict) == Move.WAIT
    assert decide(view(accepted=3, outstanding=0), strict) == Move.WAIT
    assert decide(view(accepted=4, outstanding=0), strict) == Move.CLOSE


@pytest.mark.parametrize(
    ("quorum", "target", "count"), [(0.5, 4, 2), (0.5, 5, 3), (1.0, 7, 7), (0.01, 10, 1), (0.7, 10, 7)]
)
def test_quorum(quorum, target, count):
    assert quorum_of(RoundsConfig(quorum=quorum), target) == count


def test_a_round_needs_clients_that_could_make_its_quorum():
    assert needed(RoundsConfig(min_clients=3)) == 3
    assert needed(RoundsConfig(clients=10, quorum=0.8)) == 8
    assert needed(RoundsConfig(clients=4, quorum=0.5, min_clients=4)) == 4


def test_wait_ends_when_the_clock_matters():
    assert wait_s(view(elapsed=30), ROUNDS) == 70
    assert wait_s(view(accepted=2, elapsed=30, since=4.0), ROUNDS) == 6
    assert wait_s(view(accepted=2, elapsed=200, since=4.0), ROUNDS) == 0
