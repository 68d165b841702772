"""The clients of a simulation: their ids, and the configuration each of them runs with."""

from dataclasses import replace
from typing import TypeVar

from fedtune.config.schema import ClientConfig, Config
from fedtune.errors import ConfigError, problem
from fedtune.method import Member

T = TypeVar("T")


def member_ids(config: Config) -> list[str]:
    """Lists the ids of the simulated clients: `client-00`, `client-01`, ..., in an order that sorting keeps."""
    count = config.simulation.clients
    width = max(2, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def member_config(config: Config, index: int, address: str) -> Config:
    """Returns the configuration of simulated client `index`, counted from 0.

    Everything but `[client]` stays; ranks, alphas and depths are dealt out in turn; its folder is `clients/ID` in the
    run's.

    Raises:
        ConfigError: there is no such client.
    """
    simulation = config.simulation
    if not 0 <= index < simulation.clients:
        want = f"0 to {simulation.clients - 1}"
        raise ConfigError(problem("client index", want, index, "See simulation.clients"))
    name = member_ids(config)[index]
    client = ClientConfig(
        id=name,
        address=address,
        rank=_nth(simulation.ranks, index, 0),
        alpha=_nth(simulation.alphas, index, 0.0),
        depth=_nth(simulation.depths, index, 0),
        measure=config.client.measure,
        folder=config.run.folder / "clients" / name,
        device=config.client.device,
        threads=simulation.threads,
        low_memory=config.client.low_memory,
        ca=config.client.ca,
        cert=config.client.cert,
        key=config.client.key,
        insecure=config.client.insecure,
    )
    return replace(config, client=client)


def member_of(client: ClientConfig) -> Member:
    """Returns a client as its own configuration states it, not yet admitted."""
    return Member(client.id, client.rank, client.alpha, client.depth)


def _nth(values: tuple[T, ...], index: int, default: T) -> T:
    return values[index % len(values)] if values else default
