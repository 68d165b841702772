"""Which of two ways the ternary codec goes: numpy's (`plain.py`) or numba's (`compiled.py`). The bytes are the same.

Importing numba takes half a second, and compiling, the first time on a machine, some more: only large vectors do it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np

from fedtune.codecs.plain import Plain
from fedtune.tensors import Array

LEAST = 1 << 20
"""Values of a vector from which numba is used."""
Way = Literal["numpy", "numba", "size"]
_WAY: ContextVar[Way] = ContextVar("fedtune.codecs.backend", default="size")


class Work(Protocol):
    """Work on a block; what each does is written in `plain.py`."""

    def inside(self, block: Array, low: Any, high: Any) -> tuple[int, Array]:
        """How many magnitudes are above `high`, and those from `low` to it."""

    def inside_and_sums(self, block: Array, low: Any, high: Any) -> tuple[int, Array, tuple[float, float]]:
        """That, and the sums of whole rows and of their squares."""

    def keep(self, block: Array, limit: Any, start: int, positions: Array, signs: Array) -> int:
        """Writes places and signs of magnitudes of `limit` and more."""

    def signs(self, block: Array, limit: Any, out: Array) -> None:
        """Signs of magnitudes of `limit` and more, 0 elsewhere."""

    def quotients(self, places: Array, before: int, shift: int) -> Array:
        """Gaps before places, as bytes."""

    def pack(self, plane: Array, total: Array) -> None:
        """3 total + digits of signs."""

    def counts(self, data: Array) -> Array:
        """How often each byte occurs."""

    def spell(self, data: Array, codes: Array, lengths: Array, at: int, words: int) -> Array:
        """Huffman codes of bytes, behind one another."""


@contextmanager
def using(way: Way) -> Iterator[None]:
    """Goes one way for the length of a `with` block in this thread; `size` is the default: numba where it pays."""
    token = _WAY.set(way)
    try:
        yield
    finally:
        _WAY.reset(token)


def work(size: int, dtype: Any = np.float32) -> Work:
    """Returns what works on the blocks of vectors of `size` values together, float32 or float64."""
    way, dtype = _WAY.get(), np.dtype(dtype)
    compiled = _compiled() if way == "numba" or (way == "size" and size >= LEAST) else None
    if compiled is None:
        return Plain(dtype)
    made: Work = compiled.Compiled(dtype)
    return made


@cache
def _compiled() -> Any:
    try:
        return import_module("fedtune.codecs.compiled")
    except ImportError:
        return None
