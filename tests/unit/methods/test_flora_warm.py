"""FLoRA's warm start is exact: the new state is the mean of the clients' models, whatever slice each began with."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import history
from fedtune.lora import key_a, key_b, layers_of, lora_scale
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.rounds import Round
from fedtune.tensors import digest
from fedtune.testing import ToyWorker

LAYER = "m.0.q_proj"
WARM = {"target_modules": ("q_proj",), "start": "warm"}
CLIENTS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 20.0), st.integers(1, 999)), min_size=1, max_size=5)


def _held(family, state):
    return history.of_round(state, history.last(state))


def _sliced(factors, layer, rank):
    return factors[key_b(layer)][:, :rank], factors[key_a(layer)][:rank]


def _untrained(method, state, member):
    """What a client that learns nothing sends: its slice with its own scale, in float64."""
    scale, update = lora_scale(member.rank, member.alpha, method.rslora), {}
    for spec in method.template(state, member).specs:
        update[spec.name] = np.zeros(spec.shape)
    held = history.of_round(state, history.last(state))
    for layer in layers_of(update):
        b, a = _sliced(held, layer, member.rank)
        update[key_a(layer)][: len(a)] = a * 0.7
        update[key_b(layer)][:, : len(a)] = b / (0.7 * scale)
    return update


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10), st.integers(1, 10), CLIENTS, CLIENTS, st.booleans(), st.integers(0, 2**32))
def test_the_new_state_is_the_mean_of_the_models(family, inputs, outputs, first, second, rslora, seed):
    """Against dense matrices: every client's model is base + state - its slice + s_k B_k A_k."""
    method = FLoRA(**WARM, rslora=rslora)
    state = family.state(method, family.base([(outputs, inputs)]))
    state = family.close(method, state, family.replies(method, state, first, seed))
    replies = family.replies(method, state, second, seed + 1)
    held, weights = _held(family, state), sum(w for *_, w in replies)
    want = 0.0
    for member, update, weight in replies:
        b, a = _sliced(held, LAYER, member.rank)
        trained = lora_scale(member.rank, member.alpha, rslora) * family.product(update, LAYER)
        want = want + weight / weights * (family.product(held, LAYER) - b @ a + trained)
    got = family.product(_held(family, family.close(method, state, replies)), LAYER)
    assert np.linalg.norm(got - want) <= 1e-12 * max(np.linalg.norm(want), 1e-3 * np.linalg.norm(trained))


@settings(max_examples=50, deadline=None)
@given(CLIENTS, CLIENTS, st.integers(0, 2**32))
def test_clients_that_learn_nothing_leave_the_state(family, first, second, seed):
    method = FLoRA(**WARM)
    state = family.state(method, family.base([(8, 6)]))
    state = family.close(method, state, family.replies(method, state, first, seed))
    replies = [
        (m, _untrained(method, state, m), w)
        for m, w in ((method.admit(Member(f"c{i}", r, alpha)), w) for i, (r, alpha, w) in enumerate(second))
    ]
    after = family.close(method, state, replies)
    before, now = _held(family, state), _held(family, after)
    want = family.product(before, LAYER)
    assert now[key_a(LAYER)].shape == before[key_a(LAYER)].shape
    assert np.linalg.norm(family.product(now, LAYER) - want) <= 1e-12 * np.linalg.norm(want)


def test_one_client_of_full_rank_simply_trains_on(family):
    method = FLoRA(**WARM, rank=6)
    state = family.state(method, family.base([(8, 6)]))
    for number in range(3):
        replies = family.replies(method, state, [(6, 3.0, 5)], number)
        state = family.close(method, state, replies)
        want = 0.5 * family.product(replies[0][1], LAYER)
        assert np.linalg.norm(family.product(_held(family, state), LAYER) - want) <= 1e-12 * np.linalg.norm(want)


def test_the_first_round_is_that_of_a_fresh_start(family):
    warm, fresh = FLoRA(**WARM), FLoRA(target_modules=("q_proj",))
    state = family.state(warm, family.base([(8, 6)]))
    replies = family.replies(warm, state, [(2, 3.0, 5), (4, 1.0, 2)])
    got, want = family.close(warm, state, replies), family.close(fresh, state, replies)
    assert np.allclose(family.product(_held(family, got), LAYER), family.product(_held(family, want), LAYER))


def test_the_state_is_canonical_and_replaces_the_one_before(family, base, base_folder):
    states, *_ = family.play(FLoRA(rank=3, start="warm"), base, base_folder, [Member("a", 2), Member("b", 5)], 4)
    for number, state in enumerate(states):
        assert {int(name[:6]) for name in state} == {0, number}
        for layer in layers_of(_held(family, state)):
            a, b = _held(family, state)[key_a(layer)], _held(family, state)[key_b(layer)]
            singular = (a**2).sum(axis=1)
            assert (np.diff(singular) <= 1e-6).all()
            assert np.allclose(singular, (b**2).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rank_budget": 5, "energy": 0.9}, {"dtype": "bfloat16"}])
def test_members_of_any_rank_prove_the_same_digest_and_train_the_same_model(family, base, base_folder, options):
    """Frozen weights and slice differ by rank, their sum does not; who was away or comes late has it too."""
    method = FLoRA(start="warm", **options)
    members = [Member("a", 1), Member("b", 4), Member("c", 9), Member("d", 4)]
    absent = {(2, "a"), (3, "a"), (3, "b")} | {(n, "d") for n in range(1, 6)}
    states, workers, replicas = family.play(method, base, base_folder, members, 5, absent)
    after, held = Round(method, states[-1], 6), _held(family, states[-1])
    fresh = ToyWorker(base_folder).weights
    for member in (method.admit(member) for member in members):
        worker, replica = workers[member.id], replicas[member.id]
        replica.install(method, after.task(member, replica.version), worker.job(method, member, 6))
        assert replica.digest == digest(states[-1])
        spec, attached = worker.attached
        for layer in layers_of(held):
            model = worker.weights[f"{layer}.weight"] + spec.scale * family.product(attached, layer)
            assert np.abs(model - fresh[f"{layer}.weight"] - family.product(held, layer)).max() < 1e-5
    for name in workers["b"].weights:
        assert np.array_equal(workers["b"].weights[name], workers["d"].weights[name])


def test_a_slice_begins_balanced_and_is_filled_up_with_fresh_rows(base, base_folder, family):
    """After one round of ranks 1 and 2 the state has 3 components; a client of rank 5 gets two fresh rows."""
    method = FLoRA(start="warm")
    states, *_ = family.play(method, base, base_folder, [Member("a", 1), Member("b", 2)], 1)
    member, worker = method.admit(Member("c", 5, 20.0)), ToyWorker(base_folder)
    job = worker.job(method, member, 2)
    method.install(job, Round(method, states[-1], 2).task(member).payload)
    (spec, attached), held = worker.attached, _held(family, states[-1])
    fresh = job.fresh(spec)
    for layer in layers_of(held):
        a, b = attached[key_a(layer)], attached[key_b(layer)]
        assert np.allclose(a[:3], held[key_a(layer)] / 2.0, atol=1e-7)  # alpha / r = 4, half of it on either side
        assert np.allclose(b[:, :3], held[key_b(layer)] / 2.0, atol=1e-7)
        assert np.array_equal(a[3:], fresh[key_a(layer)][3:])
        assert not b[:, 3:].any()


def test_a_slice_may_begin_with_rows_as_long_as_fresh_ones(base, base_folder, family):
    """The products are those of the balanced slice; every row of A has the length of a fresh A's rows on average."""
    even, long = FLoRA(start="warm"), FLoRA(start="warm", warm_length="fresh")
    states, *_ = family.play(even, base, base_folder, [Member("a", 1), Member("b", 2)], 1)
    attached, fresh = {}, {}
    for method in (even, long):
        member, worker = method.admit(Member("c", 5, 20.0)), ToyWorker(base_folder)
        job = worker.job(method, member, 2)
        method.install(job, Round(method, states[-1], 2).task(member).payload)
        spec, attached[method] = worker.attached
        fresh = job.fresh(spec)
    for layer in layers_of(fresh):
        assert np.abs(family.product(attached[long], layer) - family.product(attached[even], layer)).max() < 1e-6
        want = np.sqrt((np.linalg.norm(fresh[key_a(layer)], axis=1) ** 2).mean())
        assert np.allclose(np.linalg.norm(attached[long][key_a(layer)][:3], axis=1), want, rtol=1e-5)
        assert np.array_equal(attached[long][key_a(layer)][3:], fresh[key_a(layer)][3:])
        assert not attached[long][key_b(layer)][:, 3:].any()


def test_downloads_stay_within_a_budget(family, base, base_folder):
    method = FLoRA(rank=3, start="warm", rank_budget=6, energy=0.99)
    states, *_ = family.play(method, base, base_folder, [Member(f"c{i}", 1 + i) for i in range(4)], 30)
    budget = sum(6 * (16 + outputs) * 4 for outputs in (16, 8, 16, 8))
    assert all(sum(a.nbytes for a in method.broadcast(state, -1).values()) <= budget for state in states)
    assert method.notes(states[-1], None)["cut_off"]


def test_many_small_clients_are_summed_up(family):
    """Also where the coordinator holds exact sums, each component gives way to those whose rank reaches it."""
    method = FLoRA(**WARM)
    state = family.state(method, family.base([(10, 12)]))
    state = family.close(method, state, family.replies(method, state, [(5, 3.0, 5), (4, 1.0, 2)]))
    replies = family.replies(method, state, [(1 + i % 4, 2.0, 1 + i) for i in range(20)], 1)
    total = None
    for member, update, weight in replies:
        total = method.fold(total, update, member, weight)
    assert total.sums
    assert not any(total.parts.values())
    weights = sum(w for *_, w in replies)
    held, want = _held(family, state), family.mean_product(method, replies, LAYER)
    for member, _, weight in replies:
        b, a = _sliced(held, LAYER, member.rank)
        want = want + weight / weights * (family.product(held, LAYER) - b @ a)
    got = family.product(_held(family, method.finish(state, total, weights)), LAYER)
    assert np.linalg.norm(got - want) <= 1e-12 * np.linalg.norm(want)


# server optimisers on the product, and robust folding


def _walk(optimizer, changes):
    """The dense oracle: x after each change, as `fedtune.outer` moves plain arrays."""
    state, seen = {"w": np.zeros_like(changes[0](0.0))}, []
    for change in changes:
        x = state["w"]
        state = optimizer.step({"w": x}, {"w": change(x)}, state)
        seen.append(state["w"])
    return seen


@pytest.mark.parametrize("outer", ["none", "momentum", "nesterov", {"name": "none", "learning_rate": 0.5}])
@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_server_optimisers_move_the_product_as_they_move_a_matrix(family, outer, start):
    """Fresh: the round's change is the mean product. Warm: it is that, less the slices that gave way."""
    method = FLoRA(target_modules=("q_proj",), start=start, rank_budget=9, server_optimizer=outer)
    state, changes, got = family.state(method, family.base([(9, 12)])), [], []
    for number in range(6):
        replies = family.replies(method, state, [(2, 3.0, 5), (4, 1.0, 2)], number)
        held = history.joined(state)
        mean = family.mean_product(method, replies, LAYER)
        if start == "warm":
            for member, _, weight in replies:
                b, a = _sliced(held, LAYER, member.rank)
                mean = mean - weight / 7 * (b @ a)
        changes.append(lambda x, mean=mean: x + mean)
        state = family.close(method, state, replies)
        got.append(family.product(history.joined(state), LAYER))
    for product, want in zip(got, _walk(method.server_optimizer, changes), strict=True):
        assert np.linalg.norm(product - want) <= 1e-11 * np.linalg.norm(want)


def test_moments_stay_with_the_coordinator(family, base, base_folder):
    method = FLoRA(rank=2, rank_budget=16, server_optimizer="nesterov")
    states, *_ = family.play(method, base, base_folder, [Member("a"), Member("b")], 3)
    assert any(name.startswith("private/m/") for name in states[-1])
    assert not any(name.startswith("private") for since in (-1, 1) for name in method.broadcast(states[-1], since))
    public = {name: array for name, array in states[-1].items() if not name.startswith("private")}
    assert digest(public) == digest(states[-1])


@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_krum_leaves_out_a_product_and_never_judges_factors(family, start):
    """c02 and c03 send the same product, one of them in factors a hundred times as large and small."""
    method = FLoRA(target_modules=("q_proj",), start=start, krum_byzantine=1)
    plain = FLoRA(target_modules=("q_proj",), start=start)
    state = family.state(method, family.base([(30, 40)]))
    replies = family.replies(method, state, [(3, 6.0, 5)] * 5)
    near = replies[0][1]
    sent = [(m, {n: a * (1 + 0.01 * i) for n, a in near.items()}, w) for i, (m, _, w) in enumerate(replies)]
    a, b = key_a(LAYER), key_b(LAYER)
    sent[3] = (sent[3][0], {a: sent[2][1][a] * 100, b: sent[2][1][b] / 100}, 5)
    sent[1] = (sent[1][0], {a: near[a], b: -near[b]}, 5)
    after = family.close(method, state, sent)
    assert method.notes(after, None) == {"left_out": ["c01"]}
    want = family.close(plain, state, [reply for reply in sent if reply[0].id != "c01"])
    assert digest(after) == digest(want)
    assert digest(family.close(method, state, sent[::-1])) == digest(after)


def test_krum_judges_a_warm_start_by_what_changed(family):
    """A client whose slice is small sends a small product; that is no reason to leave it out."""
    method = FLoRA(**WARM, krum_byzantine=1)
    state = family.state(method, family.base([(9, 12)]))
    state = family.close(FLoRA(**WARM), state, family.replies(FLoRA(**WARM), state, [(6, 60.0, 1)]))
    members = [method.admit(Member(f"c{i}", r, 2.0)) for i, r in enumerate((1, 6, 6, 6, 6))]
    sent = [(m, _untrained(method, state, m), 3) for m in members]
    sent[4][1][key_b(LAYER)] *= 1.5
    assert method.notes(family.close(method, state, sent), None) == {"left_out": ["c4"]}


@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_a_long_change_is_scaled_down_to_the_limit(family, start):
    method = FLoRA(target_modules=("q_proj",), start=start, clip_norm=5.0)
    state = family.state(method, family.base([(9, 12)]))
    if start == "warm":
        first = FLoRA(**WARM)
        state = family.close(first, state, family.replies(first, state, [(3, 3.0, 1)], 9))
    replies = family.replies(method, state, [(3, 30.0, 5), (2, 0.1, 2)])
    held, want = history.joined(state), 0.0
    for member, update, weight in replies:
        change = lora_scale(member.rank, member.alpha) * family.product(update, LAYER)
        if start == "warm":
            b, a = _sliced(held, LAYER, member.rank)
            change = change - b @ a
        want = want + weight / 7 * change * min(1.0, 5.0 / np.linalg.norm(change))
    after = family.close(method, state, replies)
    moved = family.product(history.joined(after), LAYER) - family.product(held, LAYER)
    assert np.linalg.norm(moved - want) <= 1e-11 * np.linalg.norm(want)
    assert "c00" in method.notes(after, None)["clipped"]
