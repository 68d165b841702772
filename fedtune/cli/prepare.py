"""What a command on this machine needs before it starts: a model folder, data for every client, held-out rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.cli.console import err
from fedtune.errors import ConfigError, ModelError, problem
from fedtune.installed import need_training

if TYPE_CHECKING:
    from fedtune.config import Config

__all__ = ["check_counts", "check_layers", "for_simulation", "model_is_here", "need_training", "prepare"]


def prepare(config: "Config", indices: Sequence[int] = ()) -> list[int]:
    """Fetches data and model if they are not here yet; returns each client's number of rows. What is cheap comes first.

    Args:
        config: what to prepare for.
        indices: the simulated clients that must be admitted and have rows; without any, data are not read.

    Raises:
        FedtuneError: something is missing or malformed.
    """
    need_training()
    if indices:
        _admit(config, indices)
    from fedtune.training.data import all_client_rows, check_files

    check_files(config.data)
    counts: list[int] = []
    if indices:
        with err.status(f"data {config.data.name}"):
            parts = all_client_rows(config)
            counts = [len(parts[index]) for index in indices]
    if not model_is_here(config):
        with err.status(f"model {config.model.name}"):
            from fedtune.training.models import resolve_model  # loads torch

            resolve_model(config.model.name, config.model.revision)
    return counts


def model_is_here(config: "Config") -> bool:
    """Whether nothing needs to be fetched or made."""
    from fedtune.locate import locate_model

    try:
        locate_model(config.model.name, config.model.revision)
    except ModelError:
        return False
    return True


def check_counts(config: "Config") -> None:
    """Raises ConfigError when `[rounds]` waits for more clients than the simulation has: no round would ever start."""
    rounds, clients = config.rounds, config.simulation.clients
    want = f"at most simulation.clients = {clients}"
    faults = [
        problem(f"rounds.{key}", want, value)
        for key, value in (("clients", rounds.clients), ("min_clients", rounds.min_clients))
        if value > clients
    ]
    if faults:
        raise ConfigError("\n".join([*faults, "Lower it, or raise simulation.clients"]))


def check_layers(config: "Config") -> None:
    """Checks that the base has the method's layers, and that updates can be sent, before any program starts."""
    from fedtune.base import open_base
    from fedtune.locate import locate_model
    from fedtune.rounds import begin

    base = open_base(locate_model(config.model.name, config.model.revision), config.model.name)
    begin(config.method, base, config.run.seed)


def for_simulation(config: "Config") -> list[str]:
    """Returns the settings (`section.key=value`) that a simulation changes for its programs.

    The coordinator takes a free port of this machine. It waits for as many clients as the quorum asks of all of them,
    which by default is every one, so that who connects first has no say in the result.
    """
    from fedtune.rules import quorum_of

    least = max(config.rounds.min_clients, quorum_of(config.rounds, config.simulation.clients))
    return ["server.address=127.0.0.1:0", f"rounds.min_clients={min(least, config.simulation.clients)}"]


def _admit(config: "Config", indices: Sequence[int]) -> None:
    """Checks that the method takes every client: its rank, its alpha, its depth."""
    from fedtune.config.members import member_config, member_of
    from fedtune.rounds import admit

    for index in indices:
        admit(config.method, member_of(member_config(config, index, config.server.address).client))
