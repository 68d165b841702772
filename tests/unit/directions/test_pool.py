"""What the pools promise: signs, orthogonality, moments, layout, and bounds that are checked."""

import numpy as np
import pytest

from fedtune.directions import TILE, Pool, layout, reference
from fedtune.errors import ConfigError


def test_tensors_are_laid_out_by_name_at_whole_tiles():
    assert layout({"b": 1, "a": TILE + 1, "c": TILE}) == {"a": 0, "b": 2 * TILE, "c": 3 * TILE}


@pytest.mark.parametrize("size", [128, 1024, 4096])
def test_hadamard_directions_are_orthogonal_on_whole_blocks(size):
    pool = Pool("hadamard", 3, size)
    ks = np.random.default_rng(0).choice(size, 12, replace=False)
    z = np.stack([reference.direction(pool, int(k), TILE, TILE) for k in ks])
    assert set(np.unique(z)) == {-1, 1}
    assert np.array_equal(z @ z.T, TILE * np.eye(12, dtype=np.int64))


@pytest.mark.parametrize(("kind", "size"), [("rademacher", 4096), ("hadamard", 4096), ("gaussian", 4096)])
def test_directions_look_random(kind, size):
    pool = Pool(kind, 11, size)
    z = np.stack([reference.direction(pool, k, 0, 16 * TILE) for k in (0, 1, 2, 2049, 4095)]) / 2.0**pool.bits
    n = z.shape[1]
    assert np.abs(z.mean(1)).max() < 5 / n**0.5
    assert np.abs((z**2).mean(1) - 1).max() < 8 / n**0.5
    correlations = z @ z.T / n - np.diag((z**2).mean(1))
    assert np.abs(correlations).max() < 5 / n**0.5
    shifted = (z[:, :-1] * z[:, 1:]).mean(1)
    assert np.abs(shifted).max() < 5 / n**0.5


def test_directional_energy_is_that_of_the_gradient():
    """E[(z.g)^2] = |g|^2, which is what makes the estimate unbiased."""
    g = np.random.default_rng(0).normal(size=3000) * np.linspace(0, 1, 3000) ** 4
    for kind, size in (("rademacher", 400), ("gaussian", 400), ("hadamard", 512)):
        pool = Pool(kind, 5, size)
        dots = [(reference.direction(pool, k, 0, 3000) @ g) / 2.0**pool.bits for k in range(400)]
        assert abs(np.mean(np.square(dots)) / (g @ g) - 1) < 5 * (2 / 400) ** 0.5


def test_another_seed_gives_other_directions():
    a, b = (reference.direction(Pool("hadamard", seed, 4096), 5, 0, TILE) for seed in (1, 2**63 + 1))
    assert abs(int(a @ b)) < 5 * TILE**0.5


@pytest.mark.parametrize(
    ("kind", "seed", "size"),
    [("sobol", 0, 4), ("hadamard", 0, 100), ("hadamard", 0, 64), ("hadamard", 0, 8192), ("gaussian", -1, 4),
     ("gaussian", 2**64, 4), ("rademacher", 0, 0)],
)  # fmt: skip
def test_pools_that_do_not_exist_are_refused(kind, seed, size):
    with pytest.raises(ConfigError, match="pool"):
        Pool(kind, seed, size)


def test_sums_that_could_overflow_are_refused():
    pool, base = Pool("rademacher", 0, 2), np.zeros(1, np.float32)
    reference.replay(pool, np.array([2**30, 1 - 2**30], np.int32), 30, base, 0, base.copy())
    with pytest.raises(ConfigError, match="less than 2\\*\\*31"):
        reference.replay(pool, np.array([2**30, -(2**30)], np.int32), 30, base, 0, base.copy())
    with pytest.raises(ConfigError, match="int32"):
        reference.replay(pool, np.zeros(2, np.int64), 30, base, 0, base.copy())
    with pytest.raises(ConfigError, match="a multiple of 4096"):
        reference.replay(pool, np.zeros(2, np.int32), 30, base, 1, base.copy())
