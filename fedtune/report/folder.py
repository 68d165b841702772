"""What a run folder holds, and what happens when the disk refuses to hold more."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import ConfigError, StorageError, problem

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OTHER = "Choose another one: --set run.folder=FOLDER"
# What fedtune puts into a run folder at one time or another.
_OURS = {
    *("address", "blobs", "clients", "clients.log", "coordinator.log", "evaluations.json", "events.jsonl", "final"),
    *("ledger.csv", "lock", "report.json", "report.png", "rounds", "run.db", "settings.json", "simulation.json"),
}
_NOTHING = {"lost+found"}


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Turns what the system says of a file into a StorageError that names the file, or else `folder`.

    Raises:
        StorageError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(folder)
        remedy = "Free some space, then give the same command again" if error.errno in _FULL else _OTHER
        text = problem(name, "a file or folder to read and write", error.strerror or error, remedy)
        raise StorageError(text) from error


def replace_text(path: Path, text: str) -> Path:
    """Writes a file, replacing it at once; returns its path. Raises StorageError when the disk refuses."""
    draft = path.with_name(path.name + ".part")
    with storage(path.parent):
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    return path


def refuse_federated(folder: Path) -> None:
    """Raises ConfigError when `folder` holds a federation's run or foreign files, StorageError when it is a file."""
    _check(folder)
    if (folder / "run.db").exists() or (folder / "events.jsonl").exists():
        raise ConfigError(problem(f"run.folder {folder}", "a folder of its own", "one with a federation's run", _OTHER))


def refuse_centralised(folder: Path) -> None:
    """Raises ConfigError when `folder` holds a result of `fedtune train` or foreign files, StorageError for a file."""
    _check(folder)
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # none, or one that is written again
    if isinstance(report, dict) and report.get("kind") == "centralised":
        got = "one with the result of `fedtune train`"
        raise ConfigError(problem(f"run.folder {folder}", "a folder of its own", got, _OTHER))


def _check(folder: Path) -> None:
    with storage(folder):
        if not folder.exists():
            return
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file", str(folder))
        held = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - _NOTHING
    if held and not held & _OURS:
        few = ", ".join(sorted(held)[:3]) + (", ..." if len(held) > 3 else "")
        raise ConfigError(
            problem(f"run.folder {folder}", "a new or empty folder, or a run's", f"one with {few}", _OTHER)
        )
