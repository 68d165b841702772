"""FLoRA within a rank budget: recompression changes nothing but the form, and every client ends with the same bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedtune import history
from fedtune.errors import ConfigError
from fedtune.lora import key_a, layers_of, load_peft
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import digest
from fedtune.testing import ToyWorker

EXACT = {"rank": 2, "rank_budget": 16}  # the toy base's layers are 16 x 16 and 8 x 16


def _whole(family, state):
    factors = history.joined(state)
    return {layer: family.product(factors, layer) for layer in layers_of(factors)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 5), st.floats(0.1, 9.0), st.integers(1, 99)), min_size=1, max_size=4),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 2**32),
)
def test_an_exact_budget_leaves_the_sum_of_all_rounds(family, rounds, seed):
    base = family.base([(9, 12), (12, 5)])
    method, free = (FLoRA(target_modules=("q_proj",), rank_budget=budget) for budget in (9, 0))
    state, other = family.state(method, base), family.state(free, base)
    for number, clients in enumerate(rounds):
        replies = family.replies(method, state, clients, seed + number)
        state, other = family.close(method, state, replies), family.close(free, other, replies)
        assert max(a.shape[0] for n, a in history.joined(state).items() if n.endswith("/A")) <= 9
    for got, want in zip(_whole(family, state).values(), _whole(family, other).values(), strict=True):
        assert np.abs(got - want).max() <= 1e-12 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("options", [EXACT, {"rank": 2, "rank_budget": 6, "energy": 0.9, "dtype": "bfloat16"}])
def test_all_paths_lead_to_the_same_weights_and_digest(family, base, base_folder, options):
    """One is there in every round, one misses some, one was never selected, and one joins at round 10."""
    method = FLoRA(**options)
    absent = (
        {(n, "c1") for n in (2, 3, 5, 6, 7)} | {(n, "c2") for n in range(1, 13)} | {(n, "c3") for n in range(1, 10)}
    )
    members = [Member(f"c{i}", 1 + i % 2) for i in range(4)]
    states, workers, replicas = family.play(method, base, base_folder, members, 12, absent)
    after = Round(method, states[-1], 13)
    for member in (method.admit(member) for member in members):
        worker, replica = workers[member.id], replicas[member.id]
        replica.install(method, after.task(member, replica.version), worker.job(method, member, 13))
        assert replica.digest == digest(states[-1])
    assert replicas["c2"].version == 12
    assert len({digest(worker.weights) for worker in workers.values()}) == 1
    fresh = ToyWorker(base_folder).weights
    for layer, product in _whole(family, states[-1]).items():
        assert np.abs(workers["c0"].weights[f"{layer}.weight"] - fresh[f"{layer}.weight"] - product).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 11)))
def test_any_versions_on_the_way_lead_to_the_same_bits(family, base, base_folder, stops):
    method = FLoRA(**EXACT)
    member = method.admit(Member("c0", 3))
    states = _STATES.setdefault("exact", family.play(method, base, base_folder, [member], 11)[0])
    worker, replica = ToyWorker(base_folder), Replica()
    for version in [*sorted(stops), 11]:
        task = Round(method, states[version], version + 1).task(member, replica.version)
        replica.install(method, task, worker.job(method, member, version + 1))
        assert replica.digest == digest(states[version])
    straight = ToyWorker(base_folder)
    Replica().install(method, Round(method, states[11], 12).task(member), straight.job(method, member, 12))
    assert digest(worker.weights) == digest(straight.weights)


_STATES = {}


def test_a_client_gets_only_what_it_lacks_until_a_recompression(family, base, base_folder):
    method = FLoRA(rank=3, rank_budget=16)
    states, *_ = family.play(method, base, base_folder, [Member("a"), Member("b")], 4)
    sent = [sorted({int(n[:6]) for n in method.broadcast(states[v], since)}) for v, since in [(2, 1), (2, 0), (3, 2)]]
    assert sent == [[2], [1, 2], [0, 3]]  # ranks 6, 12, then 18, which is past 16 and becomes one stack
    assert method.broadcast(states[4], 3).keys() == states[4].keys() - {n for n in states[4] if n[:6] == "000003"}


def test_two_hundred_rounds_download_no_more_than_the_budget(base, base_folder):
    """Every download is asserted in bytes, the state at each end, and the weights against the sum of what was sent."""
    method = FLoRA(rank=2, rank_budget=16)
    members = [method.admit(Member(f"c{i}", 1 + i)) for i in range(3)]
    workers = {m.id: ToyWorker(base_folder, examples=3 + i) for i, m in enumerate(members)}
    replicas = {m.id: Replica() for m in members}
    state, total = method.init(base, 0), {}
    budget = sum(16 * (a.shape[1] + b.shape[0]) * 4 for a, b in _shapes(state))
    largest = 0
    for number in range(1, 201):
        current = Round(method, state, number)
        for i, member in enumerate(members):
            if (number + i) % 4 == 0:
                continue
            worker, replica = workers[member.id], replicas[member.id]
            task = current.task(member, replica.version)
            largest = max(largest, task.broadcast.nbytes)
            current.add(
                member, b"".join(work(method, task, worker.job(method, member, number), replica)), worker.examples
            )
        for layer, product in _exact(method, current.total).items():
            total[layer] = total.get(layer, 0.0) + product
        state = current.close()
        assert sum(a.nbytes for a in state.values()) <= budget
    assert 0.5 * budget < largest <= budget
    factors = history.joined(state)
    for layer, want in total.items():
        got = factors[f"{layer}/B"].astype(np.float64) @ factors[key_a(layer)].astype(np.float64)
        assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)


def _shapes(state):
    factors = history.of_round(state, 0)
    return [(factors[key_a(layer)], factors[f"{layer}/B"]) for layer in layers_of(factors)]


def _exact(method, total):
    """The mean of the products of one round in float64, before anything is rounded."""
    products = {}
    for layer, parts in total.parts.items():
        weight = sum(part.weight for part in parts.values())
        products[layer] = sum(
            part.weight / weight * part.scale * part.pair[1].astype(np.float64) @ part.pair[0]
            for part in parts.values()
        )
    return products


def test_truncation_is_by_the_energy_threshold_and_reported(family):
    base = family.base([(20, 30)])
    method = FLoRA(target_modules=("q_proj",), rank_budget=12, energy=0.95)
    state = family.state(method, base)
    replies = family.replies(method, state, [(6, 3.0, 5), (5, 4.0, 3), (4, 1.0, 9)])
    want = family.mean_product(method, replies, "m.0.q_proj")
    after = family.close(method, state, replies)
    s = np.linalg.svd(want, compute_uv=False)
    kept = 1 + int(np.searchsorted(np.cumsum(s**2), 0.95 * (s**2).sum()))
    factors = history.joined(after)
    assert factors["m.0.q_proj/A"].shape[0] == min(kept, 12)
    error = np.linalg.norm(family.product(factors, "m.0.q_proj") - want) / np.linalg.norm(want)
    assert float(after["private/error"][0]) == pytest.approx(error, abs=1e-9)
    assert method.notes(after, None) == {"cut_off": [f"{error:.3g} of the norm"]}
    assert 0.01 < error <= 0.05**0.5 + 1e-9


def test_an_exact_budget_cuts_nothing_and_says_nothing(family, base, base_folder):
    states, *_ = family.play(FLoRA(**EXACT), base, base_folder, [Member("a", 12)], 3)
    assert all(FLoRA(**EXACT).notes(state, None) == {} for state in states)


def test_a_budget_that_might_not_do_is_refused_at_the_start(base):
    with pytest.raises(ConfigError, match=r"method\.rank_budget: expected at least 16.* got 15.*method\.energy"):
        FLoRA(rank_budget=15).init(base, 0)
    FLoRA(rank_budget=15, energy=0.999).init(base, 0)
    FLoRA(rank_budget=16).init(base, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"energy": 0.5}, "energy below 1 needs rank_budget"),
        ({"energy": 0.0}, "energy"),
        ({"rank_budget": -1}, "rank_budget"),
        ({"start": "hot"}, "start"),
        ({"warm_length": "fresh"}, "needs start = 'warm'"),
        ({"server_optimizer": "adam"}, "square of every entry"),
        ({"server_optimizer": "momentum"}, "needs rank_budget"),
        ({"server_optimizer": "sgdm"}, "server_optimizer"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        FLoRA(**options)


def test_export_of_a_recompressed_state_is_its_product(family, base, base_folder, tmp_path):
    states, *_ = family.play(FLoRA(**EXACT), base, base_folder, [Member("a", 12), Member("b", 5)], 3)
    FLoRA(**EXACT).export(states[-1], tmp_path, "toy")
    loaded = load_peft(tmp_path)
    for layer, want in _whole(family, states[-1]).items():
        assert np.allclose(family.product(loaded, layer), want, atol=1e-6)


def test_many_small_clients_are_summed_up_and_the_order_leaves_no_trace(family):
    """Past 4 O I / (O + I) ranks the coordinator holds exact sums instead of factors; the mean is the same."""
    base = family.base([(20, 30)])
    method = FLoRA(target_modules=("q_proj",))
    state = method.init(base, 0)
    clients = [(1 + i % 5, 1.0 + i % 3, 1 + i) for i in range(40)]
    replies = [
        (m, {n: a.astype(np.float32) for n, a in u.items()}, w) for m, u, w in family.replies(method, state, clients)
    ]
    held, digests = [], set()
    for order in (replies, replies[::-1], replies[17:] + replies[:17]):
        total = None
        for i, (member, update, weight) in enumerate(order):
            total = method.fold(total, update, member, weight)
            held.append(sum(a.nbytes for parts in total.parts.values() for p in parts.values() for a in p.pair))
            assert bool(total.sums) == (held[-1] == 0), i
        after = method.finish(state, total, sum(w for *_, w in replies))
        digests.add(digest(after))
    assert len(digests) == 1
    assert max(held) <= 16 * 20 * 30
    assert after["000001/m.0.q_proj/A"].shape == (20, 30)
    want = family.mean_product(method, replies, "m.0.q_proj")
    got = family.product(history.of_round(after, 1), "m.0.q_proj")
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
