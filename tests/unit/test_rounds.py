"""The protocol without sockets: what a round takes, refuses, and gives back."""

import numpy as np
import pytest

from fedtune.codecs.compression import Compression
from fedtune.errors import ConfigError, RoundError, WireError
from fedtune.method import Member
from fedtune.methods import METHODS, FedAvgLoRA, FLoRA
from fedtune.rounds import MAX_WEIGHT, Replica, Round, Task, begin, job_seed, receive, work
from fedtune.tensors import Manifest, digest
from fedtune.testing import ToyWorker


@pytest.fixture(params=[FLoRA(rank=2), FedAvgLoRA(rank=2)], ids=lambda m: m.name)
def method(request):
    return request.param


def _payload(method, state, member, seed=0):
    rng = np.random.Generator(np.random.Philox(key=seed))
    manifest = method.template(state, member)
    return b"".join(
        method.encode({s.name: rng.normal(size=s.shape).astype(np.float32) for s in manifest.specs}, manifest)
    )


def _snapshot(current):
    return current.total, current.weight, list(current.members)


def test_methods_are_found_by_name():
    assert METHODS["flora"] is FLoRA
    assert METHODS["fedavg-lora"] is FedAvgLoRA
    assert all(cls.name == name for name, cls in METHODS.items())


@pytest.mark.parametrize("name", ["fedavg-lora", "flora"])
@pytest.mark.parametrize("key", ["uplink", "downlink"])
def test_a_budget_that_no_update_meets_is_refused_at_the_start(base, name, key):
    begin(METHODS[name](rank=2, **{key: Compression(codec="ternary", budget_kb=1)}), base, 0)
    with pytest.raises(ConfigError, match=rf"method\.{key}\.budget_kb: expected at least"):
        begin(METHODS[name](rank=2, **{key: Compression(codec="ternary", budget_kb=0.01)}), base, 0)


@pytest.mark.parametrize("weight", [0, -1, MAX_WEIGHT + 1, 2**63, 2**64 - 1])
def test_a_weight_out_of_range_is_refused(method, base, weight):
    current = Round(method, method.init(base, 0), 1)
    member = method.admit(Member("a"))
    with pytest.raises(WireError, match=f"weight of a: expected 1 to {MAX_WEIGHT}, got {weight}"):
        current.add(member, _payload(method, current.state, member), weight)
    assert _snapshot(current) == (None, 0, [])


def test_the_sum_of_weights_is_bounded(method, base):
    current = Round(method, method.init(base, 0), 1)
    a, b, c = (method.admit(Member(name)) for name in "abc")
    payload = _payload(method, current.state, a)
    current.add(a, payload, MAX_WEIGHT - 5)
    before = _snapshot(current)
    with pytest.raises(WireError, match="weight of b: expected 1 to 5, got 6"):
        current.add(b, payload, 6)
    assert _snapshot(current) == before
    current.add(b, payload, 5)
    with pytest.raises(WireError):
        current.add(c, payload, 1)
    assert current.weight == MAX_WEIGHT
    assert all(np.isfinite(array).all() for array in current.close().values())


def test_a_second_update_of_a_client_is_refused(method, base):
    current = Round(method, method.init(base, 0), 1)
    member = method.admit(Member("a"))
    current.add(member, _payload(method, current.state, member), 3)
    before, state = _snapshot(current), digest(current.close())
    for seed in (0, 1):
        with pytest.raises(WireError, match="one update a round, got a second one from a"):
            current.add(member, _payload(method, current.state, member, seed), 3)
    assert _snapshot(current) == before
    assert digest(current.close()) == state


def test_a_refused_client_may_try_again(method, base):
    current = Round(method, method.init(base, 0), 1)
    member = method.admit(Member("a"))
    payload = _payload(method, current.state, member)
    for bad in (b"", payload[:-1], payload + b"\0", b"\xff" * len(payload)):
        with pytest.raises(WireError):
            current.add(member, bad, 1)
        assert _snapshot(current) == (None, 0, [])
    current.add(member, payload, 1)
    assert current.members == ["a"]


def test_a_round_without_replies_cannot_close(method, base):
    with pytest.raises(RoundError, match="round 7: expected at least one update, got none"):
        Round(method, method.init(base, 0), 7).close()


def test_closing_twice_gives_the_same_state(method, base):
    current = Round(method, method.init(base, 0), 1)
    for i, name in enumerate("ab"):
        member = method.admit(Member(name))
        current.add(member, _payload(method, current.state, member, i), 1 + i)
    assert digest(current.close()) == digest(current.close())


@pytest.mark.parametrize("since", [-2, 1, 5, 2**31 - 1, -(2**31)])
def test_a_version_that_does_not_exist_is_refused(method, base, since):
    current = Round(method, method.init(base, 0), 1)
    with pytest.raises(WireError, match=f"version held by the client: expected -1 to 0, got {since}"):
        current.task(method.admit(Member("a")), since)


def test_a_client_that_is_up_to_date_receives_nothing(method, base):
    task = Round(method, method.init(base, 0), 1).task(method.admit(Member("a")), 0)
    assert (task.since, task.version, task.payload, task.broadcast) == (0, 0, {}, Manifest(()))


def test_a_task_for_another_version_is_refused_before_anything_is_installed(method, base, base_folder):
    member = method.admit(Member("a"))
    current = Round(method, method.init(base, 0), 1)
    current.add(member, _payload(method, current.state, member), 1)
    following = Round(method, current.close(), 2)
    worker, replica = ToyWorker(base_folder), Replica()
    with pytest.raises(WireError, match=r"task.since: expected the version this client holds \(-1\), got 0"):
        list(work(method, following.task(member, 0), worker.job(method, member, 2), replica))
    assert (replica.version, replica.leaves) == (-1, {})
    assert worker.attached is None


def test_installing_the_same_task_twice_changes_nothing(method, base, base_folder):
    member = method.admit(Member("a"))
    current = Round(method, method.init(base, 0), 1)
    current.add(member, _payload(method, current.state, member), 1)
    task = Round(method, current.close(), 2).task(member, -1)
    worker, replica = ToyWorker(base_folder), Replica()
    job = worker.job(method, member, 2)
    replica.install(method, task, job)
    weights, seen = digest(worker.weights), replica.digest
    replica.install(method, task, job)
    assert (digest(worker.weights), replica.digest) == (weights, seen)


def test_a_changed_broadcast_is_noticed_by_the_digest(method, base, base_folder):
    member = method.admit(Member("a"))
    current = Round(method, method.init(base, 0), 1)
    current.add(member, _payload(method, current.state, member), 1)
    state = current.close()
    task = Round(method, state, 2).task(member, -1)
    name = next(name for name, array in task.payload.items() if array.size)
    changed = {**task.payload, name: task.payload[name] + 1}
    replica = Replica()
    replica.install(
        method, Task(2, -1, 1, task.broadcast, changed, task.update), ToyWorker(base_folder).job(method, member, 2)
    )
    assert replica.digest != digest(state)


def test_receive_trusts_only_exact_and_finite_bytes():
    manifest = Manifest.of({"x": np.zeros(2, np.float32)})
    assert receive(b"\0" * 8, manifest)["x"].tolist() == [0, 0]
    for payload in (b"", b"\0" * 7, b"\0" * 9, b"\xff" * 8):
        with pytest.raises(WireError):
            receive(payload, manifest)


def test_training_that_diverged_is_not_sent(method, base, base_folder):
    member = method.admit(Member("a"))
    worker = ToyWorker(base_folder)
    job = worker.job(method, member, 1)
    task = Round(method, method.init(base, 0), 1).task(member)
    bad = {spec.name: np.full(spec.shape, np.nan, np.float32) for spec in task.update.specs}
    job.train_fresh = job.train_attached = lambda *_: bad
    with pytest.raises(WireError, match="expected finite values, got nan"):
        list(work(method, task, job, Replica()))


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [
        ((0, 1, "client"), 9016735738629081125),
        ((7, 3, "client-00"), 3541116037757787254),
        ((2**63 - 1, 1000, "a"), 2614629767928210065),
    ],
)
def test_job_seed_golden(arguments, seed):
    assert job_seed(*arguments) == seed


def test_job_seeds_differ_and_fit_63_bits():
    seeds = {job_seed(s, r, c) for s in range(5) for r in range(1, 12) for c in ("a", "b", "client-1", "client-11")}
    assert len(seeds) == 5 * 11 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
