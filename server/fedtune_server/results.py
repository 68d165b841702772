"""What people take home: a PEFT directory per round, whole or not there at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedtune.method import Method
from fedtune.tensors import Tensors
from fedtune_server.blobs import fsync_file, fsync_folder, storage_error


def export(method: Method, state: Tensors, base_model: str, report: Mapping[str, object], folder: Path) -> None:
    """Writes the adapter and `round.json` into a folder beside the final one, then renames it.

    Raises:
        StorageError: the disk refused; `folder` is as it was, or gone.
    """
    draft = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        method.export(state, draft, base_model)
        (draft / "round.json").write_text(json.dumps(report, indent=2) + "\n")
        _settle(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise storage_error(folder, error) from error


def copy(source: Path, folder: Path) -> None:
    """Copies a finished folder, whole or not at all; raises StorageError when the disk refuses."""
    draft = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
        _settle(draft, folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise storage_error(folder, error) from error


def _settle(draft: Path, folder: Path) -> None:
    """Makes the draft durable and gives it its name."""
    for path in draft.iterdir():
        fsync_file(path)
    fsync_folder(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    fsync_folder(folder.parent)
