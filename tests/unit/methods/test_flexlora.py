"""FlexLoRA: the best slice of the sum of products, each client's own rank and scale."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.lora import layers_of, lora_scale
from fedtune.method import Member
from fedtune.methods import FlexLoRA
from fedtune.testing import ToyWorker

CLIENTS = st.lists(st.tuples(st.integers(1, 6), st.floats(0.5, 20), st.integers(1, 100)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3),
    CLIENTS,
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_state_is_the_dense_svd_cut_at_the_rank(family, shapes, clients, rslora, seed):
    method = FlexLoRA(rank=6, rslora=rslora, target_modules=("q_proj",))
    state = family.state(method, family.base(shapes), seed)
    replies = family.replies(method, state, clients, seed)
    after = family.close(method, state, replies)
    for layer in layers_of(state):
        dense = family.mean_product(method, replies, layer)
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
        want = (u[:, :6] * s[:6]) @ vt[:6]
        assert np.abs(family.product(after, layer) - want).max() <= 1e-10 * max(s[0], 1)
        held = min(6, int((s > 1e-9 * s[0]).sum()))
        norms = np.linalg.norm(after[f"{layer}/B"], axis=0)
        assert np.allclose(norms[:held], s[:held], rtol=1e-9)
        assert np.allclose(after[f"{layer}/A"][:held] @ after[f"{layer}/A"][:held].T, np.eye(held), atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.floats(0.5, 20), st.booleans(), st.integers(0, 2**32))
def test_a_client_starts_from_its_best_slice_whatever_its_scale(family, base, base_folder, rank, alpha, rslora, seed):
    method = FlexLoRA(rank=5, rslora=rslora)
    state = method.init(base, 0)
    after = family.close(method, state, family.replies(method, state, [(3, 1.0, 2), (5, 7.0, 1)], seed))
    after = {n: a.astype(np.float32) for n, a in after.items()}
    member, worker = method.admit(Member("a", rank, alpha)), ToyWorker(base_folder)
    method.install(worker.job(method, member, 2), method.broadcast(after, 0))
    for layer in layers_of(after):
        u, s, vt = np.linalg.svd(family.product(after, layer), full_matrices=False)
        got = lora_scale(rank, alpha, rslora) * family.product(worker.attached[1], layer)
        assert np.abs(got - (u[:, :rank] * s[:rank]) @ vt[:rank]).max() < 1e-5 * s[0]


def test_equal_ranks_and_scales_lose_nothing_while_the_sum_has_room(family):
    """One client of full rank: the round changes nothing but the factors' shape."""
    method = FlexLoRA(rank=4, target_modules=("q_proj",))
    state = family.state(method, family.base([(9, 7)]))
    replies = family.replies(method, state, [(4, 0, 5)])
    want = family.mean_product(method, replies, "m.0.q_proj")
    assert np.abs(family.product(family.close(method, state, replies), "m.0.q_proj") - want).max() < 1e-12 * 100


def test_where_the_sum_has_fewer_components_the_old_rows_of_a_wait_with_b_zero(family):
    method = FlexLoRA(rank=5, target_modules=("q_proj",))
    state = family.state(method, family.base([(9, 7)]))
    after = family.close(method, state, family.replies(method, state, [(2, 0, 5)]))
    assert np.array_equal(after["m.0.q_proj/A"][2:], state["m.0.q_proj/A"][2:])
    assert not after["m.0.q_proj/B"][:, 2:].any()
