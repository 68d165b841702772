"""FFA-LoRA: one frozen A, so that the mean of the Bs is the mean of the products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import layers_of
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA, FFALoRA
from fedtune.testing import ToyWorker


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(1, 5),
    st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_mean_of_products_is_exact(family, shapes, rank, weights, rslora, seed):
    method = FFALoRA(rank=rank, rslora=rslora, alpha=3.0, target_modules=("q_proj",))
    state = family.state(method, family.base(shapes), seed)
    replies = family.replies(method, state, [(0, 0, n) for n in weights], seed)
    after = family.close(method, state, replies)
    for layer in layers_of(state):
        want = family.mean_product(method, replies, layer, state)
        got = (3.0 / (rank**0.5 if rslora else rank)) * family.product(after, layer)
        assert np.abs(got - want).max() <= 1e-12 * max(np.abs(want).max(), 1)


def test_averaging_both_factors_would_not_be(family):
    """What the frozen A is for."""
    shapes, clients = [(6, 8)], [(0, 0, 1), (0, 0, 1)]
    method = FedAvgLoRA(rank=3, target_modules=("q_proj",))
    state = family.state(method, family.base(shapes))
    replies = family.replies(method, state, clients)
    got, want = 2 * family.product(family.close(method, state, replies), "m.0.q_proj"), 0
    want = family.mean_product(method, replies, "m.0.q_proj")
    assert np.abs(got - want).max() > 0.1 * np.abs(want).max()


def test_a_is_never_trained_and_never_sent_up(base, base_folder, family):
    method = FFALoRA(rank=3)
    states, workers, _ = family.play(method, base, base_folder, [Member("a"), Member("b")], 3)
    frozen = {n: a for n, a in states[0].items() if n.endswith("/A")}
    for state in states:
        assert all(state[n] is a or np.array_equal(state[n], a) for n, a in frozen.items())
    assert all(np.array_equal(workers["a"].attached[1][n], a) for n, a in frozen.items())
    assert all(np.any(states[-1][n] != 0) for n in states[-1] if n.endswith("/B"))
    assert all(name.endswith("/B") for name in method.template(states[0], method.admit(Member("a"))).names)


def test_half_the_bytes_of_fedavg_lora_each_way(family):
    base = family.base([(24, 24)] * 3)
    for method, part in ((FFALoRA(rank=4, target_modules=("q_proj",)), 0.5), (FedAvgLoRA(rank=4), 1.0)):
        if part == 1.0:
            method = FedAvgLoRA(rank=4, target_modules=("q_proj",))
        state = method.init(base, 0)
        whole = 3 * (24 + 24) * 4 * 4
        assert method.template(state, method.admit(Member("a"))).nbytes == part * whole
        assert sum(a.nbytes for a in method.broadcast(state, 0).values()) == part * whole
        assert sum(a.nbytes for a in method.broadcast(state, -1).values()) == whole


def test_clients_whose_as_differ_are_what_it_forbids(base, base_folder):
    """Every client is given the same A, whatever its own seed."""
    method = FFALoRA(rank=2)
    state, given_as = method.init(base, 5), []
    for seed, name in ((1, "a"), (2, "b")):
        worker, member = ToyWorker(base_folder, seed), method.admit(Member(name))
        method.install(worker.job(method, member, 1), method.broadcast(state, -1))
        given_as.append({n: a for n, a in worker.attached[1].items() if n.endswith("/A")})
    assert all(np.array_equal(given_as[0][n], given_as[1][n]) for n in given_as[0])


def test_one_client_comes_back_as_it_was(family):
    method = FFALoRA(rank=2, target_modules=("q_proj",))
    state = family.state(method, family.base([(5, 4)]))
    replies = family.replies(method, state, [(0, 0, 77)])
    after = family.close(method, state, replies)
    assert after["m.0.q_proj/B"] == pytest.approx(replies[0][1]["m.0.q_proj/B"], abs=1e-15)
