"""What a command on this machine needs before it starts: a model folder, data for every client, held-out rows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.cli.console import err
from fedtune.installed import need_training

if TYPE_CHECKING:
    from fedtune.config import Config

__all__ = ["admit_all", "for_simulation", "need_training", "prepare"]


def prepare(config: "Config", indices: Sequence[int] = ()) -> list[int]:
    """Fetches model and data if they are not here yet, and reads them; returns each client's number of rows.

    Args:
        config: what to prepare for.
        indices: the simulated clients whose parts are looked at.

    Raises:
        FedtuneError: something is missing or malformed.
    """
    need_training()
    from fedtune.training.data import client_rows
    from fedtune.training.models import resolve_model

    with err.status(f"model {config.model.name}"):
        resolve_model(config.model.name, config.model.revision)
    with err.status(f"data {config.data.name}"):
        return [len(client_rows(config, index)) for index in indices]


def admit_all(config: "Config") -> None:
    """Checks that the base has the layers and the method takes every client, before any program starts."""
    from fedtune.base import open_base
    from fedtune.config.members import member_config, member_ids
    from fedtune.locate import locate_model
    from fedtune.method import Member

    base = open_base(locate_model(config.model.name, config.model.revision), config.model.name)
    config.method.init(base, config.run.seed)
    for index, name in enumerate(member_ids(config)):
        client = member_config(config, index, config.server.address).client
        config.method.admit(Member(name, client.rank, client.alpha))


def for_simulation(config: "Config") -> list[str]:
    """Returns the settings (`section.key=value`) that a simulation changes for its programs.

    The coordinator takes a free port of this machine. It waits for as many clients as the quorum asks of all of them,
    which by default is every one, so that who connects first has no say in the result.
    """
    from fedtune.rules import quorum_of

    least = max(config.rounds.min_clients, quorum_of(config.rounds, config.simulation.clients))
    return ["server.address=127.0.0.1:0", f"rounds.min_clients={min(least, config.simulation.clients)}"]
