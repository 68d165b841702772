"""The allocator's hints are only hints: nothing may depend on them, and they may be given at any time."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedtune import allocator

CODE = """
import threading
import numpy as np
from fedtune import allocator

def resident():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024

{hint}
def churn():
    held = [np.ones(20_000) for _ in range(400)]  # 64 MB of blocks of 160 kB
    del held[::2], held

threads = [threading.Thread(target=churn) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
{after}
print(resident())
"""


def _resident(hint="", after=""):
    code = CODE.format(hint=hint, after=after)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_hints_do_not_raise_what_is_held():
    plain = _resident()
    assert _resident(hint="allocator.share_arenas()") < plain + 20
    assert _resident(after="allocator.release()") < plain + 20


def test_hints_may_be_repeated_and_are_ignored_without_glibc(monkeypatch):
    allocator.share_arenas()
    allocator.release()
    monkeypatch.setattr(sys, "platform", "darwin")
    allocator.share_arenas()
    allocator.release()
