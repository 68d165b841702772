"""Who works in a round: a draw that anybody can repeat from the run's seed."""

import hashlib
from collections.abc import Collection
from math import ceil


def select(seed: int, round_number: int, attempt: int, ready: Collection[str], count: int) -> tuple[str, ...]:
    """Draws `count` of the clients in `ready`, or all when there are no more than that; sorted by id.

    Guarantees: a function of its arguments alone; whether a client is drawn does not depend on the order in which
    clients came. Each client's ticket is SHA-256(seed, round, attempt, id), and the lowest tickets are drawn.
    """
    tickets = sorted((_ticket(seed, round_number, attempt, client), client) for client in ready)
    return tuple(sorted(client for _, client in tickets[:count]))


def asked(target: int, over_select: float) -> int:
    """How many clients are asked so that `target` of them may answer."""
    return ceil(round(target * over_select, 9))


def _ticket(seed: int, round_number: int, attempt: int, client: str) -> bytes:
    return hashlib.sha256(f"fedtune/select/v1 {seed} {round_number} {attempt} {client}".encode()).digest()
