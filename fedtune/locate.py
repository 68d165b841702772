"""Where a base model lies on this machine already, found without torch and without a network.

    1. a local folder           2. <cache>/models/<name with / as -->          3. the hub's own cache

<cache> is $FEDTUNE_CACHE, or ~/.cache/fedtune. `fedtune doctor --fetch` puts a model there.
"""

import os
from pathlib import Path

from fedtune.errors import ModelError, problem

BUILT_IN = ("smollm2-135m", "tiny")
"""Models that fedtune makes itself, on a machine with torch."""


def cache_folder() -> Path:
    """Returns the folder that fedtune keeps models and data sets in; it need not exist."""
    return Path(os.environ.get("FEDTUNE_CACHE") or Path.home() / ".cache" / "fedtune")


def model_folder(name: str) -> Path:
    """Returns the folder of the cache that a model of this name belongs in; it need not exist."""
    return cache_folder() / "models" / name.replace("/", "--")


def locate_model(name: str, revision: str = "") -> Path:
    """Finds the folder of a base model.

    Args:
        name: a local folder, a hub id, or the name of a built-in model.
        revision: branch, tag or commit of a hub model; empty means main.

    Raises:
        ModelError: this machine does not hold the model yet.
    """
    for folder in (Path(name).expanduser(), model_folder(name), _hub_folder(name, revision)):
        if folder is not None and (folder / "config.json").is_file():
            return folder
    remedy = "`fedtune doctor --fetch CONFIG` downloads it"
    raise ModelError(problem("model.name", f"a model folder, or a model in {cache_folder() / 'models'}", name, remedy))


def _hub_folder(name: str, revision: str) -> Path | None:
    """Reads the hub cache's own layout: refs/BRANCH holds a commit, snapshots/COMMIT the files."""
    if name.count("/") != 1 or ".." in f"{name}/{revision}":
        return None
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repo = hub / ("models--" + name.replace("/", "--"))
    ref = repo / "refs" / (revision or "main")
    try:
        commit = ref.read_text().strip() if ref.is_file() else revision
    except OSError:
        return None
    return repo / "snapshots" / commit if commit else None
