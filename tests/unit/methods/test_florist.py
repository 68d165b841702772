"""FLoRIST: FLoRA's stack, cut where its energy is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune import history
from fedtune.lora import key_a, layers_of
from fedtune.methods import FLoRIST

CLIENTS = st.lists(st.tuples(st.integers(1, 6), st.floats(0.5, 20), st.integers(1, 100)), min_size=1, max_size=5)
SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(SHAPES, CLIENTS, st.floats(0.3, 1.0), st.booleans(), st.integers(0, 2**32))
def test_it_keeps_the_fewest_components_that_hold_the_energy(family, shapes, clients, energy, rslora, seed):
    method = FLoRIST(energy=energy, rslora=rslora, target_modules=("q_proj",))
    state = method.init(family.base(shapes), 0)
    replies = family.replies(method, state, clients, seed)
    object.__setattr__(method, "dtype", "float64")  # no user can: so that rounding hides nothing
    factors = history.of_round(family.close(method, state, replies), 1)
    for layer in layers_of(factors):
        u, s, vt = np.linalg.svd(family.mean_product(method, replies, layer), full_matrices=False)
        kept = factors[key_a(layer)].shape[0]
        share = np.cumsum(s**2) / (s**2).sum()
        assert share[kept - 1] >= energy - 1e-9
        assert kept == 1 or share[kept - 2] <= energy + 1e-9
        want = (u[:, :kept] * s[:kept]) @ vt[:kept]
        if kept == len(s) or s[kept - 1] - s[kept] > 1e-6 * s[0]:
            assert np.abs(family.product(factors, layer) - want).max() <= 1e-10 * max(s[0], 1)


@settings(max_examples=20, deadline=None)
@given(SHAPES, CLIENTS, st.integers(0, 2**32))
def test_with_all_the_energy_it_is_floras_sum(family, shapes, clients, seed):
    method = FLoRIST(energy=1.0, target_modules=("q_proj",))
    state = method.init(family.base(shapes), 0)
    replies = family.replies(method, state, clients, seed)
    factors = history.of_round(family.close(method, state, replies), 1)
    for layer in layers_of(factors):
        want = family.mean_product(method, replies, layer)
        assert np.abs(family.product(factors, layer) - want).max() <= 1e-5 * max(np.abs(want).max(), 1)


def test_less_energy_is_fewer_bytes_down(family):
    sizes = []
    for energy in (1.0, 0.9, 0.5):
        method = FLoRIST(energy=energy, target_modules=("q_proj",))
        state = method.init(family.base([(40, 30)]), 0)
        after = family.close(method, state, family.replies(method, state, [(8, 0, 1), (4, 0, 2)]))
        sizes.append(sum(a.nbytes for a in method.broadcast(after, 0).values()))
    assert sizes[0] == 12 * (40 + 30) * 4
    assert sizes[0] > sizes[1] > sizes[2] > 0
