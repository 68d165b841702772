"""FedKSeed's updates as vectors of K scalars: sums in integers, and which clients to trust (numpy alone).

A client's scalars, added up by seed, are its K-vector v: its model moved by -lr sum_s v_s z_s. Directions are all but
orthogonal, so distances and norms of K-vectors are, up to one factor, those of the models, at K numbers a client.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.errors import WireError, problem
from fedtune.robust import clip_factors, multi_krum
from fedtune.tensors import Tensors

LIMIT = 2.0**16  # of a scalar
UNIT = 2.0**-32  # of scalars in sums: a client's sum over 2**13 scalars below 2**16 stays below 2**61
_MOST = 2**62
HISTORY_CLIP = 1000.0
HISTORY_UNIT = 2.0**-20
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sum:
    """Updates of `members`, added up by seed.

    Attributes:
        members: ids of the clients.
        weight: sum of their weights.
        scalars: sum of weight * scalar in `UNIT`, Python integers (K,).
        sizes: sum of |g|, each at most `HISTORY_CLIP`, in `HISTORY_UNIT` (K,); it stops at 2**62.
        counts: number of scalars (K,).
        clipped: ids of those whose K-vector was scaled down.
    """

    members: frozenset[str]
    weight: int
    scalars: npt.NDArray[Any]
    sizes: Longs
    counts: Longs
    clipped: frozenset[str] = frozenset()

    @classmethod
    def of(cls, update: Tensors, k: int, directions: int, client: str, weight: int, clip: float) -> "Sum":
        """Adds up one update: `seeds` (-1 where skipped) and `scalars`, `directions` of them a step.

        Args:
            update: as decoded.
            k: number of seeds.
            directions: scalars a step, which are averaged.
            client: its id.
            weight: its weight.
            clip: largest norm of its K-vector; a longer one is scaled down. 0 means any.
        """
        used = update["seeds"] >= 0
        seeds, g = update["seeds"][used], update["scalars"][used].astype(np.float64)
        vector, sizes = np.zeros(k, np.int64), np.zeros(k, np.int64)
        np.add.at(vector, seeds, np.rint(g / (UNIT * directions)).astype(np.int64))
        np.add.at(sizes, seeds, np.rint(np.minimum(np.abs(g), HISTORY_CLIP) / HISTORY_UNIT).astype(np.int64))
        factor = float(clip_factors([_norm(vector)], clip)[0]) if clip else 1.0
        if factor < 1:
            vector = np.rint(vector * factor).astype(np.int64)
        counts = np.bincount(seeds, minlength=k)
        who = frozenset([client])
        return cls(who, weight, vector.astype(object) * weight, sizes, counts, who if factor < 1 else frozenset())

    def plus(self, other: "Sum") -> "Sum":
        """Joins two sums."""
        return Sum(
            self.members | other.members,
            self.weight + other.weight,
            self.scalars + other.scalars,
            counted(self.sizes, other.sizes),
            counted(self.counts, other.counts),
            self.clipped | other.clipped,
        )

    def mean(self) -> Longs:
        """Returns the weighted mean of the scalars in `UNIT`, rounded half up (K,)."""
        means: Longs = ((2 * self.scalars + self.weight) // (2 * self.weight)).astype(np.int64)
        return means


def accumulated(before: Longs, mean: Longs) -> Longs:
    """Adds a round's mean to the sums of all rounds in `UNIT` (K,); a sum stops at 2**62 either way.

    A mean is at most 2**61, so nothing wraps around. Sums of such a size are those of a run that diverged.
    """
    after: Longs = np.clip(before + mean, -_MOST, _MOST)
    return after


def counted(one: Longs, other: Longs) -> Longs:
    """Adds sums of what is never negative, each at most 2**62; a total stops there, in any order of adding."""
    total: Longs = np.minimum(one, _MOST - other) + other
    return total


def trusted(replies: Mapping[str, Sum], byzantine: int) -> dict[str, Sum]:
    """Leaves out the `byzantine` updates farthest from the others, by multi-Krum on the K-vectors.

    Args:
        replies: one sum a client.
        byzantine: f, how many may be hostile.

    Raises:
        RoundError: fewer than 2 f + 3 replies.
    """
    clients = sorted(replies)
    vectors = [replies[c].mean() * UNIT for c in clients]
    distances = np.zeros((len(clients), len(clients)))
    for i, one in enumerate(vectors):
        for j, other in enumerate(vectors[:i]):
            # fsum rounds once: neither the processor nor the order of arrival has a say in who is kept.
            distances[i, j] = distances[j, i] = fsum(((one - other) ** 2).tolist())
    kept = multi_krum(distances, byzantine, len(clients) - byzantine)
    return {clients[i]: replies[clients[i]] for i in kept}


def joined(sums: Mapping[str, Sum]) -> Sum:
    """Adds up sums; at least one."""
    total, *rest = sums.values()
    for one in rest:
        total = total.plus(one)
    return total


def check_pairs(seeds: npt.NDArray[Any], scalars: npt.NDArray[Any], k: int, client: str) -> None:
    """Raises WireError for seeds that are not in the pool (-1: skipped) and scalars beyond `LIMIT`."""
    if seeds.min() < -1 or seeds.max() >= k:
        raise WireError(problem(f"seeds of {client}", f"-1 to {k - 1}", [seeds.min(), seeds.max()]))
    if np.abs(scalars).max() >= LIMIT or scalars[seeds < 0].any():
        raise WireError(problem(f"scalars of {client}", f"below {LIMIT:.0f}, 0 where skipped", "others"))


def levels(sizes: Longs, counts: Longs) -> Longs:
    """Mean |g| of each seed, from the least (0) to the largest (255) (K,). A history begins with a zero."""
    a = sizes * HISTORY_UNIT / (counts + 1)
    scaled: Longs = np.rint(255 * (a - a.min()) / (a.max() - a.min() + 1e-10)).astype(np.int64)
    return scaled


def probabilities(seed_levels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Chances of the seeds (K,), from the level 0 to 255 of each: softmax of level / 255, so at most e to 1."""
    weights: npt.NDArray[np.float64] = np.exp(seed_levels / 255.0)
    chances: npt.NDArray[np.float64] = weights / weights.sum()
    return chances


def packed(change: npt.NDArray[np.float64], exponent: int = 60) -> tuple[npt.NDArray[np.uint8], int]:
    """Rounds numbers to 24-bit integers, low byte first (K, 3), in the finest unit that keeps a replay exact.

    Returns:
        The bytes, and the binary exponent e <= `exponent` of the unit 2**-e.
    """
    while np.abs(change).max() >= 2.0 ** (22 - exponent) or np.abs(change).sum() >= 2.0 ** (30 - exponent):
        exponent -= 1
    return np.rint(np.ldexp(change, exponent)).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].copy(), exponent


def unpacked(bits: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Reads 24-bit integers, low byte first (K, 3)."""
    wide = np.concatenate([np.zeros((len(bits), 1), np.uint8), bits], axis=1)
    return wide.view("<i4")[:, 0] >> np.int32(8)


def _norm(vector: Longs) -> float:
    return sqrt(fsum(((vector * UNIT) ** 2).tolist()))
