"""Huffman codes for bytes as DEFLATE has them (Deutsch 1996, RFC 1951, 3.2): lengths, bits, and the head of a block.

Symbols 0 to 255 are bytes, 256 ends a block. Numbers of bits are written from the lowest bit on, and codes with their
first bit lowest, so all is put together by shifting and adding.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

END = 256
MOST_BITS = 15
_NO_DISTANCES = 0  # one distance code of no bits: there are no matches
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
_REPEAT, _ZEROS, _MANY_ZEROS = 16, 17, 18
_EXTRA_BITS = {_REPEAT: 2, _ZEROS: 3, _MANY_ZEROS: 7}
FIXED = [8] * 144 + [9] * 112 + [7] * 24 + [8] * 8
"""Lengths of the code that need not be stated."""


def lengths_of(counts: Sequence[int], most: int = MOST_BITS) -> list[int]:
    """Returns how long the code of each symbol is, at most `most` bits; 0 where the count is 0.

    At least two counts must not be 0. Where Huffman's code (1952) would be longer, counts are made more alike until it
    is not.
    """
    found = _huffman(counts)
    while max(found) > most:
        counts = [(count + 1) // 2 for count in counts]
        found = _huffman(counts)
    return found


def codes(lengths: Sequence[int]) -> list[int]:
    """Returns the code of each symbol: of one length they count upwards with the symbol, after all shorter ones."""
    out, code, before = [0] * len(lengths), 0, 0
    for symbol in sorted(range(len(lengths)), key=lambda symbol: lengths[symbol]):
        if length := lengths[symbol]:
            code <<= length - before
            out[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code, before = code + 1, length
    return out


def stated(lengths: Sequence[int]) -> tuple[int, int]:
    """Returns the bits that open a block with this code, and how many: the block's type and the code's lengths."""
    if list(lengths) == FIXED:
        return 0b01, 2
    runs = list(_runs([*lengths, _NO_DISTANCES]))
    used = [0] * len(_ORDER)
    for symbol, _ in runs:
        used[symbol] += 1
    of_lengths = lengths_of(used, 7)
    last = max(i for i, symbol in enumerate(_ORDER) if of_lengths[symbol])
    fields = [(0b10, 2), (len(lengths) - 257, 5), (0, 5), (last - 3, 4)]
    fields += [(of_lengths[symbol], 3) for symbol in _ORDER[: last + 1]]
    written = codes(of_lengths)
    for symbol, extra in runs:
        fields += [(written[symbol], of_lengths[symbol]), (extra, _EXTRA_BITS.get(symbol, 0))]
    return joined(fields)


def joined(fields: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Puts numbers of so many bits behind one another."""
    total, at = 0, 0
    for value, bits in fields:
        total |= value << at
        at += bits
    return total, at


def _huffman(counts: Sequence[int]) -> list[int]:
    """Joins the two rarest until one is left; a symbol is as deep as there are joints above it."""
    leaves = sorted((count, symbol) for symbol, count in enumerate(counts) if count)
    weights, above = [count for count, _ in leaves], [0] * (2 * len(leaves) - 1)
    joints: list[int] = []
    leaf, joint = 0, 0
    for number in range(len(leaves), 2 * len(leaves) - 1):
        weight = 0
        for _ in range(2):
            if joint == len(joints) or (leaf < len(leaves) and weights[leaf] <= joints[joint]):
                weight += weights[leaf]
                above[leaf] = number
                leaf += 1
            else:
                weight += joints[joint]
                above[len(leaves) + joint] = number
                joint += 1
        joints.append(weight)
    for node in reversed(range(2 * len(leaves) - 2)):
        above[node] = above[above[node]] + 1
    out = [0] * len(counts)
    for (_, symbol), depth in zip(leaves, above, strict=False):
        out[symbol] = depth
    return out


def _runs(values: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields lengths, or how often to repeat them, with the extra bits' value."""
    for value, group in groupby(values):
        left = len(list(group))
        if value:
            yield value, 0
            left -= 1
        while left >= 3:
            if value:
                step, least, symbol = min(left, 6), 3, _REPEAT
            else:
                step = min(left, 138)
                least, symbol = (11, _MANY_ZEROS) if step >= 11 else (3, _ZEROS)
            yield symbol, step - least
            left -= step
        yield from [(value, 0)] * left
