"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint32]

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: npt.NDArray[np.uint64], row: int, stream: int, keys: tuple[int, int]) -> Words:
    """Returns the four output words of each counter (4, N), for the counter words (low, high, row, stream)."""
    mask = np.uint64(0xFFFFFFFF)
    x0, x1 = counter & mask, counter >> np.uint64(32)
    x2, x3 = np.full_like(counter, row), np.full_like(counter, stream)
    k0, k1 = keys
    for _ in range(ROUNDS):
        p0, p1 = x0 * np.uint64(MULTIPLIERS[0]), x2 * np.uint64(MULTIPLIERS[1])
        x0, x2 = (p1 >> np.uint64(32)) ^ x1 ^ np.uint64(k0), (p0 >> np.uint64(32)) ^ x3 ^ np.uint64(k1)
        x1, x3 = p1 & mask, p0 & mask
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)
