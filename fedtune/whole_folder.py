"""New folders of results that are there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from fedtune.errors import ConfigError, StorageError, problem


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Opens a folder to write into, which becomes `target` when the block ends and vanishes when it fails.

    An empty folder that is there already is filled and not replaced: it may be a mount, or have a mode of its own.

    Raises:
        ConfigError: something is there.
        StorageError: it cannot be written; then nothing of it is left.
    """
    check_new(target)
    with told(target):
        there = target.exists()
        place = target if there else target.parent
        place.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fedtune-", dir=place) as aside:
            draft = Path(aside) / "draft"  # has the mode that the umask says, as the one around it has not
            draft.mkdir()
            yield draft
            if there:
                for path in list(draft.iterdir()):
                    path.rename(target / path.name)
            else:
                draft.rename(target)


def check_new(target: Path) -> None:
    """Raises ConfigError when something is where a folder is to be written."""
    with told(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(problem(str(target), "a new or empty folder", "something is there"))


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Raises StorageError for what goes wrong in writing."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why, remedy = getattr(error, "strerror", None) or error, "Make room, or choose another folder"
        raise StorageError(problem(str(path), "a place that can be written", why, remedy)) from error
