"""What every codec can do: turn a bag of tensors into bytes and back, for a manifest both sides hold."""

from collections.abc import Iterable
from typing import Protocol

from fedtune.tensors import Array, Manifest, Tensors


class Codec(Protocol):
    """A pair of pure functions, and the bound that a receiver checks before it reads.

    A codec may lose precision, never a name, a shape or a dtype; `feedback` can carry what it loses into what is
    encoded next.
    """

    def encode(self, tensors: Tensors, manifest: Manifest) -> Iterable[memoryview | bytes]:
        """Yields the bytes of `tensors`; raises WireError unless they fit `manifest` and are finite."""

    def decode(self, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Reads tensors of exactly `manifest`; raises WireError on any bytes that do not hold just that."""

    def largest(self, manifest: Manifest) -> int:
        """Returns the most bytes a payload for `manifest` can have."""
