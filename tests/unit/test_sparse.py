"""The smallest weights: the rule against a stable sort, in pieces, in numpy and in torch."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.sparse import Smallest


@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=60),
    st.floats(0, 1),
    st.integers(1, 9),
    st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16]),
)
def test_the_first_of_a_stable_sort_by_size(values, density, piece, dtype):
    base = np.array(values).astype(dtype)
    count = int(density * len(base))
    want = np.ones(len(base), bool)
    want[np.argsort(np.abs(np.array(values)), kind="stable")[:count]] = False
    rule = Smallest.of(base, base, density)
    got = [rule.left_out(start, min(piece, len(base) - start)) for start in range(0, len(base), piece)]
    assert np.concatenate(got).tolist() == want.tolist()


def test_torch_finds_the_same_ones():
    torch = pytest.importorskip("torch")
    base = np.random.default_rng(0).integers(-9, 9, 1000).astype(np.float32)
    plain, other = Smallest.of(base, base, 0.3), Smallest.of(torch.from_numpy(base), base, 0.3)
    assert other.left_out(100, 700).tolist() == plain.left_out(100, 700).tolist()
