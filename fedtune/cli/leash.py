"""`python -m fedtune.cli.leash COMMAND...`: becomes COMMAND, and ends when the program that started it is gone.

A simulation that is killed outright must not leave its coordinator and clients behind. Linux can do that; elsewhere
the command simply runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks the kernel for SIGTERM on the parent's death, then replaces this process by the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])  # no shell, and the command comes from our own program


if __name__ == "__main__":
    main()
