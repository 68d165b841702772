"""Robust means of factors, judged by their products, against dense matrices; and the methods that use them."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedtune import trust
from fedtune.errors import RoundError
from fedtune.lora import key_a, key_b
from fedtune.method import BaseModel, Member
from fedtune.methods import FedAvgLoRA, FFALoRA
from fedtune.rounds import Round
from fedtune.tensors import Manifest, TensorSpec, digest

A, B = key_a("m.q_proj"), key_b("m.q_proj")
BASE = BaseModel("toy", Manifest((TensorSpec("m.q_proj.weight", (7, 9), "float32"),)), "0" * 64)
SMALL = {"rank": 3, "target_modules": ("q_proj",)}


def _rng(seed):
    return np.random.Generator(np.random.Philox(key=seed))


def _drawn(method, count, seed=0):
    """A state in the middle of a run, and updates near it, float32 as they arrive."""
    rng, state = _rng(seed), dict(method.init(BASE, 0))
    state[B] = rng.normal(size=state[B].shape).astype(np.float32)
    specs = method.template(state, Member("x", 3, 6.0)).specs
    return state, {
        f"c{i}": {s.name: (state[s.name] + 0.1 * rng.normal(size=s.shape)).astype(np.float32) for s in specs}
        for i in range(count)
    }


def _close(method, state, updates, weights=None):
    current = Round(method, state, 1)
    for client, update in updates.items():
        member = method.admit(Member(client))
        current.add(
            member, b"".join(method.encode(update, method.template(state, member))), (weights or {}).get(client, 2)
        )
    return current.close(), current.notes()


def _product(state, update):
    whole = {**state, **update}
    return 2.0 * whole[B].astype(np.float64) @ whole[A].astype(np.float64)


@pytest.mark.parametrize("kind", [FedAvgLoRA, FFALoRA])
def test_krum_leaves_out_the_farthest_product(kind):
    method, plain = kind(**SMALL, krum_byzantine=1), kind(**SMALL)
    state, updates = _drawn(plain, 5)
    updates["c2"][B] = -updates["c2"][B]
    after, notes = _close(method, state, updates)
    assert notes == {"left_out": ["c2"]}
    want, _ = _close(plain, state, {client: u for client, u in updates.items() if client != "c2"})
    for name in want:
        assert np.allclose(after[name], want[name], rtol=0, atol=1e-6)
    for order in list(permutations(updates))[::30]:
        assert digest(_close(method, state, {client: updates[client] for client in order})[0]) == digest(after)


def test_equal_products_count_the_same_however_far_apart_their_factors():
    """A client that turns the factors' basis has the same product; one that is near in factors may be far in it."""
    method = FedAvgLoRA(**SMALL, krum_byzantine=1)
    state, updates = _drawn(method, 5)
    turn = np.linalg.qr(_rng(1).normal(size=(3, 3)))[0]
    updates["c1"] = {A: (turn.T @ updates["c0"][A]).astype(np.float32), B: (updates["c0"][B] @ turn).astype(np.float32)}
    updates["c4"][B] = updates["c4"][B] * np.float32(2)
    assert _close(method, state, updates)[1] == {"left_out": ["c4"]}


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 20.0), st.integers(0, 2**32), st.sampled_from([FedAvgLoRA, FFALoRA]))
def test_a_clipped_client_goes_just_as_far_as_the_limit(limit, seed, kind):
    """Bilinear in A and B: the way there is found, not the norm's ratio."""
    method = kind(**SMALL, clip_norm=limit)
    state, updates = _drawn(method, 1, seed)
    after, notes = _close(method, state, updates)
    far = np.linalg.norm(_product(state, updates["c0"]) - _product(state, {}))
    got = np.linalg.norm(_product(state, after) - _product(state, {}))
    assert got == pytest.approx(min(far, limit), rel=1e-4)
    assert notes == ({"clipped": ["c0"]} if far > limit else {})
    for name, array in updates["c0"].items():  # on the straight way between the two
        whole, part = array.astype(np.float64) - state[name], after[name].astype(np.float64) - state[name]
        assert np.linalg.norm(part - whole * (part * whole).sum() / (whole**2).sum()) < 1e-5


def test_clients_within_the_limit_are_averaged_as_ever():
    method, plain = FedAvgLoRA(**SMALL, clip_norm=1e6), FedAvgLoRA(**SMALL)
    state, updates = _drawn(method, 3)
    weights = {"c0": 3, "c1": 11, "c2": 1}
    got, notes = _close(method, state, updates, weights)
    want, _ = _close(plain, state, updates, weights)
    assert notes == {}
    assert all(np.allclose(got[name], want[name], atol=1e-6) for name in (A, B))


def test_a_trimmed_mean_drops_the_ends_of_every_entry():
    method = FFALoRA(**SMALL, trim=1)
    state, updates = _drawn(method, 5)
    updates["c3"][B][2, 1] = 1e3
    updates["c0"][B][2, 1] = -1e3
    got, _ = _close(method, state, updates, {"c3": 999})
    for at in ((2, 1), (0, 0)):
        values = sorted(float(u[B][at]) for u in updates.values())
        assert got[B][at] == pytest.approx(sum(values[1:4]) / 3, rel=1e-6)
    assert np.array_equal(got[A], state[A])


def test_too_few_clients_end_the_round():
    state, updates = _drawn(FFALoRA(**SMALL), 4)
    with pytest.raises(RoundError, match="Krum"):
        _close(FFALoRA(**SMALL, krum_byzantine=1), state, updates)
    with pytest.raises(RoundError, match="trimmed mean"):
        _close(FFALoRA(**SMALL, trim=2), state, updates)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (FedAvgLoRA, {"clip_norm": 1.0, "personal": ("lora_B",)}, "no factor may be personal"),
        (FedAvgLoRA, {"trim": 1}, "trim"),
        (FFALoRA, {"trim": 1, "clip_norm": 1.0}, "takes the place"),
        (FedAvgLoRA, {"clip_norm": -1.0}, "clip_norm"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind, options, said):
    with pytest.raises(ValidationError, match=said):
        kind(**SMALL, **options)


def test_ids_survive_in_the_coordinators_own_part():
    state = trust.noted(["a", "b-2"], [])
    assert trust.notes(state) == {"left_out": ["a", "b-2"]}
    assert trust.notes({}) == {}


# server optimisers on averaged factors


@pytest.mark.parametrize("outer", ["momentum", "nesterov", "adam", "yogi"])
@pytest.mark.parametrize("kind", [FedAvgLoRA, FFALoRA])
def test_a_server_optimiser_moves_the_factors_and_keeps_its_moments(kind, outer):
    method, plain = kind(**SMALL, server_optimizer=outer), kind(**SMALL)
    state, _ = _drawn(plain, 1)
    moments = state
    for number in range(3):
        _, updates = _drawn(plain, 2, number + 1)
        mean, _ = _close(plain, averaged := method.broadcast(state, -1), updates)
        want = method.server_optimizer.step(
            {n: averaged[n] for n in updates["c0"]}, {n: mean[n].astype(np.float64) for n in updates["c0"]}, moments
        )
        state, _ = _close(method, state, updates)
        moments = want
        for name in updates["c0"]:
            assert np.allclose(state[name], want[name], rtol=1e-4, atol=1e-6)
    assert any(name.startswith("private/m/") for name in state)
    assert not any(name.startswith("private") for since in (-1, 1) for name in method.broadcast(state, since))
    assert digest(method.broadcast(state, -1)) == digest(state)


def test_outer_sgd_with_rate_1_is_federated_averaging_bit_for_bit():
    plain, same = FedAvgLoRA(**SMALL), FedAvgLoRA(**SMALL, server_optimizer={"name": "none", "learning_rate": 1.0})
    state, updates = _drawn(plain, 3)
    assert digest(_close(plain, state, updates)[0]) == digest(_close(same, state, updates)[0])
    other = FedAvgLoRA(**SMALL, server_optimizer={"name": "momentum", "beta1": 0.0})
    got, want = _close(other, state, updates)[0], _close(plain, state, updates)[0]
    assert all(np.allclose(got[name], want[name], rtol=0, atol=1e-7) for name in (A, B))
