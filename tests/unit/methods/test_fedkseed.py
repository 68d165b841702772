"""FedKSeed does what its paper says: sums by seed, a rebuild that is the average of the clients, Pro's chances."""

from itertools import permutations

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from fedtune.codecs import raw
from fedtune.config import parse
from fedtune.directions import Pool, layout, reference
from fedtune.errors import ConfigError, ProtocolError, WireError
from fedtune.kspace import LIMIT, levels, probabilities, unpacked
from fedtune.method import Member, Part, ZeroOrder
from fedtune.methods import FedKSeed
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import PRIVATE, Manifest, digest
from fedtune.testing import ToyWorker
from fedtune.zo import REFUSED

SMALL = {"seeds": 24, "pool": "rademacher", "steps": 6, "eps": 1e-2, "learning_rate": 1e-4}


def _update(method, seeds, scalars, model=b"\0" * 32):
    rest = method.steps * method.directions - len(seeds)
    return {
        "seeds": np.array([*seeds, *[-1] * rest], np.int32),
        "scalars": np.array([*scalars, *[0] * rest], np.float32),
        "model": np.frombuffer(model, np.uint8),
    }


def _close(method, state, updates):
    total = None
    for i, (update, weight) in enumerate(updates):
        total = method.fold(total, update, Member(f"c{i}"), weight)
    return method.finish(state, total, sum(weight for _, weight in updates))


def _scalars(state):
    return state[PRIVATE + "total"] * 2.0**-32


def _turn(method, state, number, member, worker, replica):
    task = Round(method, state, number).task(member, replica.version)
    return b"".join(work(method, task, worker.job(method, member, number), replica))


def test_scalars_are_summed_by_seed_and_weighted_by_examples(base):
    method = FedKSeed(**SMALL)
    updates = [(_update(method, [3, 3, 5], [1.0, 0.5, -2.0]), 30), (_update(method, [5, 7], [4.0, 0.25]), 10)]
    after = _close(method, method.init(base, 1), updates)
    want = np.zeros(24)
    want[3], want[5], want[7] = 0.75 * 1.5, 0.75 * -2 + 0.25 * 4, 0.25 * 0.25
    assert np.abs(_scalars(after) - want).max() <= 2.0**-33
    again = _close(method, after, updates)
    assert np.abs(_scalars(again) - 2 * want).max() <= 2.0**-31


def test_coefficients_are_minus_lr_times_the_sums(base):
    method = FedKSeed(**SMALL)
    rng = np.random.default_rng(0)
    state = method.init(base, 1)
    for _ in range(5):
        state = _close(method, state, [(_update(method, rng.integers(0, 24, 6), rng.normal(size=6) * 50), 3)])
        got = unpacked(state["coefficients"]) * 2.0 ** -float(state["exponent"][0])
        want = -method.learning_rate * _scalars(state)
        assert np.abs(got - want).max() <= 2.0 ** -float(state["exponent"][0]) / 2
        assert np.abs(got - want).max() < 2e-6 * np.abs(want).max()


def test_the_unit_of_coefficients_is_fine_again_after_a_spike(base):
    method = FedKSeed(**SMALL)
    usual = _close(method, method.init(base, 1), [(_update(method, [3], [1.0]), 1)])
    spike = _close(method, usual, [(_update(method, [5], [6e4]), 1)])
    after = _close(method, spike, [(_update(method, [5], [-6e4]), 1)])
    assert spike["exponent"] < usual["exponent"]
    assert digest(after) == digest(usual)


def test_any_order_of_arrival_gives_the_same_bits(base):
    method = FedKSeed(**SMALL, pro=True)
    rng = np.random.default_rng(0)
    replies = [
        (_update(method, rng.integers(0, 24, 6), rng.normal(size=6)), int(rng.integers(1, 2**28))) for _ in "1234"
    ]
    state = method.init(base, 1)
    assert len({digest(_close(method, state, list(order))) for order in permutations(replies)}) == 1


@pytest.mark.parametrize(("pool", "seeds"), [("rademacher", 24), ("gaussian", 24), ("hadamard", 128)])
def test_one_round_is_the_average_of_the_models_the_clients_stepped_to(base, base_folder, pool, seeds):
    """The clients' own steps, taken one after another in float64, against the rebuild from the coordinator's sums."""
    method = FedKSeed(**{**SMALL, "pool": pool, "seeds": seeds})
    state = method.init(base, 5)
    members, weights, average = [Member("a"), Member("b"), Member("c")], [5, 20, 7], {}
    current = Round(method, state, 1)
    for member, weight in zip(members, weights, strict=True):
        worker, replica = ToyWorker(base_folder, 5), Replica()
        payload = _turn(method, state, 1, member, worker, replica)
        update = method.decode(payload, state, member)
        first = layout({name: array.size for name, array in worker.weights.items()})
        for name, array in worker.weights.items():
            w = array.reshape(-1).astype(np.float64)
            for k, g in zip(update["seeds"].tolist(), update["scalars"].tolist(), strict=True):
                reference.perturb(Pool(pool, 5, seeds), k, -method.learning_rate * g, w, first[name], w)
            average[name] = average.get(name, 0) + weight / sum(weights) * w
        current.add(member, payload, weight)
    after = current.close()
    start = ToyWorker(base_folder, 5).weights
    exact = method.learning_rate * _scalars(after)
    for name, array in start.items():
        rebuilt = array.reshape(-1).astype(np.float64)
        for k in np.flatnonzero(exact).tolist():
            z = reference.direction(
                Pool(pool, 5, seeds), k, layout({n: a.size for n, a in start.items()})[name], array.size
            )
            rebuilt = rebuilt - exact[k] * z / 2.0 ** Pool(pool, 5, seeds).bits
        assert np.abs(average[name] - array.reshape(-1)).max() > 1e-5
        assert np.abs(rebuilt - average[name]).max() < 1e-12
        # What clients rebuild differs by the rounding of 24-bit coefficients, at most half a unit a seed.
        replayed = np.empty_like(rebuilt)
        place = layout({n: a.size for n, a in start.items()})[name]
        reference.replay(
            Pool(pool, 5, seeds), unpacked(after["coefficients"]), int(after["exponent"][0]),
            array.reshape(-1).astype(np.float64), place, replayed,
        )  # fmt: skip
        assert np.abs(replayed - average[name]).max() < 1e-6 * np.abs(average[name] - array.reshape(-1)).max()


def test_a_client_that_comes_late_has_the_model_of_the_others(base, base_folder):
    method = FedKSeed(**SMALL, pro=True)
    state = method.init(base, 2)
    always, replica, member = ToyWorker(base_folder, 2), Replica(), Member("a")
    for number in (1, 2, 3):
        current = Round(method, state, number)
        current.add(member, _turn(method, state, number, member, always, replica), 3)
        state = current.close()
    _turn(method, state, 4, member, always, replica)
    late, fresh = ToyWorker(base_folder, 2), Replica()
    _turn(method, state, 4, Member("b"), late, fresh)
    assert digest(late.weights) == digest(always.weights) != digest(ToyWorker(base_folder, 2).weights)
    assert replica.digest == fresh.digest == digest(state)


def test_a_replica_that_disagrees_is_left_out_and_whole_again_next_round(base, base_folder):
    method = FedKSeed(**SMALL)
    workers = {name: (ToyWorker(base_folder, 2), Replica()) for name in "abc"}

    class Torn(ToyWorker):
        torn = True

        def job(self, method, member, number):
            job = super().job(method, member, number)
            plain = job.replay

            def replay(*args):
                plain(*args)
                if self.torn:
                    self.weights["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
                return bytes.fromhex(digest(self.weights))

            job.replay = replay
            return job

    workers["c"] = Torn(base_folder, 2), Replica()
    state, without = method.init(base, 2), method.init(base, 2)
    current, other = Round(method, state, 1), Round(method, without, 1)
    for name, (worker, replica) in workers.items():
        payload = _turn(method, state, 1, Member(name), worker, replica)
        current.add(Member(name), payload, 10)
        if name != "c":
            other.add(Member(name), payload, 10)
    state = current.close()
    assert digest(state) == digest(other.close())
    Torn.torn = False
    for name, (worker, replica) in workers.items():
        _turn(method, state, 2, Member(name), worker, replica)
    assert len({digest(worker.weights) for worker, _ in workers.values()}) == 1


def test_pro_prefers_seeds_whose_scalars_were_large(base):
    method = FedKSeed(**SMALL, pro=True)
    state = method.init(base, 1)
    assert np.allclose(probabilities(state["levels"]), 1 / 24)
    after = _close(method, state, [(_update(method, [0, 1, 1, 2], [9.0, 1.0, -1.0, 1e4]), 1)])
    # Histories begin with a zero, and sizes are clipped to 1000: a = 9/2, 2/3, 1000/2, and 0 for the rest.
    p = probabilities(after["levels"])
    assert abs(p.sum() - 1) < 1e-12
    assert p[2] > p[0] > p[1] >= p[3]
    assert p.max() / p.min() == pytest.approx(np.e)
    want = np.exp(np.array([4.5, 2 / 3, 500] + [0] * 21) / 500)
    assert np.abs(p - want / want.sum()).max() < 0.005 * p.min()


def test_a_history_at_its_limit_stays_there(base):
    method = FedKSeed(**SMALL, pro=True)
    state = {**method.init(base, 1), PRIVATE + "sizes": np.full(24, 2**62)}
    after = _close(method, state, [(_update(method, [0], [1e3]), 1)])
    assert (after[PRIVATE + "sizes"] == 2**62).all()
    assert after[PRIVATE + "counts"].tolist() == [1] + [0] * 23


def test_equal_histories_give_equal_chances():
    assert np.allclose(probabilities(levels(np.full(5, 77), np.full(5, 3))), 0.2)


def test_a_round_fits_in_18_kilobytes_each_way(base):
    """K = 4096, 200 steps, Pro: the encoded payloads, whatever the size of the model and the number of clients."""
    method = FedKSeed(seeds=4096, steps=200, pro=True)
    rng, state, total = np.random.default_rng(0), method.init(base, 1), None
    for i in range(60):
        update = _update(method, rng.integers(0, 4096, 200), rng.normal(size=200) * 20)
        payload = b"".join(method.encode(update, method.template(state, Member("a"))))
        assert len(payload) == 200 * 8 + 32
        total = method.fold(total, method.decode(payload, state, Member(f"c{i}")), Member(f"c{i}"), 5)
    after = method.finish(state, total, 300)
    for since in (-1, 0):
        sent = method.broadcast(after, since)
        assert len(b"".join(raw.encode(sent, Manifest.of(sent)))) <= 16_500
    assert (unpacked(after["coefficients"]) != 0).mean() > 0.9


@pytest.mark.parametrize(
    ("seeds", "scalars"),
    [([24], [1.0]), ([-2], [0.0]), ([-1], [1.0]), ([0], [LIMIT]), ([0], [np.nan]), ([0], [-np.inf])],
)
def test_updates_that_break_the_contract_are_refused(base, seeds, scalars):
    method = FedKSeed(**SMALL)
    state, update = method.init(base, 1), _update(method, seeds, scalars)
    payload = b"".join(update[name].tobytes() for name in ("seeds", "scalars", "model"))
    with pytest.raises(WireError):
        method.decode(payload, state, Member("a"))
    with pytest.raises(WireError, match="exactly"):
        method.decode(payload[:-1], state, Member("a"))


def test_a_hostile_client_is_left_out_and_named(base):
    method = FedKSeed(**SMALL, krum_byzantine=1)
    rng, state = np.random.default_rng(0), method.init(base, 1)
    seeds = rng.integers(0, 24, 6)
    updates = {f"c{i}": _update(method, seeds, 1 + rng.normal(size=6) / 9) for i in range(5)}
    updates["c2"] = _update(method, seeds, [-3e4] * 6)
    updates["c9"] = _update(method, seeds, [1.0] * 6, b"\1" * 32)

    def closed(names, plain=False):
        rounds = Round(FedKSeed(**SMALL) if plain else method, state, 1)
        for name in names:
            payload = b"".join(method.encode(updates[name], method.template(state, Member(name))))
            rounds.add(Member(name), payload, 2)
        return digest(rounds.close()), rounds.notes()

    want, _ = closed(["c0", "c1", "c3", "c4"], plain=True)
    for order in (["c0", "c1", "c2", "c3", "c4", "c9"], ["c9", "c4", "c2", "c1", "c3", "c0"]):
        assert closed(order) == (want, {"disagreed": ["c9"], "left_out": ["c2"]})
    everyone, _ = closed(["c0", "c1", "c3"], plain=True)
    notes = {"disagreed": ["c9", "d9"], "krum_byzantine": ["0 of 1"]}
    updates["d9"] = updates["c9"]
    assert closed(["c0", "c9", "c1", "d9", "c3"]) == (everyone, notes)


def test_a_weight_of_ones_own_choice_evicts_nobody_and_pulls_no_harder(base):
    method = FedKSeed(**SMALL, krum_byzantine=1)
    state = method.init(base, 1)
    near = [(_update(method, [3], [g]), 100) for g in (1.0, 1.1, 1.2, 1.3, 1.5)]
    other, same = _update(method, [3], [9.0], b"\1" * 32), _update(method, [3], [1.0])
    assert _scalars(_close(method, state, [*near, (other, 2**30)]))[3] == pytest.approx(1.15)
    assert _scalars(_close(method, state, [*near[:4], (same, 2**30)]))[3] == pytest.approx(1.075, abs=1e-6)
    assert _scalars(_close(FedKSeed(**SMALL), state, [*near, (other, 2**30)]))[3] == pytest.approx(9.0)


def test_a_round_that_nobody_can_be_trusted_in_keeps_the_state_and_says_so(base):
    method = FedKSeed(**SMALL, krum_byzantine=1)
    state, rounds = method.init(base, 1), Round(method, method.init(base, 1), 1)
    for i, model in enumerate([b"a", b"a", b"b", b"b", b"c", b"d"]):
        payload = b"".join(method.encode(_update(method, [1], [1.0], model * 32), method.template(state, Member("a"))))
        rounds.add(Member(f"c{i}"), payload, 2)
    assert digest(rounds.close()) == digest(state)
    assert list(rounds.notes()) == ["unchanged"]


def test_a_long_update_is_clipped_and_named(base):
    method = FedKSeed(**SMALL, clip_norm=5.0)
    total = method.fold(None, _update(method, [0, 1], [30.0, 40.0]), Member("a"), 1)
    total = method.fold(total, _update(method, [2], [1.0]), Member("b"), 1)
    assert method.notes({}, total) == {"clipped": ["a"]}
    assert _scalars(method.finish(method.init(base, 1), total, 2))[:3] == pytest.approx([1.5, 2.0, 0.5], abs=1e-8)


@pytest.mark.parametrize("options", [{"train": "lora", "rank": 2, "learning_rate": 0.1}, {"train": "sparse"}])
def test_parts_of_a_model_are_tuned_the_same_by_all(base, base_folder, options):
    method = FedKSeed(**{**SMALL, **options})
    state, workers = method.init(base, 2), {name: (ToyWorker(base_folder, 2), Replica()) for name in "ab"}
    for number in (1, 2):
        current = Round(method, state, number)
        for name, (worker, replica) in workers.items():
            current.add(Member(name), _turn(method, state, number, Member(name), worker, replica), 10)
        state = current.close()
        assert current.notes() == {}
    late = ToyWorker(base_folder, 2), Replica()
    for name, (worker, replica) in {**workers, "late": late}.items():
        _turn(method, state, 3, Member(name), worker, replica)
    (a, _), (b, _), fresh = workers["a"], workers["b"], ToyWorker(base_folder, 2)
    assert digest(a.tuned) == digest(b.tuned) == digest(late[0].tuned)
    if method.train == "lora":
        assert sorted(a.tuned)[:2] == [f"model.layers.0.self_attn.q_proj/{side}" for side in "AB"]
        assert a.tuned["model.layers.0.self_attn.q_proj/B"].any()
        assert digest(a.weights) == digest(fresh.weights)
    else:
        for name, before in fresh.weights.items():
            changed = (a.weights[name] != before).ravel()
            smallest = np.argsort(np.abs(before).ravel(), kind="stable")[: int(0.25 * before.size)]
            assert set(np.flatnonzero(changed)) <= set(smallest.tolist())
            assert changed.sum() > 0.8 * len(smallest)


def test_clients_with_an_adapter_of_their_own_are_refused():
    method = FedKSeed(train="lora", rank=4)
    assert method.admit(Member("a", 4, 8.0)) == Member("a", 4, 8.0)
    for member in (Member("a", 2), Member("a", 0, 3.0)):
        with pytest.raises(ProtocolError, match=r"rank 4.*--set simulation\.ranks=\[\]"):
            method.admit(member)


def test_a_density_that_tunes_nothing_is_refused(base):
    with pytest.raises(ConfigError, match=r"method\.density: expected at least 1 weight .* got 1e-09\. Raise it"):
        FedKSeed(**SMALL, train="sparse", density=1e-9).init(base, 1)
    largest = max(int(np.prod(spec.shape)) for spec in base.weights.specs)
    FedKSeed(**SMALL, train="sparse", density=1.01 / largest).init(base, 1)


def test_the_largest_sums_at_the_largest_learning_rate_are_sent(base):
    method = FedKSeed(**{**SMALL, "learning_rate": 1e6})
    state = {**method.init(base, 1), PRIVATE + "total": np.full(24, -(2**62))}
    after = _close(method, state, [(_update(method, [3], [1.0]), 1)])
    got = unpacked(after["coefficients"]) * 2.0 ** -float(after["exponent"][0])
    assert np.allclose(got, 2.0**30 * 1e6)
    with pytest.raises(ValidationError, match="learning_rate"):
        FedKSeed(learning_rate=1e7)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_optimisers_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=r"method\.optimizer: .*sgd, sign or conservative") as refusal:
        parse({"method": {"name": "fedkseed", "optimizer": name}})
    assert REFUSED[name][:40] in str(refusal.value)


def test_conservative_steps_along_several_directions_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"directions: expected 1 .* may raise it together"):
        parse({"method": {"name": "fedkseed", "optimizer": "conservative", "directions": 2}})
    assert FedKSeed(optimizer="conservative").directions == 1
    assert FedKSeed(optimizer="sgd", directions=2).directions == 2


def test_settings_that_make_no_sense_are_refused(base):
    with pytest.raises(ValidationError):
        FedKSeed(optimizer="adam")
    with pytest.raises(ConfigError, match="hadamard"):
        FedKSeed(seeds=1000).init(base, 0)


def test_the_largest_sums_do_not_overflow(base):
    method = FedKSeed(seeds=2, pool="rademacher", steps=2**13)
    most = _update(method, [0] * 2**13, [LIMIT * (1 - 1e-6)] * 2**13)
    after = _close(method, method.init(base, 1), [(most, 2**30), (most, 2**30 - 1)])
    assert _scalars(after)[0] == pytest.approx(2**13 * LIMIT, rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_over_rounds_stop_and_never_change_their_sign(base, sign):
    method = FedKSeed(seeds=2, pool="rademacher", steps=2**13)
    most = _update(method, [0] * 2**13, [sign * LIMIT * (1 - 1e-6)] * 2**13)
    state = method.init(base, 1)
    for rounds in range(1, 7):
        state = _close(method, state, [(most, 1)])
        assert _scalars(state)[0] == pytest.approx(sign * min(rounds, 2) * 2**29, rel=1e-5)
    assert np.sign(unpacked(state["coefficients"])[0]) == -sign
    back = _close(method, state, [({**most, "scalars": -most["scalars"]}, 1)])
    assert _scalars(back)[0] == pytest.approx(sign * 2**29, rel=1e-5)


def test_export_holds_what_rebuilds_the_model(base, tmp_path):
    method = FedKSeed(**SMALL)
    state = _close(method, method.init(base, 9), [(_update(method, [1], [2.0]), 1)])
    method.export(state, tmp_path, "toy")
    stored = load_file(tmp_path / "fedkseed.safetensors")
    assert stored["pool"].tolist() == [9]
    assert np.array_equal(stored["coefficients"], state["coefficients"])


def test_plan_of_a_job_is_the_methods(base, base_folder):
    seen = []

    class Job:
        known, seed = {"pool": np.array([3]), "model": np.zeros(32, np.uint8)}, 7

        def zo_steps(self, part, pool, seeds, plan):
            assert part == Part()
            seen.append((pool, seeds, plan))
            return np.full(len(seeds), np.nan, np.float32)

    method = FedKSeed(**{**SMALL, "directions": 2, "loss_clip": 3.0})
    update = method.client_update(Job(), None)
    pool, seeds, plan = seen[0]
    assert (pool, plan) == (Pool("rademacher", 3, 24), ZeroOrder(6, 2, 1e-2, 1e-4, "sgd", 3.0))
    assert len(seeds) == 12
    assert update["seeds"].tolist() == [-1] * 12
