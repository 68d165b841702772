"""Ids, ranks and folders of simulated clients."""

from pathlib import Path

import pytest

from fedtune.config import Config
from fedtune.config.members import member_config, member_ids
from fedtune.config.schema import RunConfig, SimulationConfig
from fedtune.errors import ConfigError


def config(**simulation):
    return Config(run=RunConfig(folder=Path("r")), simulation=SimulationConfig(**simulation))


@pytest.mark.parametrize(
    ("clients", "last"),
    [(1, "client-00"), (10, "client-09"), (100, "client-99"), (101, "client-100"), (1000, "client-999")],
)
def test_ids_sort_as_they_count(clients, last):
    ids = member_ids(config(clients=clients))
    assert len(ids) == clients
    assert ids[-1] == last
    assert sorted(ids) == ids


def test_ranks_and_alphas_are_dealt_out_in_turn():
    mixed = config(clients=5, ranks=(8, 4), alphas=(16.0,), threads=3)
    clients = [member_config(mixed, i, "h:1").client for i in range(5)]
    assert [c.rank for c in clients] == [8, 4, 8, 4, 8]
    assert {(c.alpha, c.address, c.threads) for c in clients} == {(16.0, "h:1", 3)}
    assert clients[3].folder == Path("r/clients/client-03")
    assert clients[3].id == "client-03"


def test_without_ranks_the_method_decides():
    assert member_config(config(), 0, "h:1").client.rank == 0


@pytest.mark.parametrize("index", [-1, 4])
def test_there_is_no_client_beyond_the_last(index):
    with pytest.raises(ConfigError, match="client index: expected 0 to 3"):
        member_config(config(clients=4), index, "h:1")
