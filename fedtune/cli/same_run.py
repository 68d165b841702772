"""`simulation.json`: what data, clients and rounds a simulation was started with, so that nothing else goes on with it.

Left out is what may change from one start to the next: how long the run is, how long a round waits, how much of this
machine it takes, and how many rows the figures are measured on.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.config import Config
from fedtune.config.compare import differences
from fedtune.errors import ConfigError, StorageError, problem
from fedtune.report.folder import refuse_centralised, replace_text

_NAME = "simulation.json"
_FREE = {
    "data": ("held_out_rows",),
    "rounds": ("count", "quorum", "grace_s", "deadline_s", "attempts"),  # a failed round says to change these
    "simulation": ("concurrency", "threads"),
}


def check_same(config: Config) -> None:
    """Checks that `run.folder` is new, or holds a run of this simulation.

    Raises:
        ConfigError: it holds another run; the message names the keys that differ.
        StorageError: it is no folder, or its record is damaged.
    """
    folder = config.run.folder
    refuse_centralised(folder)
    if not (folder / "run.db").exists():
        return
    stored = _stored(folder / _NAME)
    known = _part(Config())  # a key that is younger than the run had its default
    changed = differences({name: {**known[name], **stored.get(name, {})} for name in known}, _part(config))
    if stored and changed:
        remedy = "Change these back, or choose another one: --set run.folder=FOLDER"
        head = f"run.folder {folder} holds a run with other settings. {remedy}"
        raise ConfigError("\n".join([head, *changed]))


def keep_same(config: Config) -> None:
    """Records the simulation in `run.folder`; raises StorageError when the disk refuses."""
    replace_text(config.run.folder / _NAME, json.dumps(_part(config), indent=2) + "\n")


def _part(config: Config) -> dict[str, dict[str, Any]]:
    sections = {name: asdict(getattr(config, name)) for name in _FREE}
    kept = {name: {k: v for k, v in keys.items() if k not in _FREE[name]} for name, keys in sections.items()}
    return dict(json.loads(json.dumps(kept)))  # tuples become lists, as in the file


def _stored(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the record; an empty one for a run that has none."""
    try:
        return {name: dict(keys) for name, keys in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(problem(str(path), "a readable record", error, "Remove it to go on without")) from error
