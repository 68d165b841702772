"""Steps without gradients, on a function whose gradient is known: f(w) = w'Hw / 2, in float64."""

import itertools

import numpy as np
import pytest

from fedtune.directions import Pool, cpu, reference
from fedtune.kspace import LIMIT
from fedtune.method import ZeroOrder
from fedtune.zo import Line, PlainWalk, train

SIZE = 60
POOLS = [Pool("rademacher", 1, 50), Pool("hadamard", 1, 128), Pool("gaussian", 1, 50)]


@pytest.fixture
def hessian():
    a = np.random.default_rng(0).normal(size=(SIZE, SIZE))
    return a @ a.T / SIZE


class Model:
    """Two tensors, so that places in the pool matter."""

    def __init__(self, hessian, pool, dtype=np.float64, backend=reference, left_out=None):
        self.hessian, self.pool = hessian, pool
        self.base = np.random.default_rng(1).normal(size=SIZE).astype(dtype)
        self.weights = {0: self.base[:20].copy(), 4096: self.base[20:].copy()}
        self.looked = {first: np.empty((1, len(w)), dtype) for first, w in self.weights.items()}
        lines = [Line(pool, backend, self.weights[first], first, left_out) for first in self.weights]
        self.walk = PlainWalk(list(zip(lines, self.looked.values(), strict=True)), self.loss)

    @property
    def w(self):
        return np.concatenate(list(self.weights.values()))

    def loss(self, step):
        w = np.concatenate([looked[0] for looked in self.looked.values()]).astype(np.float64)
        return float(w @ self.hessian @ w / 2)

    def direction(self, k):
        parts = [reference.direction(self.pool, k, first, len(w)) for first, w in self.weights.items()]
        return np.concatenate(parts) / 2.0**self.pool.bits


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.kind)
@pytest.mark.parametrize("eps", [1e-3, 10.0])
def test_the_scalar_is_the_directional_derivative_exactly(hessian, pool, eps):
    """Two-sided differences of a quadratic have no error, however large eps is."""
    model = Model(hessian, pool)
    done = train(model.walk, np.array([3], np.int32), ZeroOrder(1, 1, eps, 0.0))
    assert done.scalars[0] == pytest.approx(model.direction(3) @ hessian @ model.base, rel=1e-6)


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.kind)
@pytest.mark.parametrize("directions", [1, 3])
def test_sequential_steps_are_the_base_plus_a_sum_over_seeds(hessian, pool, directions):
    model = Model(hessian, pool)
    seeds = np.random.default_rng(2).integers(0, 20, 30 * directions).astype(np.int32)
    done = train(model.walk, seeds, ZeroOrder(30, directions, 1e-3, 1e-4))
    change = sum(-1e-4 * float(g) / directions * model.direction(k) for k, g in zip(seeds, done.scalars, strict=True))
    assert np.abs(change).max() > 1e-4
    assert np.abs(model.w - (model.base + change)).max() < 1e-12
    assert done.losses[-1] < done.losses[0]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: p.kind)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_learning_rate_of_zero_restores_every_bit(hessian, pool, dtype):
    model = Model(hessian, pool, dtype)
    train(model.walk, np.arange(40, dtype=np.int32), ZeroOrder(40, 1, 0.3, 0.0))
    assert model.w.tobytes() == model.base.tobytes()


def test_compiled_kernels_take_the_same_steps(hessian):
    weights = []
    for backend in (reference, cpu):
        model = Model(hessian, POOLS[1], np.float32, backend)
        train(model.walk, np.arange(20, dtype=np.int32), ZeroOrder(20, 1, 1e-2, 1e-3))
        weights.append(model.w.tobytes())
    assert weights[0] == weights[1]


def test_with_one_direction_all_changes_are_along_it(hessian):
    model = Model(hessian, Pool("rademacher", 4, 1))
    train(model.walk, np.zeros(10, np.int32), ZeroOrder(10, 1, 1e-2, 1e-3))
    change = (model.w - model.base) * model.direction(0)
    assert np.allclose(change, change[0], rtol=1e-9)
    assert abs(change[0]) > 1e-4


def test_conservative_steps_never_raise_the_loss(hessian):
    """Even with a learning rate at which plain steps diverge."""

    def ends(optimizer):
        model = Model(hessian, POOLS[0])
        losses = [model.w @ hessian @ model.w / 2]
        for k in range(20):
            train(model.walk, np.array([k], np.int32), ZeroOrder(1, 1, 1e-3, 0.05, optimizer))
            losses.append(model.w @ hessian @ model.w / 2)
        return losses

    assert all(after <= before for before, after in zip(ends("conservative"), ends("conservative")[1:], strict=False))
    plain = ends("sgd")
    assert any(after > before for before, after in itertools.pairwise(plain))


def test_signs_do_not_feel_the_size_of_the_loss(hessian):
    ends = []
    for scale in (1.0, 1000.0):
        model = Model(hessian * scale, POOLS[0])
        done = train(model.walk, np.arange(20, dtype=np.int32), ZeroOrder(20, 1, 1e-3, 1e-3, "sign"))
        assert set(done.scalars) <= {-1.0, 0.0, 1.0}
        ends.append(model.w.tobytes())
    assert ends[0] == ends[1]


def test_steps_that_break_the_bound_are_skipped_and_counted(hessian):
    model = Model(hessian, POOLS[0])
    losses = iter([1.0, 0.9, 5.0, 1.0, float("nan"), 1.0, 1.0, 0.95])
    model.walk.loss = lambda _: next(losses)
    done = train(model.walk, np.arange(4, dtype=np.int32), ZeroOrder(4, 1, 0.1, 0.01, "sgd", 0.5))
    assert np.isnan(done.scalars).tolist() == [False, True, True, False]
    assert done.skipped == 2
    change = -0.01 * (float(done.scalars[0]) * model.direction(0) + float(done.scalars[3]) * model.direction(3))
    assert np.allclose(model.w - model.base, change, rtol=1e-6)


@pytest.mark.parametrize("rise", [2 * LIMIT, 2 * LIMIT * (1 - 2.0**-30), 1e300, float("inf")])
def test_steps_too_steep_to_be_sent_are_not_walked_either(hessian, rise):
    """A scalar that rounds to the limit, one far beyond float32, and the last one below the limit."""
    model, most = Model(hessian, POOLS[0]), 2 * LIMIT * (1 - 2.0**-23)
    losses = iter([rise, 0.0, 0.0, rise, most, 0.0])
    model.walk.loss = lambda _: next(losses)
    done = train(model.walk, np.arange(3, dtype=np.int32), ZeroOrder(3, 1, 1.0, 1e-6))
    assert np.isnan(done.scalars).tolist() == [True, True, False]
    assert done.skipped == 2
    assert np.float32(LIMIT) > done.scalars[2] > 65535
    assert np.allclose(model.w - model.base, -1e-6 * float(done.scalars[2]) * model.direction(2), rtol=1e-6)


def test_signs_are_sent_however_steep_the_loss(hessian):
    model = Model(hessian, POOLS[0])
    losses = iter([1e9, 0.0, float("inf"), 0.0])
    model.walk.loss = lambda _: next(losses)
    done = train(model.walk, np.arange(2, dtype=np.int32), ZeroOrder(2, 1, 1.0, 1e-3, "sign"))
    assert done.scalars[0] == 1.0
    assert np.isnan(done.scalars[1])
