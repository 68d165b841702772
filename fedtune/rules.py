"""When a round starts, closes, is tried again or fails: pure functions of what is known now.

A round closes when

    every update aimed for is there;                                              or
    the quorum is there and nobody who is still here owes an update;              or
    the quorum is there and `grace_s` have passed since;                          or
    the quorum is there at the deadline.

A deadline without the quorum starts another attempt; updates that were accepted stay in the round. So a round never
waits for the dead, and never throws away what it has acknowledged.
"""

from dataclasses import dataclass
from enum import Enum
from math import ceil

from fedtune.config.schema import RoundsConfig


class Move(Enum):
    """What to do with an open round."""

    WAIT = "wait"
    CLOSE = "close"
    RETRY = "retry"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class View:
    """An open round as the rules see it.

    Attributes:
        target: updates aimed for.
        accepted: updates that are durable.
        outstanding: clients that have a task, no accepted update, and are here (or left a moment ago).
        elapsed_s: seconds since this attempt began.
        since_quorum_s: seconds since the quorum was there; None before.
        attempt: number of this attempt, from 1.
    """

    target: int
    accepted: int
    outstanding: int
    elapsed_s: float
    since_quorum_s: float | None
    attempt: int


def quorum_of(rounds: RoundsConfig, target: int) -> int:
    """Updates without which a round of `target` is not closed; at least 1."""
    return max(1, ceil(round(rounds.quorum * target, 9)))


def needed(rounds: RoundsConfig) -> int:
    """Ready clients without which no round starts."""
    return max(rounds.min_clients, quorum_of(rounds, rounds.clients))


def decide(view: View, rounds: RoundsConfig) -> Move:
    """Applies the rules above."""
    quorum = view.accepted >= quorum_of(rounds, view.target)
    if view.accepted >= view.target or (quorum and view.outstanding == 0):
        return Move.CLOSE
    if quorum and view.since_quorum_s is not None and view.since_quorum_s >= rounds.grace_s:
        return Move.CLOSE
    if view.elapsed_s < rounds.deadline_s:
        return Move.WAIT
    if quorum:
        return Move.CLOSE
    return Move.RETRY if view.attempt < rounds.attempts else Move.FAIL


def wait_s(view: View, rounds: RoundsConfig) -> float:
    """Seconds until the clock alone may change the decision."""
    waits = [rounds.deadline_s - view.elapsed_s]
    if view.since_quorum_s is not None:
        waits.append(rounds.grace_s - view.since_quorum_s)
    return max(0.0, min(waits))
