"""A finished update is on disk before it is sent for the first time, and stays there until it is acknowledged.

    outbox/000003.bin      the encoded update, exactly as it travels
    outbox/000003.memory   what it leaves in the client's memory once it is accepted (`memory.py`)
    outbox/000003.json     what it belongs to; its presence says that the bytes are whole

Training may have taken hours: neither a crash of this client nor of the coordinator makes it do them again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from fedtune.errors import StorageError, problem
from fedtune.tensors import Array, Tensors
from fedtune_client import memory


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
    """A finished update in the outbox.

    `task_id` is of the task it was made for, `memory` the SHA-256 of what it leaves behind (empty: nothing to keep).
    """

    key: Key
    task_id: str
    weight: int
    nbytes: int
    sha256: str
    memory: str
    metrics: dict[str, float]
    file: Path

    @property
    def memory_file(self) -> Path:
        """Where its memory lies."""
        return self.file.with_suffix(".memory")


class Outbox:
    """The folder of updates that wait for their acknowledgement."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._memory = folder / "outbox", folder / memory.NAME
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

    def memory(self, run_id: str) -> dict[str, Array]:
        """Returns what the last accepted update of a run left behind."""
        return memory.read(self._memory, run_id)

    def store(
        self,
        key: Key,
        task_id: str,
        buffers: Iterable[memoryview | bytes],
        weight: int,
        metrics: dict[str, float],
        kept: Tensors,
    ) -> Update:
        """Writes an update, and what it leaves behind; when this returns both survive a crash.

        Args:
            key: what it answers.
            task_id: of the task it was made for.
            buffers: its bytes.
            weight: number of examples.
            metrics: of its training.
            kept: the client's memory once it is accepted.

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
            update = Update(key, task_id, weight, nbytes, sha.hexdigest(), "", metrics, file)
            update = self._with_memory(update, kept)
            meta = json.dumps(asdict(update) | {"file": file.name}).encode()
            _atomic(self._meta(key.round), lambda stream: stream.write(meta))
        except OSError as error:
            raise _storage(self._folder, error) from error
        return update

    def accepted(self, update: Update) -> None:
        """Takes over what an accepted update leaves behind, and forgets the update.

        Raises:
            StorageError: the folder is not writable.
        """
        try:
            if update.memory and update.memory_file.exists():
                update.memory_file.replace(self._memory)
                _sync(self._memory.parent)
        except OSError as error:
            raise _storage(self._folder, error) from error
        self.remove(update)

    def remove(self, update: Update) -> None:
        """Forgets an update that came too late or will never be taken, and what it would have left behind."""
        self._meta(update.key.round).unlink(missing_ok=True)
        update.file.unlink(missing_ok=True)
        update.memory_file.unlink(missing_ok=True)

    def unsettled(self, run_id: str, round_number: int) -> list[Update]:
        """Lists updates of earlier rounds that leave something behind, in case they were accepted."""
        found = [self._read(meta) for meta in sorted(self._folder.glob("*.json"))]
        return [u for u in found if u and u.memory and u.key.run_id == run_id and u.key.round < round_number]

    def clear(self) -> None:
        """Forgets all updates: the run they were for is over."""
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)

    def keep_only(self, run_id: str, round_number: int) -> None:
        """Forgets what answers any other run or an earlier round."""
        for meta in self._folder.glob("*.json"):
            update = self._read(meta)
            if update is None or update.key.run_id != run_id or update.key.round < round_number:
                for file in (meta, meta.with_suffix(".bin"), meta.with_suffix(".memory")):
                    file.unlink(missing_ok=True)

    def _with_memory(self, update: Update, kept: Tensors) -> Update:
        """Writes what an update leaves behind, unless that is nothing and was nothing before."""
        if not kept and not self._memory.exists():
            return update
        data = memory.to_bytes(kept, update.key.run_id)
        _atomic(update.memory_file, lambda stream: stream.write(data))
        return replace(update, memory=hashlib.sha256(data).hexdigest())

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
            if file.suffix == ".tmp" or (file.suffix != ".json" and not file.with_suffix(".json").exists()):
                file.unlink(missing_ok=True)


def _sound(update: Update) -> bool:
    """Whether bytes and memory are those that were written; memory that is gone was taken over already."""
    try:
        whole = _sha256(update.file) == update.sha256
        return whole and (not update.memory_file.exists() or _sha256(update.memory_file) == update.memory)
    except OSError:
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _atomic(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file that is there whole or not at all, also after a power cut."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("wb") as stream:
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage(folder: Path, error: OSError) -> StorageError:
    remedy = "Free some space and start the client again"
    return StorageError(problem("client.folder", "a folder that can be written", f"{folder}: {error.strerror}", remedy))
