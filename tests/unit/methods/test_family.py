"""What every LoRA method promises."""

from dataclasses import fields
from itertools import permutations

import numpy as np
import pytest

from fedtune.errors import ConfigError, ProtocolError, WireError
from fedtune.history import is_past
from fedtune.lora import key_a, load_peft
from fedtune.method import BaseModel, Member
from fedtune.methods import METHODS
from fedtune.rounds import Replica, Round
from fedtune.tensors import DTYPES, Manifest, TensorSpec, digest
from fedtune.testing import ToyWorker

LORA = sorted(METHODS.keys() - {"fedkseed", "fedavg"})
MIXED = {"flora", "flexlora", "florist", "hetlora"}


@pytest.fixture(params=LORA)
def method(request):
    return METHODS[request.param](rank=3)


def _ranks(method):
    return (
        [(1, 3.0, 7), (3, 1.0, 9), (2, 2.0, 1), (3, 9.0, 3)]
        if method.name in MIXED
        else [(0, 0, n) for n in range(1, 5)]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_order_of_arrival_gives_the_same_bits(method, base, family, dtype):
    method = type(method)(rank=3, dtype=dtype)
    state = method.init(base, 0)
    replies = [
        (m, {n: (a / 4).astype(DTYPES[dtype]) for n, a in u.items()}, w)
        for m, u, w in family.replies(method, state, _ranks(method), 2)
    ]
    assert len({digest(family.close(method, state, list(order))) for order in permutations(replies)}) == 1


def test_finish_and_fold_leave_what_they_are_given_alone(method, base, family):
    state = method.init(base, 0)
    before, names = digest(state), list(state)
    replies = family.replies(method, state, _ranks(method)[:2])
    updates = [digest(update) for _, update, _ in replies]
    family.close(method, state, replies)
    assert (digest(state), list(state)) == (before, names)
    assert [digest(update) for _, update, _ in replies] == updates


def test_who_missed_rounds_or_comes_last_ends_with_the_model_of_the_others(method, base, base_folder, family):
    members = [Member(f"c{i}") for i in range(3)]
    states, workers, replicas = family.play(method, base, base_folder, members, 5, {(2, "c1"), (3, "c1"), (4, "c2")})
    after, late, fresh = Round(method, states[-1], 6), ToyWorker(base_folder), Replica()
    fresh.install(method, after.task(method.admit(members[0])), late.job(method, method.admit(members[0]), 6))
    for m in map(method.admit, members):
        worker, replica = workers[m.id], replicas[m.id]
        replica.install(method, after.task(m, replica.version), worker.job(method, m, 6))
        assert replica.digest == fresh.digest == digest(states[-1])
        assert digest(worker.weights) == digest(late.weights)
        if late.attached is not None:
            shared = {n: a for n, a in worker.attached[1].items() if not _own(method, n)}
            assert digest(shared) == digest({n: late.attached[1][n] for n in shared})


def _own(method, name):
    return method.name == "fedsa-lora" and name.endswith("/B")


def test_what_travels_is_what_the_template_says_and_nothing_else(method, base, base_folder, family):
    member = method.admit(Member("a"))
    current, worker, replica = Round(method, method.init(base, 0), 1), ToyWorker(base_folder), Replica()
    task = current.task(member)
    replica.install(method, task, worker.job(method, member, 1))
    update = method.client_update(worker.job(method, member, 1), task.update)
    assert list(update) == task.update.names
    assert sum(a.nbytes for a in update.values()) == task.update.nbytes > 0


def test_a_compressed_uplink_is_near_the_plain_one(method, base, base_folder, family):
    if method.name == "flora" or "uplink" not in {field.name for field in fields(method)}:
        pytest.skip("has no adapter in its state, or sends it as it is")
    members = [Member("a"), Member("b")]
    plain, packed = (
        family.play(type(method)(rank=3, uplink=uplink), base, base_folder, members, 1)[0][1]
        for uplink in ("raw", "int8")
    )
    shared = {n for n in plain if n in packed and not is_past(n) and plain[n].size and plain[n].dtype.kind == "f"}
    assert shared
    assert all(np.abs(plain[n] - packed[n]).max() < 0.01 for n in shared)
    assert any(np.any(plain[n] != packed[n]) for n in shared)


def test_values_of_a_diverged_client_are_refused_and_change_nothing(method, base, family):
    state = method.init(base, 0)
    good, bad = family.replies(method, state, _ranks(method)[:2])
    total = method.fold(None, good[1], good[0], good[2])
    want = digest(method.finish(state, total, good[2]))
    next(iter(bad[1].values()))[0, 0] = -3e6
    with pytest.raises(WireError, match="magnitudes below 2048"):
        method.fold(total, bad[1], bad[0], bad[2])
    assert digest(method.finish(state, total, good[2])) == want


def test_what_is_exported_loads(method, base, base_folder, family, tmp_path):
    states, *_ = family.play(method, base, base_folder, [Member("a"), Member("b")], 2)
    method.export(states[-1], tmp_path, "org/base")
    factors = load_peft(tmp_path)
    assert factors[key_a("model.layers.1.self_attn.v_proj")].shape[1] == 16


def test_the_seed_of_the_run_draws_the_first_adapter(method, base):
    same = digest(method.init(base, 1)) == digest(method.init(base, 2))
    assert same == (method.name in {"flora", "florist"})
    assert digest(method.init(base, 1)) == digest(method.init(base, 1))


def test_a_client_of_another_rank_is_refused_where_the_mean_needs_one(method):
    if method.name in MIXED:
        assert method.admit(Member("a", 2, 5.0)) == Member("a", 2, 5.0)
        assert method.admit(Member("a", 2)) == Member("a", 2, 4.0)
        return
    assert method.admit(Member("a")) == method.admit(Member("a", 3, 6.0)) == Member("a", 3, 6.0)
    for other in (Member("a", 2), Member("a", 3, 5.0)):
        with pytest.raises(ProtocolError, match=r"expected rank 3 and alpha 6, got rank .*flora.* takes any mix"):
            method.admit(other)


@pytest.mark.parametrize("bad", [Member("a", 300), Member("a", 2, float("inf")), Member("a", 2, -1.0)])
def test_a_rank_or_alpha_that_is_none_is_refused(method, bad):
    with pytest.raises(ProtocolError):
        method.admit(bad)


def test_names_in_a_configuration_are_for_ever():
    assert (
        sorted(
            ["fedavg-lora", "fedex-lora", "fedsa-lora", "ffa-lora", "flexlora", "flora", "florist", "hetlora", "rolora"]
        )
        == LORA
    )


TABLE = "m.embed_tokens"


def _with_table(family, method):
    specs = (TensorSpec(f"{TABLE}.weight", (30, 6), "float32"), TensorSpec("m.0.q_proj.weight", (5, 6), "float32"))
    return family.state(method, BaseModel("toy", Manifest(specs), "digest"))


@pytest.mark.parametrize("name", ["fedex-lora", "flexlora", "flora", "florist"])
def test_embeddings_are_averaged_exactly(name, family):
    """A is of (r, tokens) and B of (width, r), so the change of the table, tokens x width, is (B A)'.

    What is decomposed is kept in float32.
    """
    options = {"energy": 1.0} if name == "florist" else {}
    method = METHODS[name](rank=6, target_modules=("embed_tokens", "q_proj"), **options)
    state = _with_table(family, method)
    replies = family.replies(method, state, _ranks(method) if name in MIXED else [(0, 0, 7), (0, 0, 2)])
    after = family.close(method, state, replies)
    rounds = {n[7:]: a for n, a in after.items() if n.startswith("000001")}
    adapter = {n: a for n, a in after.items() if not is_past(n)}
    scale = method._scale if name == "fedex-lora" else 1.0
    for layer in (TABLE, "m.0.q_proj"):
        want = family.mean_product(method, replies, layer).T
        got = (family.product(rounds, layer).T if rounds else 0) + (
            scale * family.product(adapter, layer).T if adapter else 0
        )
        assert got.shape == ((30, 6) if layer == TABLE else (6, 5))
        assert np.abs(got - want).max() <= (1e-12 if name == "flora" else 1e-6) * np.abs(want).max()


def test_embeddings_begin_as_peft_draws_them(family, method):
    method = type(method)(rank=3, target_modules=("embed_tokens",))
    if method.name in ("fedsa-lora", "ffa-lora", "rolora"):
        with pytest.raises(ConfigError, match=r"got m.embed_tokens. The (A of an embedding begins at zero|B .* drawn)"):
            _with_table(family, method)
        return
    state = _with_table(family, method)
    if method.name in ("flora", "florist"):
        return  # each client draws its own
    assert not state[f"{TABLE}/A"].any()
    assert 0.5 < state[f"{TABLE}/B"].std() < 1.5


def test_what_flexlora_has_no_component_for_can_still_be_learned(family):
    """One client of rank 1 in a run of rank 3: A or B of the other components is not zero, their product is."""
    method = METHODS["flexlora"](rank=3, target_modules=("embed_tokens", "q_proj"))
    state = _with_table(family, method)
    after = family.close(method, state, family.replies(method, state, [(1, 0, 1)]))
    assert not after[f"{TABLE}/A"][1:].any()
    assert np.array_equal(after[f"{TABLE}/B"][:, 1:], state[f"{TABLE}/B"][:, 1:])
    assert np.array_equal(after["m.0.q_proj/A"][1:], state["m.0.q_proj/A"][1:])
    assert not after["m.0.q_proj/B"][:, 1:].any()


@pytest.mark.parametrize("name", ["flexlora", "flora", "florist"])
def test_what_a_round_holds_does_not_grow_with_the_clients(name, family):
    """200 of them; twice the bytes of exact sums (16 an entry of the product) is the most there can be."""
    method = METHODS[name](rank=4, target_modules=("q_proj",))
    state = method.init(family.base([(20, 30)]), 0)
    clients = [(1 + i % 4, 1.0 + i % 3, 1 + i) for i in range(200)]
    replies = [
        (m, {n: a.astype(np.float32) for n, a in u.items()}, w) for m, u, w in family.replies(method, state, clients)
    ]
    digests, most = set(), 0
    for order in (replies, replies[::-1]):
        total = None
        for member, update, weight in order:
            total = method.fold(total, update, member, weight)
            kept = sum(a.nbytes for parts in total.parts.values() for part in parts.values() for a in part.pair)
            most = max(most, kept + sum(s.high.nbytes + s.low.nbytes for s in total.sums.values()))
        after = method.finish(state, total, sum(w for *_, w in replies))
        digests.add(digest(after))
    assert len(digests) == 1
    assert 0 < most <= 2 * 16 * 20 * 30
    want = family.mean_product(method, replies, "m.0.q_proj")
    got = family.product({n[7:] if is_past(n) else n: a for n, a in after.items() if a.size}, "m.0.q_proj")
    left = np.linalg.norm(got - want) / np.linalg.norm(want)
    s = np.linalg.svd(want, compute_uv=False)
    best = {"flora": 0.0, "florist": 0.1**0.5, "flexlora": np.linalg.norm(s[4:]) / np.linalg.norm(s)}[name]
    assert left <= best + 1e-6
