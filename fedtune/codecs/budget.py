"""Ternary codes that fit into a number of bytes: the density follows from the budget and from the update itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log2

from fedtune.codecs.signs import size_of
from fedtune.codecs.ternary import Ternary
from fedtune.codecs.ternary_format import floating
from fedtune.errors import WireError, problem
from fedtune.tensors import Array, Manifest, Tensors

MOST = 0.5
"""Beyond it one scale has to stand for ever smaller values: of a normal distribution no more would be gained."""
_TRIES = 24  # nearly always three or four; sizes jump where another code becomes shorter
_BACK = 0.9  # while nothing fits, step back further than the excess says
_CLOSE = 0.99  # of the budget used: good enough


@dataclass(frozen=True, kw_only=True)
class Budget:
    """As many signs as fit into `nbytes` bytes, but at most half of the values; `ternary` says the rest.

    Guarantees: the payload is a function of the tensors and the budget alone, and never longer than the budget.
    """

    ternary: Ternary
    nbytes: int

    def encode(self, tensors: Tensors, manifest: Manifest) -> Iterator[memoryview | bytes]:
        """Yields the densest payload found that fits.

        Raises:
            WireError: not even one value fits, or `tensors` are not what `manifest` says.
        """
        best, low, high, density = b"", 0.0, MOST, self.density(manifest)
        for _ in range(_TRIES):
            payload = b"".join(replace(self.ternary, density=density).encode(tensors, manifest))
            if len(payload) <= self.nbytes:
                best, low = payload, density
            else:
                high = density
            if low == MOST or self.nbytes * _CLOSE <= len(payload) <= self.nbytes:
                break
            guess = density * self.nbytes / len(payload) * (1 if best else _BACK)
            density = min(guess, MOST) if low < guess < high or low < high == MOST else (low + high) / 2
        yield best or self._smallest(tensors, manifest)

    def decode(self, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Reads tensors; raises WireError on more bytes than the budget, or none of a payload for `manifest`."""
        if len(payload) > self.nbytes:
            raise WireError(problem("payload", f"at most {self.nbytes} bytes", f"{len(payload)} bytes"))
        return self.ternary.decode(payload, manifest)

    def largest(self, manifest: Manifest) -> int:
        """Returns the budget, or what a payload for `manifest` has at most if that is less."""
        return min(self.nbytes, self.ternary.largest(manifest))

    def density(self, manifest: Manifest) -> float:
        """Returns the density at which the bound, (H(p) + p) bits a value, meets the budget."""
        bits = 8 * self.nbytes / max(1, sum(size_of(spec) for spec in floating(manifest)))
        low, high = 0.0, MOST
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _bits(middle) < bits else (low, middle)
        return high

    def _smallest(self, tensors: Tensors, manifest: Manifest) -> bytes:
        payload = b"".join(replace(self.ternary, density=1e-12).encode(tensors, manifest))
        if len(payload) > self.nbytes:
            raise WireError(problem("budget", f"at least {len(payload)} bytes", self.nbytes, "Raise budget_kb"))
        return payload


def _bits(p: float) -> float:
    """H(p) + p."""
    return -p * log2(p) - (1 - p) * log2(1 - p) + p if 0 < p < 1 else p
