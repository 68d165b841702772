"""Dense signs as bytes: five values of -1, 0, 1 to a byte, then Huffman codes.

A vector is padded with zeros to 5 m values; byte i holds the values i, m + i, ..., 4 m + i, so that packing is five
passes over contiguous memory. A value is the digit 0, 1 (plus) or 2 (minus); the first is worth 1, the next 3, 9, 27
and 81.
"""

from collections.abc import Sequence

import numpy as np

from fedtune.codecs.backend import Work, work
from fedtune.codecs.deflate import section
from fedtune.codecs.gaps import Signs
from fedtune.codecs.reader import Reader
from fedtune.errors import WireError, problem
from fedtune.tensors import Array

DIGITS = 5
_BASE = 3
_BLOCK = 1 << 15


def encode(vectors: Sequence[Signs]) -> bytes:
    """Writes vectors of -1, 0 and 1."""
    how = work(sum(signs.size for signs in vectors))
    return section([_pack(signs, how) for signs in vectors], how)


def decode(reader: Reader, sizes: Sequence[int]) -> list[Signs]:
    """Reads vectors of `sizes` values; raises WireError when bytes or padding are none that `encode` writes."""
    widths = [-(-size // DIGITS) for size in sizes]
    data: Array = np.frombuffer(reader.inflate(sum(widths), sum(widths), "trits"), np.uint8)
    if data.size and int(data.max()) >= _BASE**DIGITS:
        raise WireError(problem("trits", f"bytes below {_BASE**DIGITS}", int(data.max())))
    parts = np.split(data, np.cumsum(widths)[:-1])
    return [_unpack(part, size) for part, size in zip(parts, sizes, strict=True)]


def _pack(signs: Signs, how: Work) -> Array:
    width = -(-signs.size // DIGITS)
    planes, packed = [signs[i * width : (i + 1) * width] for i in range(DIGITS)], np.zeros(width, np.uint8)
    for at in range(0, width, _BLOCK):
        for plane in reversed(planes):
            how.pack(plane[at : at + _BLOCK], packed[at : at + _BLOCK])
    return packed


def _unpack(packed: Array, size: int) -> Signs:
    signs = np.empty((DIGITS, packed.size), np.int8)
    for at in range(0, packed.size, _BLOCK):
        rest = packed[at : at + _BLOCK]
        for plane in signs[:, at : at + _BLOCK]:
            quotient = rest // np.uint8(_BASE)
            digit = rest - quotient * np.uint8(_BASE)
            np.subtract(digit & 1, digit >> 1, out=plane.view(np.uint8))  # 0, 1, 2 become 0, 1, -1
            rest = quotient
    flat = signs.reshape(-1)
    if flat[size:].any():
        raise WireError(problem("trits", "padding of 0", "something else"))
    return flat[:size]
