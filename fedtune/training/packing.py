"""Several short rows in one sequence, kept apart, and the order in which a run sees them.

Rows of a few dozen tokens padded to the longest waste more than half of the arithmetic. Packed, a sequence is full; a
token sees only its own row (the mask), at its own place (the positions), so that losses are those of rows alone.

Rows made by one template begin alike: a system prompt, a question. Such a beginning, the stem, is laid down once a
sequence, and the rest of every row grows from it, at the places that follow the stem. A token sees what it would see
alone, so this is exact too: the tokens of a sequence form a tree of blocks, and a token sees its own block and those
above, up to itself.

    stem ─┬─ rest of row 5
          ├─ rest of row 2 ─┬─ answer 1     (branches of a row: evaluation weighs several answers at once)
          └─ ...            └─ answer 2
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

from fedtune.training.encoding import Encoded, Ints

_COMMON = 0.9
_PADDING = 0


@dataclass(frozen=True)
class Batch:
    """N sequences of T tokens, made of `Encoded` rows; B blocks a sequence at most; M places are learned.

    Attributes:
        ids: tokens (N, T).
        positions: place of each token in its own text (N, T).
        blocks: which block of its sequence a token belongs to; 0 is padding (N, T).
        sees: whether the tokens of a block see another block's (N, B, B).
        at: learned places, counted through the flattened N x T (M,).
        targets: tokens they should predict (M,).
        rows: number of the row each belongs to, as given to `collate` (M,).
        branches: branch of that row (M,).
    """

    ids: Ints
    positions: Ints
    blocks: Ints
    sees: npt.NDArray[np.bool_]
    at: Ints
    targets: Ints
    rows: Ints
    branches: Ints

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.blocks != _PADDING).sum())

    def repeated(self, copies: int) -> "Batch":
        """Lays the same sequences out so many times, one copy behind the other."""
        if copies == 1:
            return self
        ids, positions, blocks, sees = (
            np.concatenate([array] * copies) for array in (self.ids, self.positions, self.blocks, self.sees)
        )
        at = np.concatenate([self.at + n * self.ids.size for n in range(copies)])
        targets, rows, branches = (np.tile(array, copies) for array in (self.targets, self.rows, self.branches))
        return Batch(ids, positions, blocks, sees, at, targets, rows, branches)


@dataclass(frozen=True)
class Stem:
    """A beginning that rows share: its tokens, and which rows have it."""

    ids: Ints
    shared: tuple[bool, ...]

    @classmethod
    def none(cls, rows: int) -> "Stem":
        """No stem, for so many rows."""
        return cls(np.zeros(0, np.int64), (False,) * rows)

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> "Stem":
        """Finds the longest beginning that nine rows in ten share and in which nothing is learned."""
        having = list(range(len(rows)))
        ids: list[int] = []
        while True:
            place = len(ids)
            able = [i for i in having if len(rows[i]) > place + 1 and rows[i].at[0] >= place]
            common = Counter(int(rows[i].ids[place]) for i in able).most_common(1)
            if not common or common[0][1] < max(2, _COMMON * len(rows)):
                break
            ids.append(common[0][0])
            having = [i for i in able if rows[i].ids[place] == ids[-1]]
        shared = set(having) if ids else set()
        return cls(np.array(ids, np.int64), tuple(i in shared for i in range(len(rows))))

    def rest(self, row: int, length: int) -> int:
        """Tokens that row number `row` of `length` tokens adds to a sequence that holds the stem."""
        return length - len(self.ids) if self.shared[row] else length


def pack(lengths: Sequence[int], room: int, rng: np.random.Generator | None = None) -> list[list[int]]:
    """Deals rows into sequences of at most `room` tokens: longest first, each where it leaves least room.

    Args:
        lengths: tokens of each row; one longer than `room` gets a sequence of its own.
        room: tokens of a sequence.
        rng: draws the order of equal rows and of the sequences; None keeps the given order.

    Returns:
        The rows' numbers, sequence by sequence; every row once.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths, np.int64)[order], kind="stable")]
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, number of the sequence), sorted
    for row in order.tolist():
        slot = bisect_left(free, (lengths[row], -1))
        left, number = free.pop(slot) if slot < len(free) else (room, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(row)
        insort(free, (left - lengths[row], number))
    return packs if rng is None else [packs[i] for i in rng.permutation(len(packs))]


class _Line:
    """One sequence while it is laid out."""

    def __init__(self, stem: Ints) -> None:
        self.parents = [_PADDING, _PADDING]  # of block 0 (padding) and block 1 (the stem)
        self.ids, self.positions = [stem], [np.arange(len(stem))]
        self.blocks = [np.ones(len(stem), np.int64)]
        self.at: list[Ints] = []
        self.length = len(stem)

    def add(self, row: Encoded, stem: int) -> None:
        """Appends a row whose first `stem` tokens are there already."""
        trunk = len(self.parents)
        branches = int(row.branches.max(initial=0))
        self.parents += [1 if stem else _PADDING, *[trunk] * branches]
        self.ids.append(row.ids[stem:])
        self.positions.append(row.positions[stem:])
        self.blocks.append(trunk + row.branches[stem:])
        self.at.append(np.where(row.at < stem, row.at, row.at - stem + self.length))
        self.length += len(row) - stem

    def sees(self, blocks: int) -> npt.NDArray[np.bool_]:
        """Each block sees itself and the blocks above it (B, B)."""
        seen = np.eye(blocks, dtype=np.bool_)
        for block, parent in enumerate(self.parents):
            if parent != _PADDING:
                seen[block] |= seen[parent]
        return seen


def collate(rows: Sequence[Encoded], packs: Sequence[Sequence[int]], stem: Stem | None = None) -> Batch:
    """Lays `packs` of rows out as arrays, as wide as the longest."""
    stem = stem or Stem.none(len(rows))
    lines = []
    for members in packs:
        lines.append(_Line(stem.ids if any(stem.shared[i] for i in members) else stem.ids[:0]))
        for i in members:
            lines[-1].add(rows[i], len(stem.ids) if stem.shared[i] else 0)
    width, depth = max(line.length for line in lines), max(len(line.parents) for line in lines)
    ids, positions, blocks = (np.zeros((len(lines), width), np.int64) for _ in range(3))
    for n, line in enumerate(lines):
        for array, parts in ((ids, line.ids), (positions, line.positions), (blocks, line.blocks)):
            array[n, : line.length] = np.concatenate(parts)
    order = [i for members in packs for i in members]
    return Batch(
        ids,
        positions,
        blocks,
        np.stack([line.sees(depth) for line in lines]),
        np.concatenate([n * width + at for n, line in enumerate(lines) for at in line.at]),
        np.concatenate([rows[i].targets for i in order]),
        np.concatenate([np.full(len(rows[i].at), i) for i in order]),
        np.concatenate([rows[i].target_branches for i in order]),
    )


@dataclass(frozen=True)
class Plan:
    """What a training turn reads.

    Attributes:
        rows: the client's rows.
        max_length: tokens a sequence.
        packing: several rows in a sequence, and one stem for all of them.
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
        stem = self._stem()
        first = self._epoch(stem, rng)
        size = min(self.batch_size, len(first))
        steps = self.steps or ceil(self.epochs * len(first) / size)
        return steps, self._stream(stem, rng, first, size, steps)

    def once(self) -> Iterator[Batch]:
        """Yields every row once, in whole batches, in an order that depends on nothing else."""
        stem = self._stem()
        packs = pack(rest_lengths(self.rows, stem), self.max_length - len(stem.ids))
        if not self.packing:
            packs = [[int(i)] for i in np.argsort([-len(row) for row in self.rows], kind="stable")]
        for start in range(0, len(packs), self.batch_size):
            yield collate(self.rows, packs[start : start + self.batch_size], stem)

    def _stem(self) -> Stem:
        return Stem.of(self.rows) if self.packing else Stem.none(len(self.rows))

    def _stream(
        self, stem: Stem, rng: np.random.Generator, queue: list[list[int]], size: int, steps: int
    ) -> Iterator[list[Batch]]:
        """Batches go on across the ends of passes, so that none is small."""
        for _ in range(steps):
            while len(queue) < size:
                queue = queue + self._epoch(stem, rng)
            batch, queue = queue[:size], queue[size:]
            bounds = np.linspace(0, size, min(self.parts, size) + 1).astype(int).tolist()
            yield [collate(self.rows, batch[a:b], stem) for a, b in pairwise(bounds)]

    def _epoch(self, stem: Stem, rng: np.random.Generator) -> list[list[int]]:
        if not self.packing:
            return [[int(i)] for i in rng.permutation(len(self.rows))]
        return pack(rest_lengths(self.rows, stem), self.max_length - len(stem.ids), rng)


def rest_lengths(rows: Sequence[Encoded], stem: Stem) -> list[int]:
    """Tokens that each row adds to a sequence that holds the stem."""
    return [stem.rest(i, len(row)) for i, row in enumerate(rows)]
