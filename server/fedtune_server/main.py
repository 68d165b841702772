"""The coordinator as a program: `python -m fedtune_server CONFIG [--set section.key=value ...]`."""

import argparse
import asyncio
import sys
from pathlib import Path

from fedtune.allocator import share_arenas
from fedtune.config import Config, load
from fedtune.config.unused import unused
from fedtune.errors import FedtuneError
from fedtune_server.coordinator import Coordinator
from fedtune_server.guard import DEFAULT_PATIENCE, Patience
from fedtune_server.listen import credentials
from fedtune_server.run import Run, open_run


def serve(config: Config, patience: Patience = DEFAULT_PATIENCE) -> int:
    """Coordinates the run of `config` to its end; continues it when its folder holds it already.

    Returns:
        The exit code: 0 when every round is closed or the process was told to stop, else that of the error, whose
        message is on stderr.
    """
    share_arenas()
    if said := unused(config):
        sys.stderr.write(f"note: {said}\n")
    try:
        credentials(config.server)
        run = open_run(config)
        try:
            if not run.over:
                asyncio.run(_serve(run, patience))
        finally:
            run.close()
    except FedtuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and serves; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedtune_server", description="The coordinator of a fedtune run.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's TOML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="change one setting"
    )
    options = parser.parse_args(arguments)
    try:
        config = load(options.config, tuple(options.overrides))
    except FedtuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return serve(config)


async def _serve(run: Run, patience: Patience) -> None:
    await Coordinator(run, credentials(run.config.server), patience).serve()
