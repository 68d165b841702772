"""`python -m fedtune_server`."""

import sys

from fedtune_server.main import main

if __name__ == "__main__":
    sys.exit(main())
