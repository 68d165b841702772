"""A finished update is on disk before it is sent for the first time, and stays there until it is acknowledged.

    outbox/000003.bin    the encoded update, exactly as it travels
    outbox/000003.json   what it belongs to; its presence says that the bytes are whole

Training may have taken hours: neither a crash of this client nor of the coordinator makes it do them again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from fedtune.errors import StorageError, problem


@dataclass(frozen=True, slots=True)
class Key:
    """What an update is an answer to. Only the very same question may be answered with it.

    `state_digest` is of the state it was trained from, `template` the SHA-256 of the manifest it must fit.
    """

    run_id: str
    round: int
    state_digest: str
    template: str
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Update:
    """A finished update in the outbox."""

    key: Key
    weight: int
    nbytes: int
    sha256: str
    metrics: dict[str, float]
    file: Path


class Outbox:
    """The folder of updates that wait for their acknowledgement."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "outbox"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise _storage(self._folder, error) from error

    def find(self, key: Key) -> Update | None:
        """Returns the update that answers `key`, if it is there and undamaged."""
        update = self._read(self._meta(key.round))
        if update is None or update.key != key:
            return None
        return update if _sound(update) else None

    def store(self, key: Key, buffers: Iterable[memoryview | bytes], weight: int, metrics: dict[str, float]) -> Update:
        """Writes an update; when this returns it survives a crash.

        Raises:
            StorageError: the disk is full or the folder not writable.
        """
        sha, nbytes, file = hashlib.sha256(), 0, self._folder / f"{key.round:06d}.bin"

        def fill(stream: BinaryIO) -> None:
            nonlocal nbytes
            for buffer in buffers:
                sha.update(buffer)
                nbytes += stream.write(buffer)

        try:
            _atomic(file, fill)
            update = Update(key, weight, nbytes, sha.hexdigest(), metrics, file)
            meta = json.dumps(asdict(update) | {"file": file.name}).encode()
            _atomic(self._meta(key.round), lambda stream: stream.write(meta))
        except OSError as error:
            raise _storage(self._folder, error) from error
        return update

    def remove(self, update: Update) -> None:
        """Forgets an update that was acknowledged or came too late."""
        self._meta(update.key.round).unlink(missing_ok=True)
        update.file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forgets all updates: the run they were for is over."""
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)

    def keep_only(self, run_id: str, round_number: int) -> None:
        """Forgets what answers any other run or an earlier round."""
        for meta in self._folder.glob("*.json"):
            update = self._read(meta)
            if update is None or update.key.run_id != run_id or update.key.round < round_number:
                meta.unlink(missing_ok=True)
                meta.with_suffix(".bin").unlink(missing_ok=True)

    def _meta(self, round_number: int) -> Path:
        return self._folder / f"{round_number:06d}.json"

    def _read(self, meta: Path) -> Update | None:
        try:
            raw = json.loads(meta.read_text())
            return Update(**raw | {"key": Key(**raw["key"]), "file": self._folder / meta.with_suffix(".bin").name})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _sweep(self) -> None:
        """Removes what a crash left half written."""
        for file in self._folder.iterdir():
            if file.suffix == ".tmp" or (file.suffix == ".bin" and not file.with_suffix(".json").exists()):
                file.unlink(missing_ok=True)


def _sound(update: Update) -> bool:
    try:
        with update.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == update.sha256
    except OSError:
        return False


def _atomic(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file that is there whole or not at all, also after a power cut."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _storage(folder: Path, error: OSError) -> StorageError:
    remedy = "Free some space and start the client again"
    return StorageError(problem("client.folder", "a folder that can be written", f"{folder}: {error.strerror}", remedy))
