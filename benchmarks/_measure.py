"""One measured run of a federation: start it, watch the rounds close, stop it."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from _processes import Memory, cpu_seconds, end_descendants, memory

_PATIENCE_S = 240.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Per round after the first (the first one starts things): wall and CPU seconds. Memory over the whole run, MB.

    `total_mb` is the peak of the sum of PSS over all processes, `roles` the largest peak RSS of one process a role.
    `first_s` is from the command to the end of round 1.
    """

    wall_s: float
    cpu_s: float
    total_mb: float
    roles: dict[str, float]
    first_s: float


def measure(
    start: Callable[[], subprocess.Popen[bytes]],
    closed: Callable[[], list[float]],
    rounds: int,
    role_of: Callable[[str], str],
    logs: Path,
) -> Measured:
    """Starts a run, waits until `closed` lists the times at which all rounds ended, and ends every process.

    Raises:
        RuntimeError: the run ended early, or a round took longer than four minutes.
    """
    began = time.time()
    cpu: dict[int, float] = {}
    with memory(role_of) as seen:
        process = start()
        until = time.monotonic() + _PATIENCE_S
        while (done := len(closed())) < rounds:
            if done and done not in cpu:
                cpu[done] = cpu_seconds()
                until = time.monotonic() + _PATIENCE_S
            if time.monotonic() > until or process.poll() not in (None, 0):
                raise RuntimeError(f"the run stopped after {done} rounds (exit {process.poll()}):\n{_tails(logs)}")
            time.sleep(0.02)
        cpu[done] = cpu_seconds()
    times = closed()
    end_descendants()
    return _per_round(times, cpu, seen, began)


def _per_round(times: list[float], cpu: dict[int, float], seen: Memory, began: float) -> Measured:
    first, last = min(cpu), max(cpu)
    cpu_s = (cpu[last] - cpu[first]) / (last - first)
    wall_s = (times[-1] - times[0]) / (len(times) - 1)
    return Measured(wall_s, cpu_s, seen.total, dict(seen.roles), times[0] - began)


def _tails(logs: Path) -> str:
    files = sorted(logs.glob("*.log"))
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)
