"""Server optimisers against the papers' formulas, written once more for single numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedtune.outer import FIRST, SECOND, Outer, ServerOptimizer

MOVES = st.lists(st.floats(-10, 10), min_size=1, max_size=6)


def _papers(name, moves, lr, b1=0.9, b2=0.99, tau=1e-3):
    """x after the given changes D, step by step."""
    x, m, v = 1.0, 0.0, tau**2
    for d in moves:
        if name == "none":
            x += lr * d
        elif name == "momentum":
            m = b1 * m + d
            x += lr * m
        elif name == "nesterov":  # as in torch.optim.SGD(nesterov=True), with gradient -d
            m = b1 * m + d
            x += lr * (d + b1 * m)
        else:
            m = b1 * m + (1 - b1) * d
            v = b2 * v + (1 - b2) * d * d if name == "adam" else v - (1 - b2) * d * d * np.sign(v - d * d)
            x += lr * m / (math.sqrt(v) + tau)
    return x


def _walk(optimizer, moves):
    state = {"w": np.array([1.0])}
    for d in moves:
        before = {"w": state["w"]}
        state = optimizer.step(before, {"w": before["w"] + d}, state)
    return state


@settings(max_examples=100, deadline=None)
@given(MOVES, st.floats(0.01, 2.0), st.sampled_from(["none", "momentum", "nesterov", "adam", "yogi"]))
def test_the_steps_are_the_papers(moves, lr, name):
    got = _walk(ServerOptimizer(name=name, learning_rate=lr), moves)["w"][0]
    assert got == pytest.approx(_papers(name, moves, lr), rel=1e-9, abs=1e-9)


def test_nesterov_is_torchs():
    torch = pytest.importorskip("torch")
    x = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    sgd = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=True)
    moves = [0.3, -0.2, 1.5, 0.1]
    for d in moves:
        x.grad = torch.tensor([-d], dtype=torch.float64)
        sgd.step()
    assert _walk(ServerOptimizer(name="nesterov"), moves)["w"][0] == pytest.approx(x.item(), rel=1e-12)


def test_yogi_moves_its_squares_by_their_own_size_and_adam_by_the_difference():
    """The step that is easily got wrong: the square is of D, not of m."""
    adam, yogi = (
        _walk(ServerOptimizer(name=name, beta2=0.5), [2.0, 0.5])[SECOND + "w"][0] for name in ("adam", "yogi")
    )
    first = 0.5 * 1e-6 + 0.5 * 4
    assert adam == pytest.approx(0.5 * first + 0.5 * 0.25)
    assert yogi == pytest.approx(1e-6 + 0.5 * 4 - 0.5 * 0.25)


def test_plain_is_federated_averaging():
    assert ServerOptimizer().is_plain
    assert ServerOptimizer(learning_rate=1.0).is_plain
    assert not ServerOptimizer(learning_rate=0.5).is_plain
    assert not ServerOptimizer(name="momentum").is_plain
    assert ServerOptimizer().shares() == (1.0, 0.0)
    assert _walk(ServerOptimizer(), [0.25, 0.5])["w"] == 1.75


@pytest.mark.parametrize("name", ["none", "momentum", "nesterov"])
def test_a_linear_step_is_its_shares_of_change_and_momentum(name):
    optimizer = ServerOptimizer(name=name, learning_rate=0.3, beta1=0.6)
    p, q = optimizer.shares()
    state = {FIRST + "w": np.array([5.0])}
    got = optimizer.step({"w": np.array([1.0])}, {"w": np.array([3.0])}, state)
    assert got["w"][0] == pytest.approx(1.0 + p * 2.0 + q * 5.0)
    assert name == "none" or got[FIRST + "w"][0] == pytest.approx(0.6 * 5.0 + 2.0)


def test_arrays_keep_their_dtype_and_moments_are_float64():
    before = {"w": np.ones((2, 3), np.float32)}
    got = ServerOptimizer(name="adam").step(before, {"w": np.full((2, 3), 1.5)}, {})
    assert (got["w"].dtype, got[FIRST + "w"].dtype, got[SECOND + "w"].dtype) == (np.float32, np.float64, np.float64)
    assert before["w"][0, 0] == 1.0


def test_a_name_stands_for_a_table():
    read = TypeAdapter(Outer).validate_python
    assert read("nesterov") == ServerOptimizer(name="nesterov")
    assert read("nesterov").rate == 0.7
    assert read({"name": "adam", "learning_rate": 0.01}).rate == 0.01
    for wrong in ("sgd", {"name": "adam", "lr": 1}, {"beta1": 1.0}, {"tau": 0}, {"learning_rate": -1}):
        with pytest.raises(ValidationError):
            read(wrong)
