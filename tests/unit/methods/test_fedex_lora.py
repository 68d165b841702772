"""FedEx-LoRA: means of A and B, and the exact residual in the base."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import history
from fedtune.lora import key_a, layers_of, load_peft
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA, FedExLoRA


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_residual_and_adapter_are_the_exact_mean_of_products(family, shapes, rank, weights, rslora, seed):
    method = FedExLoRA(rank=rank, alpha=3.0, rslora=rslora, target_modules=("q_proj",))
    state = family.state(method, family.base(shapes), seed)
    replies = family.replies(method, state, [(0, 0, n) for n in weights], seed)
    object.__setattr__(method, "dtype", "float64")  # no user can: the wire has no such update
    after = family.close(method, state, replies)
    scale, residual = 3.0 / (rank**0.5 if rslora else rank), history.of_round(after, 1)
    for layer in layers_of(residual):
        want = family.mean_product(method, replies, layer)
        got = scale * family.product(after, layer) + family.product(residual, layer)
        assert np.abs(got - want).max() <= 1e-12 * max(np.abs(want).max(), 1)
        if len(weights) > 1:
            assert residual[key_a(layer)].shape[0] <= min(*_shape(state, layer), (len(weights) - 1) * rank)


def _shape(state, layer):
    return state[f"{layer}/B"].shape[0], state[f"{layer}/A"].shape[1]


def test_a_and_b_are_those_of_fedavg_lora(family):
    shapes, clients = [(6, 5), (3, 8)], [(0, 0, 3), (0, 0, 5)]
    plain, exact = (kind(rank=2, target_modules=("q_proj",)) for kind in (FedAvgLoRA, FedExLoRA))
    state = plain.init(family.base(shapes), 4)
    replies = family.replies(plain, state, clients)
    want = family.close(plain, state, replies)
    got = family.close(exact, exact.init(family.base(shapes), 4), replies)
    assert all(np.array_equal(got[n], want[n]) for n in want)


def test_one_client_and_equal_clients_leave_no_residual(family):
    method = FedExLoRA(rank=2, target_modules=("q_proj",))
    state = method.init(family.base([(6, 5)]), 4)
    one = family.replies(method, state, [(0, 0, 3)])
    twice = [(Member("x", 2, 4.0), one[0][1], 3), (Member("y", 2, 4.0), one[0][1], 9)]
    for replies in (one, twice):
        after = family.close(
            method, state, [(m, {n: a.astype(np.float32) for n, a in u.items()}, w) for m, u, w in replies]
        )
        assert np.abs(family.product(history.of_round(after, 1), "m.0.q_proj")).max(initial=0) < 1e-6


def test_after_many_rounds_the_clients_model_is_base_residuals_and_adapter(base, base_folder, family):
    method = FedExLoRA(rank=2)
    states, workers, _ = family.play(method, base, base_folder, [Member("a"), Member("b"), Member("c")], 3)
    residuals = history.joined(states[2])  # what was merged when round 3 began
    fresh = type(workers["a"])(base_folder).weights
    for layer in layers_of(residuals):
        want = fresh[f"{layer}.weight"] + family.product(residuals, layer)
        assert np.abs(workers["a"].weights[f"{layer}.weight"] - want).max() < 1e-5


def test_export_is_residuals_and_adapter(base, base_folder, family, tmp_path):
    method = FedExLoRA(rank=2, alpha=3.0)
    states, *_ = family.play(method, base, base_folder, [Member("a"), Member("b")], 3)
    method.export(states[3], tmp_path, "")
    back, residuals = load_peft(tmp_path), history.joined(states[3])
    for layer in layers_of(residuals):
        want = family.product(residuals, layer) + 1.5 * family.product(states[3], layer)
        assert np.abs(family.product(back, layer) - want).max() < 1e-5


@pytest.mark.parametrize("since", [-1, 0, 1, 2])
def test_the_residuals_that_are_missing_come_with_the_adapter(base, base_folder, family, since):
    method = FedExLoRA(rank=2)
    states, *_ = family.play(method, base, base_folder, [Member("a"), Member("b")], 3)
    sent = method.broadcast(states[3], since)
    assert {int(n[:6]) for n in sent if history.is_past(n)} == set(range(since + 1, 4))
    assert {n for n in sent if not history.is_past(n)} == {n for n in states[3] if not history.is_past(n)}
