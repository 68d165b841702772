"""What programs that live for days ask of the C allocator. Only glibc listens; elsewhere nothing happens.

glibc gives each thread an arena and keeps what is freed in it. A program that moves payloads through a pool of
threads so ends up holding several times what it uses.
"""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_ARENAS, _MAPPED_BYTES, _KEPT_BYTES = 2, 2**20, 4 * 2**20


def share_arenas() -> None:
    """Makes all threads share two arenas, and sends blocks of 1 MiB back to the system when freed.

    Call it before threads start. It is right for moving payloads and too slow for training, which frees large blocks
    only to ask for them again.
    """
    libc = _glibc()
    if libc:
        libc.mallopt(_M_ARENA_MAX, _ARENAS)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def release() -> None:
    """Gives all memory that is free back to the system: right before a long wait."""
    libc = _glibc()
    if libc:
        libc.malloc_trim(0)


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
