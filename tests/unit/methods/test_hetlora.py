"""HetLoRA: padded factors, weighted by the norms of their products."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.lora import layers_of, lora_scale
from fedtune.method import Member
from fedtune.methods import HetLoRA
from fedtune.rounds import Round
from fedtune.tensors import digest
from fedtune.testing import ToyWorker

CLIENTS = st.lists(st.tuples(st.integers(1, 5), st.floats(0.5, 20), st.integers(1, 100)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3), CLIENTS, st.integers(0, 2**32)
)
def test_it_is_the_padded_mean_by_dense_norms(family, shapes, clients, seed):
    method = HetLoRA(rank=5, target_modules=("q_proj",))
    state = family.state(method, family.base(shapes), seed)
    replies = family.replies(method, state, clients, seed)
    after = family.close(method, state, replies)
    for layer in layers_of(state):
        scales = [lora_scale(m.rank, m.alpha) for m, *_ in replies]
        norms = [np.linalg.norm(s * family.product(u, layer)) for s, (_, u, _) in zip(scales, replies, strict=True)]
        for side, axis in (("A", 0), ("B", 1)):
            want = 0
            for norm, s, (m, u, _) in zip(norms, scales, replies, strict=True):
                pad = [(0, 0), (0, 0)]
                pad[axis] = (0, 5 - m.rank)
                want = want + norm / sum(norms) * s**0.5 * np.pad(u[f"{layer}/{side}"], pad)
            assert np.abs(after[f"{layer}/{side}"] - want).max() <= 1e-9 * max(np.abs(want).max(), 1)


def test_the_number_of_examples_has_no_say(family):
    method = HetLoRA(rank=4, target_modules=("q_proj",))
    state = family.state(method, family.base([(6, 5)]))
    one, other = (family.replies(method, state, [(4, 0, n), (2, 0, 3)]) for n in (1, 1000))
    a, b = family.close(method, state, one), family.close(method, state, other)
    assert all(np.array_equal(a[n], b[n]) for n in a)


def test_a_client_takes_the_leading_rows_and_its_own_scale_cancels(base, base_folder):
    method = HetLoRA(rank=4)
    rng = np.random.Generator(np.random.Philox(key=1))
    state = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in method.init(base, 0).items()}
    for rank, alpha in ((4, 8.0), (2, 8.0), (1, 3.0)):
        member, worker = method.admit(Member("a", rank, alpha)), ToyWorker(base_folder)
        method.install(worker.job(method, member, 1), method.broadcast(state, -1))
        for layer in layers_of(state):
            a, b = (worker.attached[1][f"{layer}/{side}"] for side in "AB")
            want = state[f"{layer}/B"][:, :rank] @ state[f"{layer}/A"][:rank]
            assert np.abs(alpha / rank * b @ a - want).max() < 1e-5


def test_no_training_is_the_uniform_mean(family):
    """All products zero: there are no norms to weigh by."""
    method = HetLoRA(rank=2, target_modules=("q_proj",))
    state = family.state(method, family.base([(6, 5)]))
    replies = family.replies(method, state, [(2, 0, 1), (2, 0, 1)])
    still = [(m, {n: a * n.endswith("/A") for n, a in u.items()}, w) for m, u, w in replies]
    after = family.close(method, state, still)
    want = sum(2**0.5 * u["m.0.q_proj/A"] for _, u, _ in still) / 2
    assert np.allclose(after["m.0.q_proj/A"], want)
    assert not after["m.0.q_proj/B"].any()


# rank self-pruning


class _Shrinking(ToyWorker):
    """A client whose training multiplies all factors by `by`."""

    by = 0.5

    def job(self, method, member, round_number):
        job = super().job(method, member, round_number)
        job.tails = []

        def train(frozen=(), tail=None):
            job.tails.append(tail)
            return {name: array * np.float32(self.by) for name, array in job.attached().items()}

        job.train_attached = train
        return job


def _turn(method, state, folder, by, memory=None, rank=5):
    member, worker = method.admit(Member("a", rank, 10.0)), _Shrinking(folder)
    worker.by = by
    worker.memory.update(memory or {})
    current = Round(method, state, 1)
    task = current.task(member)
    job = worker.job(method, member, 1)
    method.install(job, task.payload)
    update = method.client_update(job, task.update)
    payload = b"".join(method.encode(update, task.update))
    current.add(member, payload, 3)
    return update, payload, job, current


@pytest.fixture
def trained(base):
    """A state in which every component counts."""

    def make(method):
        rng = np.random.Generator(np.random.Philox(key=1))
        return {n: rng.normal(size=a.shape).astype(np.float32) for n, a in method.init(base, 0).items()}

    return make


@pytest.mark.parametrize(("by", "kept"), [(0.5, 3), (1.0, 5), (1.5, 5)])
def test_a_client_prunes_itself_where_the_penalised_part_became_smaller(base_folder, trained, by, kept):
    """3 = int(0.7 * 5). Nothing is pruned where the part is as large as before, or larger."""
    method = HetLoRA(rank=5, prune_gamma=0.7, prune_penalty=0.25)
    update, payload, job, current = _turn(method, trained(method), base_folder, by)
    assert [(tail.start, tail.weight) for tail in job.tails] == [(3, 0.25)]
    assert {a.shape[0] for n, a in update.items() if n.endswith("/A")} == {kept}
    assert {a.shape[1] for n, a in update.items() if n.endswith("/B")} == {kept}
    assert len(payload) == sum(a.nbytes for a in update.values())
    current.close()
    assert current.notes() == ({"pruned": ["a: 3 of 5"]} if kept == 3 else {})
    again, *_ = _turn(method, trained(method), base_folder, 1.0, job.memory)
    assert {a.shape[0] for n, a in again.items() if n.endswith("/A")} == {kept}


def test_what_is_pruned_counts_as_zeros_and_the_scale_stays(base, base_folder, trained):
    """The next state is that of an update whose last components are zero."""
    method = HetLoRA(rank=5, prune_gamma=0.7)
    state = trained(method)
    update, *_, current = _turn(method, state, base_folder, 0.5)
    padded = {n: np.pad(a, [(0, 2), (0, 0)] if n.endswith("/A") else [(0, 0), (0, 2)]) for n, a in update.items()}
    plain = Round(HetLoRA(rank=5), state, 1)
    plain.add(method.admit(Member("a", 5, 10.0)), b"".join(a.tobytes() for a in padded.values()), 3)
    assert digest(current.close()) == digest(plain.close())


@pytest.mark.parametrize("rslora", [False, True])
def test_a_pruned_client_goes_on_from_its_slice_at_its_old_scale(base_folder, trained, rslora):
    method = HetLoRA(rank=5, prune_gamma=0.7, rslora=rslora)
    state = trained(method)
    *_, job, _ = _turn(method, state, base_folder, 1.0, {"hetlora/rank": np.array([3])})
    spec, factors = job._worker.attached
    assert spec.rank == 3
    assert spec.scale == pytest.approx(lora_scale(5, 10.0, rslora))
    for layer in layers_of(state):
        want = state[f"{layer}/B"][:, :3] @ state[f"{layer}/A"][:3]
        assert np.abs(spec.scale * factors[f"{layer}/B"] @ factors[f"{layer}/A"] - want).max() < 1e-4


def test_rank_falls_to_one_and_no_further(base_folder, trained):
    method = HetLoRA(rank=5, prune_gamma=0.5)
    state, memory, ranks = trained(method), {}, []
    for _ in range(4):
        update, _, job, _ = _turn(method, state, base_folder, 0.5, memory)
        memory = job.memory
        ranks.append(next(iter(update.values())).shape[0])
    assert ranks == [2, 1, 1, 1]


def test_without_pruning_nothing_is_penalised_and_one_length_is_taken(base_folder, trained):
    method = HetLoRA(rank=5)
    state = trained(method)
    member = method.admit(Member("a"))
    _, payload, job, _ = _turn(method, state, base_folder, 0.5)
    assert job.tails == [None]
    assert not job.memory
    assert method.sizes(state, member) == (len(payload), len(payload))
    with pytest.raises(WireError, match=f"exactly {len(payload)} bytes"):
        method.decode(payload[: len(payload) // 5], state, member)


def test_only_whole_ranks_up_to_the_clients_own_are_read(trained):
    method = HetLoRA(rank=5, prune_gamma=0.9)
    state = trained(method)
    member = method.admit(Member("a", 3))
    one = method.template(state, method.admit(Member("a", 1))).nbytes
    assert method.sizes(state, member) == (one, 3 * one)
    for rank in (1, 2, 3):
        assert method.decode(bytes(rank * one), state, member)[f"{layers_of(state)[0]}/A"].shape[0] == rank
    for size in (0, one - 4, one + 4, 3 * one + 4, 4 * one):
        with pytest.raises(WireError, match="payload: expected exactly"):
            method.decode(bytes(size), state, member)
