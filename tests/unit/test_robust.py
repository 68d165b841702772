"""Multi-Krum and clipping, against their definitions written as loops."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError, RoundError
from fedtune.robust import clip_factors, krum_scores, multi_krum


def squares(points: np.ndarray) -> np.ndarray:
    return ((points[:, None] - points[None]) ** 2).sum(-1)


def slow_scores(points: np.ndarray, f: int) -> list[float]:
    scores = []
    for i in range(len(points)):
        others = sorted(sum((points[i] - points[j]) ** 2) for j in range(len(points)) if j != i)
        scores.append(sum(others[: len(points) - f - 2]))
    return scores


@given(f=st.integers(0, 3), extra=st.integers(0, 4), seed=st.integers(0, 2**32 - 1))
def test_scores_equal_the_definition(f: int, extra: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(2 * f + 3 + extra, 5))
    np.testing.assert_allclose(krum_scores(squares(points), f), slow_scores(points, f), rtol=1e-12)


@given(n=st.integers(5, 11), seed=st.integers(0, 2**32 - 1), scale=st.floats(1e2, 1e150))
def test_hostile_clients_are_left_out(n: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    f = (n - 3) // 2
    points = rng.normal(size=(n, 4))
    hostile = set(rng.permutation(n)[:f].tolist())
    points[list(hostile)] *= scale
    points[list(hostile)] += scale
    assert set(multi_krum(squares(points), f, n - f)) == set(range(n)) - hostile


@given(seed=st.integers(0, 2**32 - 1))
def test_who_is_kept_moves_with_the_clients(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 1000, (8, 3)).astype(float)  # sums of integers do not depend on their order
    scores = krum_scores(squares(points), 1)
    order = rng.permutation(8)
    np.testing.assert_array_equal(krum_scores(squares(points[order]), 1), scores[order])


def test_of_equal_clients_the_first_are_kept() -> None:
    for keep in range(1, 6):
        assert multi_krum(np.zeros((6, 6)), 1, keep) == tuple(range(keep))


def test_one_kept_client_is_krum() -> None:
    points = np.array([[0.0], [0.1], [0.2], [5.0], [9.0]])
    assert multi_krum(squares(points), 1, 1) == (1,)


def test_infinite_distances_are_far() -> None:
    distances = squares(np.array([[0.0], [1.0], [2.0], [3.0], [4.0]]))
    distances[4, :4] = distances[:4, 4] = np.inf
    assert multi_krum(distances, 1, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize(("n", "f"), list(itertools.product((1, 2, 4), (1, 2))))
def test_too_few_updates_are_refused(n: int, f: int) -> None:
    with pytest.raises(RoundError, match="at least 2"):
        krum_scores(np.zeros((n, n)), f)


@pytest.mark.parametrize(
    ("distances", "f", "keep"),
    [
        (np.zeros((5, 4)), 1, 1),
        (np.zeros((5, 5)), -1, 1),
        (np.zeros((5, 5)), 1, 0),
        (np.zeros((5, 5)), 1, 5),
        (np.full((5, 5), np.nan), 1, 1),
    ],
)
def test_bad_arguments_are_refused(distances: np.ndarray, f: int, keep: int) -> None:
    with pytest.raises(ConfigError):
        multi_krum(distances, f, keep)


@given(st.lists(st.floats(0, 1e300) | st.just(float("inf"))), st.floats(1e-300, 1e300))
def test_factors_bring_norms_down_to_the_limit(norms: list[float], limit: float) -> None:
    want = [1.0 if norm <= limit else limit / norm for norm in norms]
    assert clip_factors(norms, limit).tolist() == want


@pytest.mark.parametrize(("norms", "limit"), [([1.0], 0.0), ([1.0], -1.0), ([-1.0], 1.0), ([float("nan")], 1.0)])
def test_norms_and_limits_that_are_none_are_refused(norms: list[float], limit: float) -> None:
    with pytest.raises(ConfigError):
        clip_factors(norms, limit)
