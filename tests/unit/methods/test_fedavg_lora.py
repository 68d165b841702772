"""FedAvg-LoRA averages A and B; it is not the mean of the products, except where it must be."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.codecs.compression import Compression
from fedtune.errors import ProtocolError, WireError
from fedtune.lora import kaiming_uniform, key_a, key_b, layers_of, load_peft
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import DTYPES, Manifest, digest
from fedtune.testing import ToyWorker

MEMBERS = [Member(f"c{i}", 3, 6.0) for i in range(4)]


def _updates(method, state, seed, count=3, same=()):
    rng = np.random.Generator(np.random.Philox(key=seed))
    shared = {name: rng.normal(size=a.shape).astype(np.float32) for name, a in state.items() if name[-1] in same}
    draw = {name: (lambda s=array.shape: rng.normal(size=s).astype(np.float32)) for name, array in state.items()}
    return [{name: shared.get(name, draw[name]()) for name in state} for _ in range(count)]


def _fold(method, state, updates, weights):
    total = None
    for member, update, weight in zip(MEMBERS, updates, weights, strict=False):
        total = method.fold(total, update, member, weight)
    return method.finish(state, total, sum(weights))


def _product(factors, layer):
    return factors[key_b(layer)].astype(np.float64) @ factors[key_a(layer)].astype(np.float64)


@pytest.fixture
def method():
    return FedAvgLoRA(rank=3)


def test_a_and_b_are_the_weighted_means(method, base):
    state = method.init(base, 0)
    updates, weights = _updates(method, state, 1), [5, 1, 4]
    after = _fold(method, state, updates, weights)
    assert list(after) == list(state)
    for name in state:
        want = sum(u[name].astype(np.float64) * n / 10 for u, n in zip(updates, weights, strict=True))
        assert np.abs(after[name] - want).max() < 1e-7 * 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 2**32))
def test_it_differs_from_the_mean_of_products_by_the_cross_terms(base, weights, seed):
    method = FedAvgLoRA(rank=3)
    state = method.init(base, 0)
    updates = _updates(method, state, seed, len(weights))
    p = np.array(weights) / sum(weights)
    after = _fold(method, state, updates, weights)
    for layer in layers_of(state):
        exact = sum(p[i] * _product(u, layer) for i, u in enumerate(updates))
        cross = sum(
            (p[i] * p[j] - (p[i] if i == j else 0))
            * updates[i][key_b(layer)].astype(np.float64)
            @ updates[j][key_a(layer)]
            for i in range(len(p))
            for j in range(len(p))
        )
        difference = _product(after, layer) - exact
        assert np.abs(difference - cross).max() < 1e-5
        assert np.abs(difference).max() > 0.05 * np.abs(exact).max()


@pytest.mark.parametrize(("same", "equal"), [("A", True), ("B", True), ("AB", True), ("", False)])
def test_it_equals_the_mean_of_products_iff_all_a_or_all_b_are_equal(method, base, same, equal):
    state = method.init(base, 0)
    updates, weights = _updates(method, state, 3, same=same), [2, 3, 5]
    after = _fold(method, state, updates, weights)
    for layer in layers_of(state):
        exact = sum(n / 10 * _product(u, layer) for u, n in zip(updates, weights, strict=True))
        assert (np.abs(_product(after, layer) - exact).max() < 1e-5) == equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_order_gives_the_same_bits(base, dtype):
    method = FedAvgLoRA(rank=3, dtype=dtype)
    state = method.init(base, 0)
    replies = [
        (m, {name: a.astype(DTYPES[dtype]) for name, a in u.items()}, n)
        for m, u, n in zip(MEMBERS, _updates(method, state, 4, 4), (1, 7, 3, 2), strict=True)
    ]
    digests = set()
    for order in permutations(replies):
        total = None
        for member, update, weight in order:
            total = method.fold(total, update, member, weight)
        digests.add(digest(method.finish(state, total, 13)))
    assert len(digests) == 1


def test_one_client_or_identical_clients_come_back_bit_for_bit(method, base):
    state = method.init(base, 0)
    (update,) = _updates(method, state, 5, 1)
    assert digest(_fold(method, state, [update], [7])) == digest(update)
    assert digest(_fold(method, state, [update] * 4, [7, 1, 2, 9])) == digest(update)


def test_golden_mean(method, base):
    """The bits of one mean are the same on every machine."""
    state = method.init(base, 0)
    grid = {name: np.arange(a.size, dtype=np.float32).reshape(a.shape) * np.float32(0.1) for name, a in state.items()}
    updates = [{name: a - np.float32(i) for name, a in grid.items()} for i in range(3)]
    assert (
        digest(_fold(method, state, updates, [3, 4, 6]))
        == "b7b6b13bb98cc31d1efc0fc7f368476e75299d8746d0da8be34b810831cfdac6"
    )


def test_init_draws_a_from_the_seed_and_b_is_zero(method, base):
    state = method.init(base, 11)
    assert digest(state) == digest(method.init(base, 11)) != digest(method.init(base, 12))
    first = layers_of(state)[0]
    rng = np.random.Generator(np.random.Philox(key=11))
    assert np.array_equal(state[key_a(first)], kaiming_uniform(rng, 3, 16))
    assert all(not state[key_b(layer)].any() for layer in layers_of(state))
    assert {str(a.dtype) for a in FedAvgLoRA(dtype="bfloat16").init(base, 0).values()} == {"bfloat16"}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 0), (2, 0), (-3, 0), (3, 5.0), (3, -6.0), (0, float("nan"))])
def test_other_ranks_and_alphas_are_refused_with_the_way_out(method, rank, alpha):
    with pytest.raises(ProtocolError, match=r"client b: expected rank 3 and alpha 6, .*'flora' takes any mix"):
        method.admit(Member("b", rank, alpha))


def test_equal_ranks_are_taken(method):
    for member in (Member("a"), Member("a", 3), Member("a", 0, 6.0), Member("a", 3, 6.0)):
        assert method.admit(member) == Member("a", 3, 6.0)


def test_a_value_too_large_to_sum_exactly_is_refused_and_changes_nothing(method, base):
    state = method.init(base, 0)
    current = Round(method, state, 1)
    good, bad = _updates(method, state, 6, 2)
    current.add(MEMBERS[0], b"".join(method.encode(good, Manifest.of(state))), 2)
    bad[list(state)[-1]][0, 0] = 2048
    with pytest.raises(WireError, match="of c1: expected magnitudes below 2048"):
        current.add(MEMBERS[1], b"".join(method.encode(bad, Manifest.of(state))), 2)
    assert current.members == ["c0"]
    assert digest(current.close()) == digest(good)


@pytest.mark.parametrize("rslora", [False, True])
def test_export_then_load_gives_the_scaled_product(base, tmp_path, rslora):
    method = FedAvgLoRA(rank=3, alpha=5.0, rslora=rslora)
    state = _fold(method, method.init(base, 0), _updates(method, method.init(base, 0), 8), [1, 1, 1])
    method.export(state, tmp_path, "")
    back = load_peft(tmp_path)
    for layer in layers_of(state):
        want = 5.0 / (3**0.5 if rslora else 3) * _product(state, layer)
        assert np.abs(_product(back, layer) - want).max() < 1e-6 * np.abs(want).max()


def test_replicas_follow_every_round(base, base_folder, method):
    state = method.init(base, 0)
    workers, replicas = [ToyWorker(base_folder) for _ in MEMBERS], [Replica() for _ in MEMBERS]
    for number in (1, 2, 3):
        current = Round(method, state, number)
        for i, member in enumerate(MEMBERS):
            if (i + number) % 3:
                task = current.task(member, replicas[i].version)
                current.add(
                    member, b"".join(work(method, task, workers[i].job(method, member, number), replicas[i])), 4
                )
                assert replicas[i].digest == digest(state)
                assert digest(workers[i].attached[1]) == digest(state)
                assert workers[i].attached[0].scale == 2
        state = current.close()


CODED = [
    Compression(codec="ternary", density=0.05),
    Compression(codec="ternary", density=0.5, scale="std", sigma="vector"),
    Compression(codec="ternary", budget_kb=0.4),
]


def _moves(method, state, seed, count=3):
    """Payloads of what `count` clients moved by, as `client_update` leaves it to `encode`."""
    manifest = method.template(state, MEMBERS[0])
    bags = _updates(method, state, seed, count)
    typed = [{s.name: bag[s.name].astype(DTYPES[s.dtype]) for s in manifest.specs} for bag in bags]
    return [b"".join(method.encode(update, manifest)) for update in typed]


@pytest.mark.parametrize("uplink", CODED, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folding_codes_gives_the_bits_of_folding_what_they_decode_to(base, uplink, dtype):
    method = FedAvgLoRA(rank=3, uplink=uplink, dtype=dtype)
    state = method.init(base, 0)
    payloads = _moves(method, state, 4)
    taken = folded = None
    for payload, member, weight in zip(payloads, MEMBERS[:3], (3, 1, 2**30), strict=True):
        taken = method.take(taken, payload, state, member, weight)
        folded = method.fold(folded, method.decode(payload, state, member), member, weight)
    for name, one in folded.items():
        np.testing.assert_array_equal(taken[name].high, one.high)
        np.testing.assert_array_equal(taken[name].low, one.low)
    assert digest(method.finish(state, taken, 2**30 + 4)) == digest(method.finish(state, folded, 2**30 + 4))


@pytest.mark.parametrize("uplink", [*CODED, Compression(codec="int8"), Compression(codec="bf16")], ids=repr)
def test_the_state_moves_by_the_mean_of_what_was_decoded(base, uplink):
    method = FedAvgLoRA(rank=3, uplink=uplink)
    state = method.init(base, 0)
    payloads, manifest = _moves(method, state, 5), method.template(state, MEMBERS[0])
    current = Round(method, state, 1)
    for payload, member, weight in zip(payloads, MEMBERS[:3], (1, 2, 5), strict=True):
        current.add(member, payload, weight)
    after = current.close()
    moves = [uplink.coder.decode(payload, manifest) for payload in payloads]
    for name, array in state.items():
        mean = sum(w * move[name].astype(np.float64) for w, move in zip((1, 2, 5), moves, strict=True)) / 8
        np.testing.assert_allclose(after[name], array.astype(np.float64) + mean, rtol=1.2e-7, atol=1e-9)


def test_robust_folding_sees_the_factors_themselves(base):
    plain = FedAvgLoRA(rank=3, uplink="bf16")
    judging = FedAvgLoRA(rank=3, uplink="bf16", clip_norm=1e6)
    state = plain.init(base, 0)
    (payload,) = _moves(plain, state, 6, 1)
    move, factors = (m.decode(payload, state, MEMBERS[0]) for m in (plain, judging))
    name = next(iter(state))
    np.testing.assert_array_equal(factors[name], (state[name].astype(np.float64) + move[name]).astype(np.float32))


def test_codes_that_diverged_are_refused_and_change_nothing(base):
    method = FedAvgLoRA(rank=3, uplink=Compression(codec="ternary", density=0.5))
    state = method.init(base, 0)
    manifest = method.template(state, MEMBERS[0])
    huge = {spec.name: np.full(spec.shape, 4096, np.float32) for spec in manifest.specs}
    current = Round(method, state, 1)
    current.add(MEMBERS[1], _moves(method, state, 7, 1)[0], 2)
    before = digest(current.close())
    with pytest.raises(WireError, match="below 2048"):
        current.add(MEMBERS[0], b"".join(method.encode(huge, manifest)), 2)
    assert digest(current.close()) == before
