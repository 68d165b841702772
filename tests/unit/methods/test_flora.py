"""FLoRA is exact: the stacked product is the weighted sum of the clients' products, whatever their ranks and scales."""

import json
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedtune import history
from fedtune.errors import ProtocolError, WireError
from fedtune.lora import key_a, key_b, layers_of, load_peft
from fedtune.method import BaseModel, Member
from fedtune.methods import FLoRA
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import DTYPES, Manifest, TensorSpec, digest
from fedtune.testing import ToyWorker

SIZES = st.integers(1, 12)
LAYERS = st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=3)
CLIENTS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 64.0), st.integers(1, 10**6)), min_size=1, max_size=6)


def _base(shapes, transposed=False):
    specs = [
        TensorSpec(f"m.{i}.q_proj.weight", (o, i_) if not transposed else (i_, o), "float32")
        for i, (i_, o) in enumerate(shapes)
    ]
    return BaseModel("toy", Manifest(tuple(specs)), "0" * 64, transposed)


def _update(rng, manifest, dtype=np.float64):
    return {spec.name: rng.normal(size=spec.shape).astype(dtype) for spec in manifest.specs}


def _fold(method, state, replies):
    total = None
    for member, update, weight in replies:
        total = method.fold(total, update, member, weight)
    return method.finish(state, total, sum(weight for _, _, weight in replies))


def _product(factors, layer):
    return factors[key_b(layer)].astype(np.float64) @ factors[key_a(layer)].astype(np.float64)


def _replies(method, state, clients, seed):
    rng = np.random.Generator(np.random.Philox(key=seed))
    members = [method.admit(Member(f"c{i:02d}", rank, alpha)) for i, (rank, alpha, _) in enumerate(clients)]
    return [(m, _update(rng, method.template(state, m)), c[2]) for m, c in zip(members, clients, strict=True)]


def _worst(state, replies, rslora):
    """Largest error of any layer relative to the largest value of what it should be."""
    weight = sum(n for _, _, n in replies)
    last = {name[7:]: array for name, array in state.items() if int(name[:6]) == history.last(state)}
    worst = 0.0
    for layer in layers_of(last):
        scales = [m.alpha / (m.rank**0.5 if rslora else m.rank) for m, _, _ in replies]
        parts = [n / weight * s * _product(u, layer) for s, (_, u, n) in zip(scales, replies, strict=True)]
        worst = max(worst, float(np.abs(_product(last, layer) - sum(parts)).max() / np.abs(parts).sum(axis=0).max()))
    return worst


@settings(max_examples=200, deadline=None)
@given(LAYERS, CLIENTS, st.booleans(), st.booleans(), st.integers(0, 2**32), st.data())
def test_stacked_product_is_the_weighted_sum_of_products(layers, clients, rslora, transposed, seed, data):
    method = FLoRA(target_modules=("q_proj",), rslora=rslora)
    state = method.init(_base(layers, transposed), 0)
    replies = _replies(method, state, clients, seed)
    after = _fold(method, state, data.draw(st.permutations(replies)))
    assert _worst(after, replies, rslora) < 1e-12
    # Partial participation: the shares are over those who replied.
    some = data.draw(st.lists(st.sampled_from(replies), min_size=1, unique_by=lambda r: r[0].id))
    assert _worst(_fold(method, state, some), some, rslora) < 1e-12


def test_heterogeneous_ranks_and_scales_of_a_real_shape():
    """Grouped-query attention and unequal sides, ranks of the paper's runs, an alpha of each client's own."""
    method = FLoRA(target_modules=("q_proj",))
    state = method.init(_base([(576, 576), (576, 192), (576, 1536), (1536, 576)]), 0)
    ranks = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
    replies = _replies(method, state, [(r, 1.0 + i, 100 + 37 * i) for i, r in enumerate(ranks)], 5)
    after = _fold(method, state, replies)
    assert after["000001/m.0.q_proj/A"].shape == (160, 576)
    assert after["000001/m.2.q_proj/B"].shape == (1536, 160)
    assert _worst(after, replies, False) < 1e-14


def test_one_scale_for_all_would_be_far_off():
    """What goes wrong when each client's own scale is not folded in."""
    method = FLoRA(target_modules=("q_proj",))
    state = method.init(_base([(8, 8)]), 0)
    replies = _replies(method, state, [(4, 1.0, 1), (4, 64.0, 1)], 1)
    same = [(Member(m.id, 4, 8.0), u, n) for m, u, n in replies]
    assert _worst(_fold(method, state, replies), replies, False) < 1e-14
    assert _worst(_fold(method, state, same), replies, False) > 0.5


@settings(max_examples=50, deadline=None)
@given(LAYERS, st.integers(1, 8), st.integers(1, 7), st.integers(1, 1000), st.integers(0, 2**32))
def test_k_identical_clients_equal_one(layers, k, rank, weight, seed):
    method = FLoRA(target_modules=("q_proj",))
    state = method.init(_base(layers), 0)
    update = _update(np.random.Generator(np.random.Philox(key=seed)), method.template(state, Member("x", rank)))
    many = _fold(method, state, [(method.admit(Member(f"c{i}", rank)), update, weight) for i in range(k)])
    one = _fold(method, state, [(method.admit(Member("c", rank)), update, weight)])
    for layer in layers_of([name[7:] for name in state]):
        a, b = (_product({n[7:]: t for n, t in s.items() if n[:6] == "000001"}, layer) for s in (many, one))
        assert np.abs(a - b).max() <= 1e-12 * np.abs(b).max()


def test_one_client_is_stacked_with_its_scale_and_nothing_else():
    method = FLoRA(target_modules=("q_proj",))
    state = method.init(_base([(6, 5)]), 0)
    ((_, update, _),) = replies = _replies(method, state, [(3, 12.0, 77)], 9)
    after = _fold(method, state, replies)
    assert np.array_equal(after["000001/m.0.q_proj/A"], update["m.0.q_proj/A"] * 4.0)
    assert np.array_equal(after["000001/m.0.q_proj/B"], update["m.0.q_proj/B"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_any_order_of_arrival_gives_the_same_bits(dtype):
    method = FLoRA(target_modules=("q_proj",), dtype=dtype)
    state = method.init(_base([(6, 5), (3, 7)]), 0)
    replies = [
        (m, {name: array.astype(DTYPES[dtype]) for name, array in u.items()}, n)
        for m, u, n in _replies(method, state, [(1, 3.0, 7), (5, 1.0, 9), (2, 2.0, 1), (4, 9.0, 3)], 2)
    ]
    assert len({digest(_fold(method, state, list(order))) for order in permutations(replies)}) == 1


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_each_value_is_scaled_in_float64_and_rounded_once(dtype):
    method = FLoRA(target_modules=("q_proj",))
    state = method.init(_base([(640, 200)]), 0)
    replies = [
        (m, {name: array.astype(DTYPES[dtype]) for name, array in u.items()}, n)
        for m, u, n in _replies(method, state, [(32, 3.0, 7), (7, 1.0, 9)], 6)
    ]
    after = _fold(method, state, replies)["000001/m.0.q_proj/A"]
    factors = [n / 16 * (m.alpha / m.rank) for m, _, n in replies]
    parts = [u["m.0.q_proj/A"].astype(np.float64) * p_s for (_, u, _), p_s in zip(replies, factors, strict=True)]
    assert after.dtype == DTYPES[dtype]
    assert after.tobytes() == np.concatenate([part.astype(DTYPES[dtype]) for part in parts]).tobytes()


def test_stack_is_ordered_by_client_id():
    method = FLoRA(target_modules=("q_proj",), alpha=1.0)
    state = method.init(_base([(9, 4)]), 0)
    replies = [
        (Member(name, 1, 1.0), {"m.0.q_proj/A": np.ones((1, 9)), "m.0.q_proj/B": np.full((4, 1), value)}, 1)
        for name, value in (("b", 2.0), ("c", 3.0), ("a", 1.0))
    ]
    assert _fold(method, state, replies)["000001/m.0.q_proj/B"].tolist() == [[1.0, 2.0, 3.0]] * 4


def test_golden_round():
    """The bits of one small round are the same on every machine."""
    method = FLoRA(target_modules=("q_proj",), rank=2)
    state = method.init(_base([(6, 5)]), 0)
    replies = []
    for i, (rank, alpha, weight) in enumerate([(2, 0.0, 10), (1, 3.0, 5), (3, 1.0, 7)]):
        member = method.admit(Member(f"c{i}", rank, alpha))
        update = {
            spec.name: (np.arange(np.prod(spec.shape)).reshape(spec.shape) * 0.1 - i).astype(np.float32)
            for spec in method.template(state, member).specs
        }
        replies.append((member, update, weight))
    assert digest(state) == "44e11395db8ca697f56e152a3b0caec0ae8b156a3ee6f60c0222895abc9b4d6d"
    assert digest(_fold(method, state, replies)) == "e2f485a3c3bb703dc44766263d5496a23144c0cdfd607d4d48b84815f8f2227c"


# the state, its versions, and what clients make of it


def _run(method, base, base_folder, members, rounds, keep=lambda number, member: True):
    """Plays rounds with persistent toy workers; yields state, workers and replicas after each."""
    workers = {m.id: ToyWorker(base_folder, examples=3 + i) for i, m in enumerate(members)}
    replicas = {m.id: Replica() for m in members}
    state = method.init(base, 0)
    for number in range(1, rounds + 1):
        current = Round(method, state, number)
        for member in members:
            if keep(number, member):
                worker, replica = workers[member.id], replicas[member.id]
                task = current.task(member, replica.version)
                payload = b"".join(work(method, task, worker.job(method, member, number), replica))
                assert replica.digest == digest(state)
                current.add(member, payload, worker.examples)
        state = current.close()
    return state, workers, replicas


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_late_joiner_equals_a_client_that_came_every_round(base, base_folder, dtype):
    method = FLoRA(rank=2, dtype=dtype)
    members = [method.admit(Member(f"c{i}", 1 + i)) for i in range(3)]
    state, workers, replicas = _run(method, base, base_folder, members, 4)
    last = Round(method, state, 5)
    late, replica = ToyWorker(base_folder), Replica()
    task = last.task(members[0], -1)
    replica.install(method, task, late.job(method, members[0], 5))
    for member in members:
        worker = workers[member.id]
        replicas[member.id].install(method, last.task(member, 3), worker.job(method, member, 5))
        assert digest(worker.weights) == digest(late.weights)
        assert replicas[member.id].digest == replica.digest == digest(state)
    assert replica.version == 4
    assert digest(late.weights) != digest(ToyWorker(base_folder).weights)


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 4)))
def test_every_path_of_versions_leads_to_the_same_weights_and_digest(base, base_folder, stops):
    method = FLoRA(rank=1)
    members = [method.admit(Member(f"c{i}")) for i in range(2)]
    state, _, _ = _run(method, base, base_folder, members, 4)
    worker, replica = ToyWorker(base_folder), Replica()
    for version in [*sorted(stops), 4]:
        then = {name: array for name, array in state.items() if int(name[:6]) <= version}
        task = Round(method, then, version + 1).task(members[0], replica.version)
        replica.install(method, task, worker.job(method, members[0], version + 1))
        assert replica.digest == digest(then)
    straight, other = ToyWorker(base_folder), Replica()
    other.install(method, Round(method, state, 5).task(members[0]), straight.job(method, members[0], 5))
    assert digest(worker.weights) == digest(straight.weights)
    assert replica.digest == other.digest == digest(state)


def test_skipped_rounds_are_caught_up_and_the_base_ends_as_the_sum(base, base_folder):
    method = FLoRA(rank=2)
    members = [method.admit(Member(f"c{i}", 1 + i, 1.5)) for i in range(3)]
    state, workers, replicas = _run(
        method, base, base_folder, members, 5, keep=lambda number, member: (number + int(member.id[1])) % 3 != 0
    )
    after = Round(method, state, 6)
    for member in members:
        worker, replica = workers[member.id], replicas[member.id]
        replica.install(method, after.task(member, replica.version), worker.job(method, member, 6))
        assert replica.digest == digest(state)
    assert len({digest(worker.weights) for worker in workers.values()}) == 1
    fresh, factors = ToyWorker(base_folder).weights, history.joined(state)
    for layer in layers_of(factors):
        got = workers["c0"].weights[f"{layer}.weight"].astype(np.float64)
        want = fresh[f"{layer}.weight"].astype(np.float64) + _product(factors, layer)
        assert np.abs(got - want).max() < 1e-5


def test_broadcast_sends_just_what_is_missing(base):
    method = FLoRA(rank=2)
    state = dict(method.init(base, 0))
    for number in (1, 2):
        state = dict(_fold(method, state, _replies(method, state, [(2, 0.0, 1)], number)))
    assert {name[:6] for name in method.broadcast(state, -1)} == {"000000", "000001", "000002"}
    assert {name[:6] for name in method.broadcast(state, 0)} == {"000001", "000002"}
    assert {name[:6] for name in method.broadcast(state, 1)} == {"000002"}
    assert method.broadcast(state, 2) == {}


def test_finish_leaves_the_earlier_state_alone(base):
    method = FLoRA(rank=2)
    state = method.init(base, 0)
    before, names = digest(state), list(state)
    after = _fold(method, state, _replies(method, state, [(2, 0.0, 1)], 0))
    assert (digest(state), list(state)) == (before, names)
    assert digest({name: after[name] for name in names}) == before
    assert Manifest.of(state).nbytes == 0


def test_template_names_layers_in_the_bases_order(base):
    method = FLoRA(rank=2, target_modules=("v_proj", "q_proj"), dtype="bfloat16")
    specs = method.template(method.init(base, 0), Member("a", 7, 1.0)).specs
    assert [(s.name, s.shape, s.dtype) for s in specs[:4]] == [
        ("model.layers.0.self_attn.q_proj/A", (7, 16), "bfloat16"),
        ("model.layers.0.self_attn.q_proj/B", (16, 7), "bfloat16"),
        ("model.layers.0.self_attn.v_proj/A", (7, 16), "bfloat16"),
        ("model.layers.0.self_attn.v_proj/B", (8, 7), "bfloat16"),
    ]


# what people take home


@pytest.mark.parametrize("rslora", [False, True])
def test_export_then_load_gives_the_product_of_all_rounds(base, tmp_path, rslora):
    method = FLoRA(rank=2, rslora=rslora)
    state, want = method.init(base, 0), {}
    for number in (1, 2, 3):
        replies = _replies(method, state, [(1, 5.0, 3), (4, 1.0, 8)], number)
        replies = [(m, {name: a.astype(np.float32) for name, a in u.items()}, n) for m, u, n in replies]
        state = _fold(method, state, replies)
        for member, update, weight in replies:
            scale = member.alpha / (member.rank**0.5 if rslora else member.rank)
            for layer in layers_of(update):
                want[layer] = want.get(layer, 0.0) + weight / 11 * scale * _product(update, layer)
    method.export(state, tmp_path, "org/base")
    back = load_peft(tmp_path)
    assert layers_of(back) == list(want)
    for layer, product in want.items():
        assert back[key_a(layer)].shape[0] == 15
        assert np.abs(_product(back, layer) - product).max() < 1e-5 * np.abs(product).max()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (15, 15, False)
    assert config["base_model_name_or_path"] == "org/base"


def test_export_of_a_run_without_rounds_is_an_empty_adapter(base, tmp_path):
    method = FLoRA()
    method.export(method.init(base, 0), tmp_path, "")
    assert load_peft(tmp_path) == {}


# clients that do not fit


def test_admit_fills_in_defaults():
    assert FLoRA(rank=8).admit(Member("a")) == Member("a", 8, 16.0)
    assert FLoRA(rank=8, alpha=4).admit(Member("a")) == Member("a", 8, 4.0)
    assert FLoRA(rank=8, alpha=4).admit(Member("a", 3)) == Member("a", 3, 4.0)
    assert FLoRA(rank=8).admit(Member("a", 3)) == Member("a", 3, 6.0)
    assert FLoRA(rank=8).admit(Member("a", 256, 1.5)) == Member("a", 256, 1.5)
    assert FLoRA(rank=512, max_rank=4).admit(Member("a")).rank == 512


@pytest.mark.parametrize("rank", [-1, -(2**31), 257, 2**32])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(ProtocolError, match=f"rank of a: expected 1 to 256, got {rank}. See method.max_rank"):
        FLoRA().admit(Member("a", rank))


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha):
    with pytest.raises(ProtocolError, match="alpha of a: expected a number above 0"):
        FLoRA().admit(Member("a", 4, alpha))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": -1},
        {"alpha": -1},
        {"alpha": float("inf")},
        {"alpha": float("nan")},
        {"max_rank": 0},
        {"target_modules": ()},
        {"dropout": 1.0},
        {"dtype": "int32"},
        {"ranks": 3},
    ],
)
def test_a_wrong_hyper_parameter_is_refused(options):
    with pytest.raises(ValidationError):
        FLoRA(**options)


@pytest.mark.parametrize(("name", "value"), [("A", 1500.0), ("B", 2048.0), ("B", -3e38)])
def test_factors_of_a_diverged_client_are_refused_and_change_nothing(base, name, value):
    method = FLoRA(rank=2)
    member = method.admit(Member("a"))
    current = Round(method, method.init(base, 0), 1)
    update = _update(np.random.Generator(np.random.Philox(key=0)), method.template(current.state, member), np.float32)
    update[f"model.layers.1.self_attn.v_proj/{name}"][0, 0] = value
    with pytest.raises(WireError, match=rf"v_proj/{name} of a: expected magnitudes below 2048"):
        current.add(member, b"".join(method.encode(update, method.template(current.state, member))), 1)
    assert (current.total, current.weight, current.members) == (None, 0, [])


def test_an_absurd_alpha_cannot_put_an_infinity_into_the_state(base):
    method = FLoRA(rank=2, dtype="float16")
    member = method.admit(Member("a", 2, 1e300))
    update = _update(np.random.Generator(np.random.Philox(key=0)), method.template(method.init(base, 0), member))
    with pytest.raises(WireError, match="magnitudes below 2048"):
        method.fold(None, update, member, 1)


def test_a_reply_of_another_rank_is_refused(base):
    method = FLoRA(rank=2)
    state = method.init(base, 0)
    update = _update(np.random.Generator(np.random.Philox(key=0)), method.template(state, Member("a", 3)), np.float32)
    payload = b"".join(method.encode(update, method.template(state, Member("a", 3))))
    with pytest.raises(WireError, match="exactly"):
        Round(method, state, 1).add(method.admit(Member("a", 2)), payload, 1)
