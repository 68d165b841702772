"""The thin end of a node: hands one request to its resident worker over a Unix socket, and starts the worker if needed.

    worker -> messenger     one byte, when the worker takes the connection
    then in each direction  length u64 | JSON header | count u64 | count x (length u64 | bytes)

Only the standard library is imported here: this is all that Flower's process for a message loads of fedtune.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

Header: TypeAlias = Mapping[str, Any]

Turn: TypeAlias = Mapping[str, str | int | float]
"""What the coordinator says to one node alone: `client`, `rank`, `alpha`, `depth`; `shape`, the number of its `Task`;
and `accepted`, the round of its last update that was folded in (0: none)."""

BYE = "fedtune.bye.v1"
"""Serialisation type of the packet that ends a worker."""

START_S = 60.0
"""Seconds a worker may take until it listens; torch is imported only afterwards."""
OLD_S = 30 * 86400.0
"""Seconds after which a lock or a log of a worker that is gone may be removed."""
_MAX = 2**44
_LONGEST = 107  # bytes of a Unix socket's path
_NAME = 26  # bytes of a slash, a worker's name and its suffix


class WorkerError(RuntimeError):
    """The resident worker refused the request, failed at it, or died of it; the message says why."""


def ask(name: str, header: Header, *parts: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Sends one request to the worker `name` and waits for its answer, as long as it takes.

    Raises:
        WorkerError: the worker cannot be started, says that the request failed, or hung up.
    """
    with _connect(name) as connection:
        try:
            send(connection, header, *parts)
            answer, data = read(connection)
        except (OSError, EOFError) as error:
            log = folder() / f"{name}.log"
            raise WorkerError(f"the resident worker died during the task ({error}); see {log}:\n{_tail(log)}") from None
    if "error" in answer:
        raise WorkerError(str(answer["error"]))
    return answer, data


def dismiss(name: str, header: Header) -> None:
    """Ends the worker `name`, if there is one."""
    connection = _try(folder() / f"{name}.sock")
    if connection is not None:
        with connection, contextlib.suppress(OSError, EOFError):
            send(connection, header)
            read(connection)


def worker_name(*parts: object) -> str:
    """Names a worker after what it serves; short, since the path of a socket may not be long."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def folder() -> Path:
    """Returns the private folder of the sockets, making it if needed.

    Raises:
        WorkerError: its path is too long; it belongs to somebody else, or others may enter it.
    """
    path = _place()
    if len(os.fsencode(path)) + _NAME > _LONGEST:
        raise WorkerError(f"{path}: expected at most {_LONGEST - _NAME} bytes; set FEDTUNE_SOCKETS to a shorter folder")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise WorkerError(f"{path}: expected a folder that only you may enter; remove it, or set FEDTUNE_SOCKETS")
    return path


def _place() -> Path:
    """Takes the folder the user names; else the runtime or the temporary one, or /tmp where their names are long."""
    named, runtime = os.environ.get("FEDTUNE_SOCKETS"), os.environ.get("XDG_RUNTIME_DIR")
    homes = [named] if named else [*filter(None, [runtime]), tempfile.gettempdir(), "/tmp"]
    places = [Path(home) / f"fedtune-{os.getuid()}" for home in homes]
    short = [place for place in places if len(os.fsencode(place)) + _NAME <= _LONGEST]
    return (short or places)[0]


def send(connection: socket.socket, header: Header, *parts: bytes) -> None:
    """Writes one message. Nothing follows its last byte, not even an empty write: the reader may be gone."""
    text = json.dumps(header).encode()
    connection.sendall(struct.pack("<Q", len(text)) + text + struct.pack("<Q", len(parts)))
    for part in parts:
        connection.sendall(struct.pack("<Q", len(part)))
        if part:
            connection.sendall(part)


def read(connection: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """Reads one message; raises EOFError when the other side hangs up before its end."""
    header = json.loads(_exactly(connection, _length(connection)))
    return dict(header), [bytes(_exactly(connection, _length(connection))) for _ in range(_length(connection))]


def _length(connection: socket.socket) -> int:
    length = int(struct.unpack("<Q", _exactly(connection, 8))[0])
    if length > _MAX:
        raise EOFError(f"a message of {length} bytes")
    return length


def _exactly(connection: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view, at = memoryview(data), 0
    while at < length:
        count = connection.recv_into(view[at:])
        if not count:
            raise EOFError("it hung up")
        at += count
    return data


def _connect(name: str) -> socket.socket:
    """Connects to the worker; one process at a time starts it when nobody listens."""
    path = folder() / f"{name}.sock"
    if connection := _try(path):
        return connection
    with (folder() / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if connection := _try(path):
            return connection
        return _start(name, path)


def _try(path: Path) -> socket.socket | None:
    """Connects, and waits until the worker takes the connection; None when there is none, or it ends just now."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
        if connection.recv(1):
            return connection
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
        connection.close()
        return None
    connection.close()
    return None


def _start(name: str, path: Path) -> socket.socket:
    """Starts a worker of its own session, so that it outlives this process; it ends with the one above this."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    _sweep(path.parent)
    log = path.with_suffix(".log")
    command = [sys.executable, "-m", "fedtune.flower.resident", str(path), str(os.getppid())]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, close_fds=True
        )
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        if connection := _try(path):
            return connection
        time.sleep(0.01)
    if connection := _try(path):
        return connection
    process.kill()
    raise WorkerError(f"the resident worker did not start; see {log}:\n{_tail(log)}")


def _sweep(place: Path) -> None:
    """Removes what runs that ended long ago have left: locks, and logs of workers that died."""
    for old in place.iterdir():
        with contextlib.suppress(OSError):
            if old.suffix in (".lock", ".log") and time.time() - old.stat().st_mtime > OLD_S:
                old.unlink()


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    except OSError:
        return ""
