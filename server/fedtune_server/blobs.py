"""Files named by the SHA-256 of what they hold, durable before anything refers to them.

A blob is written to a temporary name, fsynced, renamed, and its folder fsynced; only then may a row name it. So a
row never points at bytes that a power cut could take away, and a torn file never has a digest's name.
"""

import errno
import hashlib
import mmap
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from fedtune.errors import StorageError, problem

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Draft:
    """A blob while it arrives. Close it, or use it as a context manager: what is not published is removed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{secrets.token_hex(16)}.part"
        self._folder = folder
        try:
            self._file = self.path.open("xb")
        except OSError as error:
            raise storage_error(folder, error) from error

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the draft unless it was published."""
        try:
            self._file.close()
        except OSError:
            return  # a full disk may refuse the last buffered bytes; they were not wanted
        finally:
            self.path.unlink(missing_ok=True)

    def write(self, data: bytes | memoryview) -> None:
        """Appends; raises StorageError when the disk refuses."""
        try:
            self._file.write(data)
        except OSError as error:
            raise storage_error(self._folder, error) from error

    def view(self) -> memoryview:
        """Returns what was written, read-only; the view outlives the draft."""
        try:
            self._file.flush()
        except OSError as error:
            raise storage_error(self._folder, error) from error
        return map_file(self.path)

    def publish(self, digest: str) -> None:
        """Makes the draft the blob `digest`, durably; raises StorageError when the disk refuses."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.path.replace(self._folder / digest)
            fsync_folder(self._folder)
        except OSError as error:
            raise storage_error(self._folder, error) from error


class Blobs:
    """The blobs of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error

    def draft(self) -> Draft:
        """Starts a new blob; raises StorageError when the disk refuses."""
        return Draft(self.folder)

    def put(self, buffers: Iterable[bytes | memoryview]) -> str:
        """Stores the bytes of all buffers durably; returns their digest, or raises StorageError."""
        sha = hashlib.sha256()
        with self.draft() as draft:
            for buffer in buffers:
                sha.update(buffer)
                draft.write(buffer)
            draft.publish(sha.hexdigest())
        return sha.hexdigest()

    def load(self, digest: str) -> memoryview:
        """Returns the bytes of a blob; raises StorageError when it is missing or is not what its name says."""
        path = self.folder / digest
        view = map_file(path)
        found = hashlib.sha256(view).hexdigest()
        if found != digest:
            remedy = "The file was damaged; restore it from a backup, or start a new run folder"
            raise StorageError(problem(str(path), "bytes with the SHA-256 of its name", found, remedy))
        return view

    def sweep(self, keep: Iterable[str], drafts: bool = False) -> int:
        """Removes every blob not in `keep`; returns how many went. Failures to remove are left for the next time.

        Args:
            keep: digests that are still needed.
            drafts: remove unfinished files too; only right before any are being written.
        """
        kept, gone = set(keep), 0
        for path in self.folder.iterdir():
            if path.name not in kept and (drafts or path.suffix != ".part"):
                try:
                    path.unlink()
                    gone += 1
                except OSError:
                    continue
        return gone


def map_file(path: Path) -> memoryview:
    """Maps a file read-only; raises StorageError when it cannot be opened."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise storage_error(path, error) from error


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Makes the contents of a file durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def storage_error(path: Path, error: OSError) -> StorageError:
    """Says which folder refused, why, and what to do."""
    if error.errno in _FULL:
        remedy = "Free some space; nothing that was acknowledged is lost and the run goes on"
        return StorageError(problem(str(path), "space on the disk", error.strerror, remedy))
    remedy = "Check that the folder exists and that this user may write to it"
    return StorageError(problem(str(path), "a folder that can be written", error.strerror or error, remedy))
