"""What a family of processes costs: CPU seconds and memory, read from /proc (Linux)."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")
_MB = 1e6


def adopt_orphans() -> None:
    """Makes this process the parent of all descendants whose own parent ends, so that none escapes the accounts."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[int]:
    """Lists all processes below this one."""
    children: dict[int, list[int]] = {}
    for pid, fields in _stats():
        children.setdefault(int(fields[1]), []).append(pid)
    found, queue = [], [os.getpid()]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def cpu_seconds() -> float:
    """CPU seconds of all descendants so far: the living, and those that were waited for."""
    alive = set(descendants())
    ticks = sum(sum(int(ticks) for ticks in fields[11:15]) for pid, fields in _stats() if pid in alive)
    mine = os.times()
    return ticks / _TICK + mine.children_user + mine.children_system


@dataclass
class Memory:
    """Peaks in MB: of the sum of PSS over all descendants, and of the RSS of each process by its role."""

    total: float = 0.0
    roles: dict[str, float] = field(default_factory=dict)


@contextmanager
def memory(role_of: Callable[[str], str], every_s: float = 0.5) -> Iterator[Memory]:
    """Watches the descendants' memory.

    PSS counts a page shared by n processes as 1/n page in each, so the sum is what all of them really hold; it is
    sampled. The peak RSS of a process is the kernel's own mark (VmHWM).

    Args:
        role_of: names the role of a command line; an empty role is not listed by itself.
        every_s: seconds between two samples.
    """
    seen, done = Memory(), threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            _sample(seen, role_of)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def end_descendants(patience_s: float = 10.0) -> None:
    """Ends every descendant: asks, waits, then makes them."""
    until = time.monotonic() + patience_s
    while pids := descendants():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if time.monotonic() < until else signal.SIGKILL)
        _reap()
        time.sleep(0.2)
    _reap()


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _sample(seen: Memory, role_of: Callable[[str], str]) -> None:
    total = 0.0
    for pid in descendants():
        with suppress(OSError, ValueError):
            folder = Path(f"/proc/{pid}")
            role = role_of((folder / "cmdline").read_text().replace("\0", " "))
            peak = _field(folder / "status", "VmHWM:")
            if role:
                seen.roles[role] = max(seen.roles.get(role, 0.0), peak)
            total += _field(folder / "smaps_rollup", "Pss:")
    seen.total = max(seen.total, total)


def _field(file: Path, name: str) -> float:
    """Reads a size in kB from a file of `Name: value kB` lines; returns MB."""
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / _MB
    return 0.0


def _stats() -> Iterator[tuple[int, list[str]]]:
    """Yields process ids with the fields of /proc/PID/stat after the name: state, parent, ..."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                yield int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()
