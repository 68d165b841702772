"""Bytes as raw DEFLATE (RFC 1951) with Huffman codes only: what any zlib inflates, written several times as fast.

zlib renews its codes every 32 thousand bytes. Here they are renewed where that saves more than stating them costs: 32
thousand bytes at a time are counted, and what is counted joins the block before it unless apart they are shorter.
Looking for matches would find none worth its bits: the bytes are drawn nearly independently.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import log2

import numpy as np
import numpy.typing as npt

from fedtune.codecs import huffman
from fedtune.codecs.backend import Work
from fedtune.codecs.reader import varint
from fedtune.tensors import Array

_CHUNK = 1 << 15
_LEAST = 1 << 11
_NEW_CODES_BITS = 600
_WORD = 64


def section(parts: Sequence[Array], how: Work) -> bytes:
    """Returns the stream of `parts`, uint8, at least one value in all, behind its length.

    Args:
        parts: what has statistics of its own, such as one tensor.
        how: counts and spells.
    """
    data, bits = np.concatenate(parts), _Bits()
    blocks = _blocks(data, _edges([part.size for part in parts]), how)
    for number, (start, stop, counts) in enumerate(blocks):
        _block(data[start:stop], counts, number + 1 == len(blocks), bits, how)
    stream = bits.ended()
    return varint(len(stream)) + stream


class _Bits:
    """A stream of bits, the lowest first: whole words, and what does not fill one yet."""

    def __init__(self) -> None:
        self._words: list[bytes] = []
        self._value, self.count = 0, 0

    def put(self, value: int, count: int) -> None:
        """Writes the lowest `count` bits of a number that has no others."""
        self._value |= value << self.count
        self.count += count
        whole = self.count // _WORD * _WORD
        self._words.append((self._value & ((1 << whole) - 1)).to_bytes(whole // 8, "little"))
        self._value >>= whole
        self.count -= whole

    def put_words(self, words: Array, count: int) -> None:
        """Writes `count` bits of `words` (uint64), which begin in the first word after the bits that wait here."""
        whole, self.count = divmod(self.count + count, _WORD)
        words[0] |= np.uint64(self._value)
        self._words.append(words[:whole].astype("<u8", copy=False).tobytes())
        self._value = int(words[whole]) if self.count else 0

    def ended(self) -> bytes:
        """Returns all bytes; unused bits are 0."""
        return b"".join([*self._words, self._value.to_bytes(-(-self.count // 8), "little")])


def _edges(sizes: Sequence[int]) -> list[int]:
    """Cuts parts into chunks, and joins small parts to one."""
    edges, at = [0], 0
    for size in sizes:
        if at - edges[-1] >= _LEAST:
            edges.append(at)
        edges += range(edges[-1] + _CHUNK, at + size - _LEAST, _CHUNK)
        at += size
    return [*edges, at]


def _blocks(data: Array, edges: Sequence[int], how: Work) -> list[tuple[int, int, Array]]:
    """Joins chunks from left to right while one code for all is the shorter; start, stop and counts of each block."""
    blocks: list[tuple[int, int, Array]] = []
    cost = 0.0
    for start, stop in pairwise(edges):
        counts = how.counts(data[start:stop])
        alone = _cost(counts)
        both = _cost(blocks[-1][2] + counts) if blocks else 0.0
        if blocks and both <= cost + alone + _NEW_CODES_BITS:
            blocks[-1], cost = (blocks[-1][0], stop, blocks[-1][2] + counts), both
        else:
            blocks.append((start, stop, counts))
            cost = alone
    return blocks


def _cost(counts: Array) -> float:
    """Entropy of all that was counted, in bits."""
    total = float(counts.sum())
    return total * log2(total) - float(counts @ np.log2(np.maximum(counts, 1)))


def _block(data: Array, counts: Array, last: bool, bits: _Bits, how: Work) -> None:
    """Writes one block with the shorter of its own and the fixed code."""
    used = [*counts.tolist(), 1]
    both = [(lengths, huffman.stated(lengths)) for lengths in (huffman.FIXED, huffman.lengths_of(used))]
    best, head = min(both, key=lambda one: _nbits(used, one[0]) + one[1][1])
    codes = huffman.codes(best)
    bits.put(int(last), 1)
    bits.put(*head)
    count = _nbits(used, best) - best[huffman.END]
    words = how.spell(data, *_table(codes, best), bits.count, -(-(bits.count + count) // _WORD) + 1)
    bits.put_words(words, count)
    bits.put(codes[huffman.END], best[huffman.END])


def _nbits(counts: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(count * length for count, length in zip(counts, lengths, strict=False))


def _table(codes: Sequence[int], lengths: Sequence[int]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    return np.array(codes[: huffman.END], np.uint64), np.array(lengths[: huffman.END], np.uint64)
