"""`python -m fedtune_client.host CONFIG`: all clients of a simulation on this machine, each a process of its own.

Settings that numeric libraries read when they are imported come first here, so nothing heavy is imported above.
"""

import argparse
import os
import sys
from pathlib import Path

_ENVIRONMENT = {
    # A thread that exists before a fork is missing after it, so no library may start any in the parent.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",
}


def main() -> int:
    """Reads the arguments and runs the clients; returns the first exit code that is not 0, else 0."""
    parser = argparse.ArgumentParser(prog="python -m fedtune_client.host", description="Run all simulated clients.")
    parser.add_argument("config", type=Path, help="TOML file")
    parser.add_argument("--address", default="", help="of the coordinator; default: what it wrote to its run folder")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    arguments = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    from fedtune_client.hosting import start

    return start(arguments.config, tuple(arguments.set), arguments.address)


if __name__ == "__main__":
    sys.exit(main())
