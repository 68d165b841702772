"""HetLoRA: padded factors, weighted by the norms of their products."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import layers_of, lora_scale
from fedtune.method import Member
from fedtune.methods import HetLoRA
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
