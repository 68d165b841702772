"""Several short rows in one sequence, kept apart, and the order in which a run sees them.

Rows of a few dozen tokens padded to the longest waste more than half of the arithmetic. Packed, a sequence is full;
a token sees only its own row (the mask), at its own places (the positions), so that losses are those of rows alone.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np

from fedtune.training.encoding import Encoded, Ints


@dataclass(frozen=True)
class Batch:
    """N sequences of T tokens, made of `Encoded` rows; M places are learned.

    Attributes:
        ids, positions, branches: as in `Encoded` (N, T).
        segments: which row of its sequence a token belongs to; -1 is padding (N, T).
        at: learned places, counted through the flattened N x T (M,).
        targets: tokens they should predict (M,).
        rows: number of the row each belongs to, as given to `collate` (M,).
        target_branches: branch of each predicted token (M,).
    """

    ids: Ints
    positions: Ints
    segments: Ints
    branches: Ints
    at: Ints
    targets: Ints
    rows: Ints
    target_branches: Ints

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments >= 0).sum())


def pack(lengths: Sequence[int], max_length: int, rng: np.random.Generator | None = None) -> list[list[int]]:
    """Deals rows into sequences of at most `max_length` tokens: longest first, each where it leaves least room.

    Args:
        lengths: tokens of each row, at most `max_length`.
        max_length: tokens of a sequence.
        rng: draws the order of equal rows and of the sequences; None keeps the given order.

    Returns:
        The rows' numbers, sequence by sequence; every row once.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths, np.int64)[order], kind="stable")]
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the sequence), sorted
    for row in order.tolist():
        slot = bisect_left(room, (lengths[row], -1))
        left, number = room.pop(slot) if slot < len(room) else (max_length, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(row)
        insort(room, (left - lengths[row], number))
    return packs if rng is None else [packs[i] for i in rng.permutation(len(packs))]


def collate(rows: Sequence[Encoded], packs: Sequence[Sequence[int]]) -> Batch:
    """Lays `packs` of rows out as arrays, as wide as the longest."""
    width = max(sum(len(rows[i]) for i in members) for members in packs)
    ids, positions, branches = (np.zeros((len(packs), width), np.int64) for _ in range(3))
    segments = np.full((len(packs), width), -1, np.int64)
    at, targets, owners, forks = [], [], [], []
    for line, members in enumerate(packs):
        start = 0
        for segment, number in enumerate(members):
            row = rows[number]
            here = slice(start, start + len(row))
            ids[line, here], positions[line, here], branches[line, here] = row.ids, row.positions, row.branches
            segments[line, here] = segment
            at.append(line * width + start + row.at)
            targets.append(row.targets)
            owners.append(np.full(len(row.at), number))
            forks.append(row.target_branches)
            start += len(row)
    flat = (np.concatenate(part) for part in (at, targets, owners, forks))
    return Batch(ids, positions, segments, branches, *flat)


@dataclass(frozen=True)
class Plan:
    """What a training turn reads.

    Attributes:
        rows: the client's rows.
        max_length: tokens a sequence.
        packing: several rows in a sequence.
        batch_size: sequences a step; fewer when the rows make fewer.
        steps: number of steps; 0 means as many as `epochs` passes take.
        epochs: passes over the rows when `steps` is 0.
        parts: parts a batch is cut into.
    """

    rows: Sequence[Encoded]
    max_length: int
    packing: bool
    batch_size: int
    steps: int
    epochs: int = 1
    parts: int = 1

    def batches(self, seed: int) -> tuple[int, Iterator[list[Batch]]]:
        """Returns the number of steps, and for each step its batch in parts. A function of rows and `seed` alone."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        first = self._epoch(rng)
        size = min(self.batch_size, len(first))
        steps = self.steps or ceil(self.epochs * len(first) / size)
        return steps, self._stream(rng, first, size, steps)

    def _stream(self, rng: np.random.Generator, queue: list[list[int]], size: int, steps: int) -> Iterator[list[Batch]]:
        """Batches go on across the ends of passes, so that none is small."""
        for _ in range(steps):
            while len(queue) < size:
                queue = queue + self._epoch(rng)
            batch, queue = queue[:size], queue[size:]
            bounds = np.linspace(0, size, min(self.parts, size) + 1).astype(int).tolist()
            yield [collate(self.rows, batch[a:b]) for a, b in pairwise(bounds)]

    def _epoch(self, rng: np.random.Generator) -> list[list[int]]:
        if not self.packing:
            return [[int(i)] for i in rng.permutation(len(self.rows))]
        return pack([len(row) for row in self.rows], self.max_length, rng)
