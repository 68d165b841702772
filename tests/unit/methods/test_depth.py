"""Clients whose adapter is in part of the blocks (LEGEND, arXiv 2412.20004), in the methods that take them.

A layer's mean is over the clients that carry it; one that nobody carries keeps its bits.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import history
from fedtune.depth import carried
from fedtune.errors import ProtocolError
from fedtune.lora import key_a, layers_of, lora_scale
from fedtune.method import Member
from fedtune.methods import METHODS, FLoRA
from fedtune.rounds import Round
from fedtune.tensors import digest

TAKERS = sorted(name for name, kind in METHODS.items() if kind.takes_depth)
CLIENTS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 99)), min_size=1, max_size=5)


def _method(name, **options):
    if name == "florist":
        options["energy"] = 1.0
    return METHODS[name](target_modules=("q_proj",), **options)


def _replies(method, state, clients, seed):
    rng = np.random.Generator(np.random.Philox(key=seed))
    found = []
    for i, (rank, depth, weight) in enumerate(clients):
        member = method.admit(Member(f"c{i}", rank, 1.0 + i, depth))
        found.append((member, {s.name: rng.normal(size=s.shape) for s in method.template(state, member).specs}, weight))
    return found


@pytest.mark.parametrize("name", TAKERS)
@settings(max_examples=40, deadline=None)
@given(clients=CLIENTS, seed=st.integers(0, 2**32), random=st.randoms())
def test_a_layer_is_the_mean_of_those_who_carry_it(family, name, clients, seed, random):
    method, base = _method(name), family.base([(9, 12), (12, 5), (4, 4)])
    state = family.state(method, base)
    replies = _replies(method, state, clients, seed)
    shuffled = replies[:]
    random.shuffle(shuffled)
    after = family.close(method, state, shuffled)
    assert digest(after) == digest(family.close(method, state, replies))
    got = history.of_round(after, 1)
    for i, layer in enumerate(layers_of(got)):
        carriers = [(m, u, w) for m, u, w in replies if m.depth in (0, 3) or i >= 3 - m.depth]
        weight = sum(w for *_, w in carriers)
        want = sum(
            (w / weight * lora_scale(m.rank, m.alpha) * family.product(u, layer) for m, u, w in carriers),
            start=np.zeros(family.product(got, layer).shape),
        )
        error = np.abs(family.product(got, layer) - want).max()
        assert error <= (1e-12 if name == "flora" else 1e-5) * max(1.0, np.abs(want).max())


def test_whole_depth_and_equal_ranks_change_no_bit(family):
    method, base = FLoRA(target_modules=("q_proj",)), family.base([(9, 12), (12, 5)])
    state = method.init(base, 0)
    digests = {
        digest(family.close(method, state, _replies(method, state, [(2, depth, 3), (2, depth, 4)], 1)))
        for depth in (0, 2, 7)
    }
    assert len(digests) == 1


@settings(max_examples=30, deadline=None)
@given(CLIENTS, CLIENTS, st.integers(0, 2**32), st.floats(0, 2))
def test_a_warm_start_goes_on_where_each_layer_was(family, first, second, seed, limit):
    """An oracle on dense matrices: a carrier's model is what it merged plus what it sent; the others do not count."""
    method = FLoRA(target_modules=("q_proj",), start="warm", clip_norm=limit)
    base = family.base([(9, 12), (12, 5), (4, 4)])
    state = family.state(method, base)
    state = family.close(method, state, _replies(method, state, first, seed))
    replies = _replies(method, state, second, seed + 1)
    held = history.of_round(state, history.last(state))
    after = family.close(method, state, replies)
    got = history.of_round(after, history.last(after))
    changes = {m.id: _changes(family, held, m, u) for m, u, _ in replies}
    for layer in layers_of(held):
        carriers = [(m, w) for m, u, w in replies if key_a(layer) in u]
        want = family.product(held, layer)
        for member, weight in carriers:
            norm = sum((c**2).sum() for c in changes[member.id].values()) ** 0.5
            clip = min(1.0, limit / norm) if limit else 1.0
            want = want + weight / sum(w for _, w in carriers) * clip * changes[member.id][layer]
        error = np.abs(family.product(got, layer) - want).max()
        assert error <= 1e-6 * max(1.0, np.abs(want).max())


def _changes(family, held, member, update):
    """What a client changed in each of its layers, as matrices."""
    found = {}
    for layer in layers_of(update):
        began = held[f"{layer}/B"][:, : member.rank] @ held[f"{layer}/A"][: member.rank]
        found[layer] = lora_scale(member.rank, member.alpha) * family.product(update, layer) - began
    return found


@settings(max_examples=30, deadline=None)
@given(CLIENTS, st.integers(0, 2**32), st.floats(0.1, 20), st.randoms())
def test_a_fresh_start_is_clipped_as_it_arrives_over_the_layers_it_has(family, clients, seed, limit, random):
    method, base = FLoRA(target_modules=("q_proj",), clip_norm=limit), family.base([(9, 12), (12, 5), (4, 4)])
    state = family.state(method, base)
    replies = _replies(method, state, clients, seed)
    norms = {
        m.id: sum((c**2).sum() for c in _changes(family, _none(state), m, u).values()) ** 0.5 for m, u, _ in replies
    }
    shortened = [
        (m, {n: a * min(1.0, limit / norms[m.id]) if n.endswith("/A") else a for n, a in u.items()}, w)
        for m, u, w in replies
    ]
    want = family.close(FLoRA(target_modules=("q_proj",)), state, shortened)
    random.shuffle(replies)
    after = family.close(method, state, replies)
    for layer in layers_of(history.of_round(after, 1)):
        one, two = (family.product(history.of_round(s, 1), layer) for s in (after, want))
        assert np.allclose(one, two, rtol=1e-9, atol=1e-9)
    clipped = method.notes(after, None).get("clipped", [])
    assert clipped == [m.id for m, _, _ in sorted(replies, key=lambda r: r[0].id) if norms[m.id] > limit]


def _none(state):
    return {n: np.zeros_like(a, np.float64) for n, a in history.of_round(state, 0).items()}


@pytest.mark.parametrize("name", TAKERS)
def test_members_of_any_depth_end_with_the_same_model(family, base, base_folder, name):
    """What one does not train it merges: weights and digest are those of who trains all."""
    method = METHODS[name](rank=2)
    members = [Member("c0", depth=1), Member("c1", 4), Member("c2", 1, depth=2)]
    states, workers, replicas = family.play(method, base, base_folder, members, 4, {(2, "c0"), (3, "c0")})
    after = Round(method, states[-1], 5)
    for member in (method.admit(m) for m in members):
        worker, replica = workers[member.id], replicas[member.id]
        replica.install(method, after.task(member, replica.version), worker.job(method, member, 5))
    assert {r.digest for r in replicas.values()} == {digest(states[-1])}
    weights = [w.weights for w in workers.values()]
    assert all(np.array_equal(weights[0][n], other[n]) for other in weights[1:] for n in weights[0])


def test_a_warm_client_merges_what_it_does_not_train(family, base, base_folder):
    """Base plus merged plus attached is the same model for a client of one block and for one of both."""
    method = FLoRA(rank=2, start="warm")
    members = [method.admit(Member("c0", 4, depth=1)), method.admit(Member("c1", 3))]
    states, workers, replicas = family.play(method, base, base_folder, members, 3)
    after, models = Round(method, states[-1], 4), []
    for member in members:
        worker, replica = workers[member.id], replicas[member.id]
        replica.install(method, after.task(member, replica.version), worker.job(method, member, 4))
        spec, factors = worker.attached
        models.append({n: w.astype(np.float64) for n, w in worker.weights.items()})
        for layer in spec.layers:
            models[-1][f"{layer}.weight"] += spec.scale * family.product(factors, layer)
        held = history.of_round(states[-1], 3)
        assert list(spec.layers) == layers_of(carried(held, member.depth))
    assert all(np.allclose(models[0][n], models[1][n], atol=1e-5) for n in models[0])


def test_multi_krum_refuses_a_depth():
    with pytest.raises(ProtocolError, match="depth of a: expected 0 with krum_byzantine"):
        FLoRA(krum_byzantine=1).admit(Member("a", depth=1))
