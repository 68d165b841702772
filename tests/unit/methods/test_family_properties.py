"""What holds for every LoRA method and its options, over drawn shapes, ranks, scales, weights, participation, order."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import history
from fedtune.averaging import public
from fedtune.base import open_base
from fedtune.lora import key_a, layers_of
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.rounds import Replica, Round
from fedtune.tensors import digest
from fedtune.testing import ToyWorker, toy_base

MIXED = {"flora", "flexlora", "florist", "hetlora"}
LORA = sorted(METHODS.keys() - {"fedkseed", "fedavg"})
CASES = {
    **{name: (name, {}) for name in LORA},
    "flora, warm": ("flora", {"start": "warm"}),
    "flora, warm, clipped": ("flora", {"start": "warm", "clip_norm": 3.0}),
    "flora, budget": ("flora", {"rank_budget": 16, "server_optimizer": "momentum"}),
    "flora, clipped": ("flora", {"clip_norm": 3.0}),
    "flora, krum": ("flora", {"krum_byzantine": 1}),
    "fedavg-lora, krum": ("fedavg-lora", {"krum_byzantine": 1, "clip_norm": 3.0}),
    "fedavg-lora, adam": ("fedavg-lora", {"server_optimizer": "adam"}),
    "hetlora, pruning": ("hetlora", {"prune_gamma": 0.6}),
    "ffa-lora, trim": ("ffa-lora", {"trim": 1}),
    "ffa-lora, krum": ("ffa-lora", {"krum_byzantine": 1, "server_optimizer": "nesterov"}),
}
SHAPES = st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=3)
CLIENTS = st.lists(
    st.tuples(st.integers(1, 4), st.floats(0.1, 9.0), st.integers(1, 99)), min_size=5, max_size=8
)  # as many as Krum needs


def _made(case):
    name, options = CASES[case]
    return METHODS[name](rank=4, target_modules=("q_proj",), **options)


def _given(method, clients):
    """Ranks and alphas where the method takes a mix."""
    return clients if method.name in MIXED else [(0, 0.0, weight) for *_, weight in clients]


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None)
@given(shapes=SHAPES, first=CLIENTS, second=CLIENTS, seed=st.integers(0, 2**32), random=st.randoms())
def test_no_order_of_arrival_leaves_a_trace(family, case, shapes, first, second, seed, random):
    """Two rounds, since some options only act on what the first has left."""
    case = _made(case)
    state = other = case.init(family.base(shapes), 0)
    for number, clients in enumerate((first, second)):
        replies = [
            (m, {n: (a / 4).astype(np.float32) for n, a in u.items()}, w)
            for m, u, w in family.replies(case, state, _given(case, clients), seed + number)
        ]
        shuffled = random.sample(replies, len(replies))
        state, other = family.close(case, state, replies), family.close(case, other, shuffled)
        assert digest(state) == digest(other)
        assert case.notes(state, None) == case.notes(other, None)


@pytest.mark.parametrize("case", [case for case, (_, options) in CASES.items() if "clip_norm" not in options])
@settings(max_examples=10, deadline=None)
@given(
    shapes=SHAPES,
    rank=st.integers(1, 4),
    alpha=st.floats(0.1, 9.0),
    weights=st.lists(st.integers(1, 99), min_size=5, max_size=8),
    data=st.data(),
)
def test_clients_that_agree_get_what_they_agree_on(family, case, shapes, rank, alpha, weights, data):
    """Whatever the weights, and whoever is left out or trimmed: all send the same, so that is the mean."""
    case = _made(case)
    base = family.base(shapes)
    state = family.state(case, base)
    [(member, update, _)] = family.replies(case, state, _given(case, [(rank, alpha, 1)]), data.draw(st.integers(0, 99)))
    members = [case.admit(Member(f"c{i}", member.rank, member.alpha)) for i in range(len(weights))]
    many = family.close(case, state, [(m, update, w) for m, w in zip(members, weights, strict=True)])
    one = family.close(case, state, [(m, update, 1) for m in members])
    for layer in layers_of(_factors(one)):
        got, want = (_shared(family, _factors(after), layer) for after in (many, one))
        assert np.abs(got - want).max() <= 1e-5 * max(1.0, np.abs(want).max())


def _shared(family, factors, layer):
    """The product, or A where every client has a B of its own."""
    return family.product(factors, layer) if factors[f"{layer}/B"].size else factors[key_a(layer)]


def _factors(state):
    return history.joined(state) if any(history.is_past(name) for name in state) else public(state)


@pytest.mark.parametrize("name", ["flora", "flora, warm", "flora, budget", "flexlora"])
@settings(max_examples=10, deadline=None)
@given(shapes=SHAPES, clients=CLIENTS, seed=st.integers(0, 2**32))
def test_the_product_is_the_weighted_mean_of_products(family, name, shapes, clients, seed):
    """The slow oracle: dense matrices. FlexLoRA's state has the largest rank that it keeps here."""
    kind, options = CASES[name]
    options = {k: v for k, v in options.items() if k != "server_optimizer"}
    method = METHODS[kind](rank=12 if name == "flexlora" else 4, target_modules=("q_proj",), **options)
    state = family.state(method, family.base(shapes))
    replies = family.replies(method, state, clients, seed)
    after = _factors(family.close(method, state, replies))
    for layer in layers_of(after):
        want = family.mean_product(method, replies, layer)
        assert np.abs(family.product(after, layer) - want).max() <= 1e-6 * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=4, deadline=None)
@given(layers=st.integers(1, 3), width=st.sampled_from([8, 12, 16]), seed=st.integers(0, 2**32), data=st.data())
def test_whoever_took_part_when_all_end_with_one_digest(family, case, layers, width, seed, data):
    """Drawn participation: at least as many as the method needs a round; one more client joins at the end."""
    case = _made(case)
    count = max(3, case.least_updates + 1)
    members = [Member(f"c{i}", data.draw(st.integers(1, 4)) if case.name in MIXED else 0) for i in range(count)]
    absent = set()
    for number in (1, 2, 3):
        away = data.draw(st.sets(st.sampled_from(range(count)), max_size=count - case.least_updates))
        absent |= {(number, f"c{i}") for i in away}
    with tempfile.TemporaryDirectory() as folder:
        path = toy_base(Path(folder), layers=layers, width=width, seed=seed % 1000)
        base = open_base(path)
        states, workers, replicas = family.play(case, base, path, members, 3, absent)
        after, late, fresh = Round(case, states[-1], 4), ToyWorker(path), Replica()
        newcomer = case.admit(Member("z"))
        fresh.install(case, after.task(newcomer), late.job(case, newcomer, 4))
        for member in map(case.admit, members):
            worker, replica = workers[member.id], replicas[member.id]
            replica.install(case, after.task(member, replica.version), worker.job(case, member, 4))
            assert replica.digest == fresh.digest == digest(states[-1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(0, 3), SHAPES, st.integers(0, 2**32), st.randoms(), st.data())
def test_krum_leaves_out_the_hostile_whoever_they_are(family, f, more, shapes, seed, random, data):
    """Honest clients agree but for a little noise; the others send products far off. Ids and order say nothing."""
    method = METHODS["flora"](target_modules=("q_proj",), krum_byzantine=f)
    state = family.state(method, family.base(shapes))
    count = 2 * f + 3 + more
    hostile = set(random.sample(range(count), f))
    [(_, update, _)] = family.replies(method, state, [(3, 2.0, 1)], seed)
    rng = np.random.Generator(np.random.Philox(key=seed))
    replies = []
    for i in range(count):
        noise = 4.0 if i in hostile else 0.001
        sent = {n: a + noise * rng.normal(size=a.shape) for n, a in update.items()}
        replies.append((method.admit(Member(f"c{i}", 3, 2.0)), sent, data.draw(st.integers(1, 99))))
    random.shuffle(replies)
    after = family.close(method, state, replies)
    assert method.notes(after, None)["left_out"] == [f"c{i}" for i in sorted(hostile)]
    honest = [reply for reply in replies if int(reply[0].id[1:]) not in hostile]
    for layer in layers_of(history.of_round(after, 1)):
        want = family.mean_product(method, honest, layer)
        assert np.abs(family.product(history.of_round(after, 1), layer) - want).max() <= 1e-9 * np.abs(want).max()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(1, 4), SHAPES, st.integers(0, 2**32), st.randoms())
def test_a_trimmed_mean_equals_its_definition(family, trim, more, shapes, seed, random):
    """Entry by entry: sorted, both ends dropped, the rest averaged; without a trim it is the plain weighted mean."""
    method = METHODS["ffa-lora"](rank=2, target_modules=("q_proj",), trim=trim)
    state = family.state(method, family.base(shapes))
    replies = family.replies(method, state, [(0, 0.0, 1 + i) for i in range(2 * trim + more)], seed)
    random.shuffle(replies)
    after = family.close(method, state, replies)
    for name in replies[0][1]:
        sent = np.stack([update[name] for _, update, _ in replies])
        weights = [w for *_, w in replies]
        want = np.average(sent, axis=0, weights=weights)
        if trim:
            want = np.sort(sent, axis=0)[trim : len(sent) - trim].mean(axis=0)
        assert np.allclose(after[name], want, rtol=1e-6, atol=1e-6)
    assert all(np.array_equal(after[key_a(x)], state[key_a(x)]) for x in layers_of(after))


def test_every_lora_method_is_here():
    assert {name for name, _ in CASES.values()} == set(LORA)
