"""`fedtune client`: one participant."""

import importlib
from typing import Annotated

import typer

from fedtune.cli.options import ConfigPath, Sets


def client(
    config: ConfigPath,
    index: Annotated[
        int | None,
        typer.Option(help="Be client INDEX of `[simulation]`: its id, its rank, its part of the data.", min=0),
    ] = None,
    set_: Sets = None,
) -> None:
    """Take part in a run: train on the data of this machine, send only the adapter.

    Reads `[client]` and `[data]`; method, training and model come from the coordinator. It reconnects by itself, and
    keeps a finished update on disk until the coordinator has acknowledged it.

    Example:

    * `fedtune client client.toml --set client.address=coordinator.example:7070`
    """
    from fedtune.config import load
    from fedtune.config.members import member_config

    loaded = load(config, tuple(set_ or ()))
    if index is not None:
        loaded = member_config(loaded, index, loaded.client.address)
    raise typer.Exit(importlib.import_module("fedtune_client.main").run(loaded, index))
