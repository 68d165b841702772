"""Files of weights that others may read as they may read any new file.

The safetensors library writes files that only their owner may read, whatever the umask says.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedtune.tensors import Tensors


def save_weights(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays, which need not be contiguous, as a safetensors file."""
    save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, path, dict(metadata or {}))
    make_readable(path)


def make_readable(*paths: Path) -> None:
    """Gives files the mode that the umask of this process gives to new ones."""
    for path in paths:
        new = path.with_name(f".{path.name}.mode")
        new.touch()
        path.chmod(new.stat().st_mode & 0o777)
        new.unlink()


def make_all_readable(folder: Path) -> None:
    """Does so for all weights of a model folder."""
    make_readable(*folder.glob("*.safetensors"))
