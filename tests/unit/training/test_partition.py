import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.schema import SimulationConfig
from fedtune.errors import DataError
from fedtune.training.partition import split

_KINDS = st.sampled_from(["iid", "label", "quantity"])


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def _config(**options) -> SimulationConfig:
    return SimulationConfig(**options)


@settings(max_examples=150)
@given(
    kind=_KINDS,
    keys=st.lists(st.integers(0, 5), min_size=30, max_size=300),
    clients=st.integers(1, 10),
    concentration=st.floats(0.01, 100),
    min_rows=st.integers(1, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_row_goes_to_exactly_one_client_and_nobody_gets_too_few(
    kind, keys, clients, concentration, min_rows, seed
):
    config = _config(clients=clients, partition=kind, concentration=concentration, min_rows=min_rows)
    parts = split(len(keys), config, _rng(seed), keys)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(keys)))
    assert all(len(part) >= min_rows and (np.diff(part) > 0).all() for part in parts)
    again = split(len(keys), config, _rng(seed), keys)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


def test_iid_shares_are_equal_and_mixed():
    parts = split(103, _config(clients=10), _rng())
    assert {len(part) for part in parts} == {10, 11}
    assert max(part.max() - part.min() for part in parts) > 50


def test_small_concentration_skews_labels_and_large_does_not():
    keys = [i % 4 for i in range(2000)]

    def purity(concentration: float) -> float:
        config = _config(clients=8, partition="label", concentration=concentration)
        parts = split(len(keys), config, _rng(), keys)
        tops = [np.bincount([keys[i] for i in part], minlength=4).max() / len(part) for part in parts]
        return float(np.mean(tops))

    assert purity(0.05) > 0.7
    assert purity(1000) < 0.35


def test_small_concentration_skews_sizes():
    def largest(concentration: float) -> int:
        config = _config(clients=8, partition="quantity", concentration=concentration)
        return max(map(len, split(800, config, _rng())))

    assert largest(0.1) > 300
    assert largest(1000) < 120


def test_natural_keeps_each_owner_whole():
    keys = ["ann"] * 5 + ["bob"] * 9 + ["cid"] * 3 + ["dee"] * 4
    parts = split(len(keys), _config(clients=2, partition="natural"), _rng(), keys)
    assert [sorted({keys[i] for i in part}) for part in parts] == [["bob", "dee"], ["ann", "cid"]]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(keys)))


@pytest.mark.parametrize(
    ("rows", "options", "keys", "says"),
    [
        (7, {"clients": 4}, None, "at least 8"),
        (9, {"clients": 4, "partition": "label"}, None, "data.label"),
        (9, {"clients": 4, "partition": "natural"}, None, "data.client_key"),
        (9, {"clients": 4, "partition": "natural"}, ["a", "b", "c"] * 3, "at least 4, got 3"),
        (9, {"clients": 2, "partition": "natural"}, ["a"] * 8 + ["b"], "simulation.min_rows"),
    ],
)
def test_impossible_partitions(rows, options, keys, says):
    with pytest.raises(DataError, match=says):
        split(rows, _config(**options), _rng(), keys)
