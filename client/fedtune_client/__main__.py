"""`python -m fedtune_client CONFIG`: one client as a program."""

import argparse
import sys
from pathlib import Path

from fedtune.config import Config, load
from fedtune.config.members import member_config
from fedtune.errors import FedtuneError
from fedtune_client.main import run


def main() -> int:
    """Reads the arguments and runs the client; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedtune_client", description="Take part in a fedtune run.")
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("--index", type=int, help="be simulated client INDEX, with its id, rank and part of the data")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    arguments = parser.parse_args()
    try:
        config = _config(arguments.config, tuple(arguments.set), arguments.index)
    except FedtuneError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return run(config, arguments.index)


def _config(path: Path, overrides: tuple[str, ...], index: int | None) -> Config:
    config = load(path, overrides)
    return config if index is None else member_config(config, index, config.client.address)


if __name__ == "__main__":
    sys.exit(main())
