"""Who draws the seeds of a round, and what that lets multi-Krum see: on f_c(w) = |w - c|^2 / 2, c near one goal."""

from types import SimpleNamespace

import numpy as np
import pytest

from fedtune.directions import reference
from fedtune.method import Member
from fedtune.methods import FedKSeed
from fedtune.rounds import job_seed, round_seed
from fedtune.zo import Line, PlainWalk, train

SIZE, CLIENTS = 256, [f"c{i}" for i in range(5)]
OPTIONS = {"seeds": 4096, "pool": "rademacher", "steps": 60, "eps": 1e-2, "learning_rate": 1e-4}


def _job(method, state, number, client):
    """A client's turn: real steps, batches that differ."""
    noise = np.random.default_rng([number, *client.encode()])
    goal = (3 + noise.normal(0, 0.5, SIZE)).astype(np.float32)

    def zo_steps(part, pool, seeds, plan):
        looked = np.empty((1, SIZE), np.float32)
        line = Line(pool, reference, np.zeros(SIZE, np.float32), 0)
        return train(
            PlainWalk([(line, looked)], lambda _: float(((looked - goal) ** 2).sum()) / 2), seeds, plan
        ).scalars

    known = {name: state[name] for name in ("pool", "model", *(("levels",) if method.pro else ()))}
    seeds = job_seed(7, number, client), round_seed(7, number)
    return SimpleNamespace(known=known, seed=seeds[0], round_seed=seeds[1], zo_steps=zo_steps)


def _updates(method, state, number):
    template = method.template(state, Member("a"))
    return {c: method.client_update(_job(method, state, number, c), template) for c in CLIENTS}


def _left_out(method, state, updates):
    total = None
    for client, update in updates.items():
        total = method.fold(total, update, Member(client), 10)
    return method.notes(method.finish(state, total, 50), total).get("left_out")


def _turned(updates, client):
    return {**updates, client: {**updates[client], "scalars": -updates[client]["scalars"]}}


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, False),
        ({"krum_byzantine": 1}, True),
        ({"draws": "shared"}, True),
        ({"draws": "shared", "pro": True}, True),
        ({"draws": "own", "krum_byzantine": 1}, False),
    ],
)
def test_seeds_are_shared_when_asked_for_or_for_krum(base, options, alike):
    method = FedKSeed(**OPTIONS, **options)
    first, second = (_updates(method, method.init(base, 7), number) for number in (1, 2))
    assert len({update["seeds"].tobytes() for update in first.values()}) == (1 if alike else 5)
    assert not {u["seeds"].tobytes() for u in first.values()} & {u["seeds"].tobytes() for u in second.values()}


@pytest.mark.parametrize("turned", CLIENTS)
def test_an_update_with_its_signs_turned_is_left_out(base, turned):
    method = FedKSeed(**OPTIONS, krum_byzantine=1)
    state = method.init(base, 7)
    for number in (1, 2, 3):
        assert _left_out(method, state, _turned(_updates(method, state, number), turned)) == [turned]


def test_with_seeds_of_their_own_nobody_can_tell(base):
    """Why the seeds are shared: K-vectors that hardly overlap are as far from one another as from one turned around."""
    method = FedKSeed(**OPTIONS, krum_byzantine=1, draws="own")
    state = method.init(base, 7)
    found = [_left_out(method, state, _turned(_updates(method, state, 1), client)) == [client] for client in CLIENTS]
    assert sum(found) < len(CLIENTS)
