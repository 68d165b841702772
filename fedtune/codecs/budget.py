"""Ternary codes that fit into a number of bytes: the density follows from the budget and from the update itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np

from fedtune.codecs.signs import Code, size_of
from fedtune.codecs.ternary import Ternary
from fedtune.codecs.ternary_format import floating, pack
from fedtune.errors import WireError, problem
from fedtune.tensors import Array, Manifest, Tensors, TensorSpec

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

    def least(self, manifest: Manifest) -> int:
        """Returns the fewest bytes in which a payload for `manifest` says more than that nothing has changed.

        It keeps one value: of each tensor where `ternary` takes the largest of each, else of the one that costs least.
        """
        specs = floating(manifest)
        loose = sum(spec.nbytes for spec in manifest.specs if spec not in specs)
        whole = {i: (spec.dtype, spec.nbytes) for i, spec in enumerate(specs) if spec.nbytes}
        alone = [{i} for i in {kind: i for i, kind in whole.items()}.values()]  # one tensor of each size
        ways = [set(whole)] if self.ternary.top == "tensor" else alone or [set()]
        return loose + min(self._nbytes([_one(spec, i in kept) for i, spec in enumerate(specs)]) for kept in ways)

    def density(self, manifest: Manifest) -> float:
        """Returns the density at which the bound, (H(p) + p) bits a value, meets the budget."""
        bits = 8 * self.nbytes / max(1, sum(size_of(spec) for spec in floating(manifest)))
        low, high = 0.0, MOST
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if _bits(middle) < bits else (low, middle)
        return high

    def _nbytes(self, codes: Sequence[Code]) -> int:
        manifest = Manifest(tuple(code.spec for code in codes))
        return sum(len(part) for part in pack(codes, {}, manifest, self.ternary.sigma == "tensor"))

    def _smallest(self, tensors: Tensors, manifest: Manifest) -> bytes:
        payload = b"".join(replace(self.ternary, density=1e-12).encode(tensors, manifest))
        if len(payload) > self.nbytes:
            raise WireError(problem("budget", f"at least {len(payload)} bytes", self.nbytes, "Raise budget_kb"))
        return payload


def _one(spec: TensorSpec, kept: bool) -> Code:
    """A code that keeps the first value, or none."""
    return Code(spec, int(kept), 0.0, np.ones(int(kept), np.int8), np.zeros(int(kept), np.int64))


def _bits(p: float) -> float:
    """H(p) + p."""
    return -p * log2(p) - (1 - p) * log2(1 - p) + p if 0 < p < 1 else p
