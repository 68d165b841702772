"""`fedtune server`: the coordinator."""

import importlib

import typer

from fedtune.cli.options import ConfigPath, Sets


def server(config: ConfigPath, set_: Sets = None) -> None:
    """Coordinate a run: wait for clients, hold the rounds, write the results.

    Stop it with Ctrl-C or SIGTERM and start it again: it continues the same run where it was.

    Example:

    * `fedtune server config.toml --set server.address=0.0.0.0:7070`
    """
    from fedtune.config import load

    loaded = load(config, tuple(set_ or ()))
    raise typer.Exit(importlib.import_module("fedtune_server.main").serve(loaded))
