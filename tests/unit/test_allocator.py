"""The allocator's hints are only hints: nothing may depend on them, and they may be given at any time."""

import platform
import subprocess
import sys

import pytest

from fedtune import allocator

# glibc takes the size of the largest block freed so far for what should stay on the heap from then on: hence `large`. A
# small block behind the others stays, so that what is freed cannot simply be cut off the end of the heap.
CODE = """
import numpy as np
from fedtune import allocator

def resident():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmRSS:"))
    return int(line.split()[1]) / 1000

{before}
start = resident()
large = np.ones(2_500_000)
del large
held = [np.ones(160_000) for _ in range(50)]
last = np.ones(2_000)
del held
{after}
print(resident() - start)
"""


def _kept(before="", after=""):
    """Returns how many of the 64 MB that were freed the process still holds."""
    code = CODE.format(before=before, after=after)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc takes the hints")
def test_what_is_freed_goes_back_to_the_system():
    if _kept() < 15:
        pytest.skip("this glibc gives everything back by itself")
    assert _kept(before="allocator.share_arenas()") < 10
    assert _kept(after="allocator.release()") < 10


def test_hints_may_be_repeated_and_are_ignored_without_glibc(monkeypatch):
    allocator.share_arenas()
    allocator.release()
    monkeypatch.setattr(sys, "platform", "darwin")
    allocator.share_arenas()
    allocator.release()
