"""ComPEFT's ternary codec, written out to the last bit (Yadav et al. 2023, arXiv 2311.13171).

Of an update only the largest magnitudes are kept, a share `density` of them, and of those only the sign; one scale
stands for all magnitudes. A share p of n values costs n (H(p) + p) bits at least, H the binary entropy; the bytes
written by `ternary_format.py` stay within two per cent of the sum of that over the tensors (`benchmarks/ternary.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np

from fedtune.codecs.moments import Moments
from fedtune.codecs.signs import Code
from fedtune.codecs.ternary_format import floating, largest, pack, unpack
from fedtune.codecs.top import Pick, kept_count, pick, working
from fedtune.errors import ConfigError, WireError, problem
from fedtune.tensors import Array, Manifest, Tensors, TensorSpec, check, check_fit


@dataclass(frozen=True, kw_only=True)
class Ternary:
    """Top share, sign and scale.

    Attributes:
        density: share of the values that is kept, 0 to 1.
        alpha: the scale is this times what `scale` says.
        scale: `std` of all values, kept or not, as in the paper; or `least-squares`, the mean magnitude of the kept
            ones, which loses least for alpha 1.
        top: the largest magnitudes of the whole `vector` are kept, as in the paper, or of each `tensor`.
        sigma: one scale for the whole `vector`, as in the paper, or one for each `tensor`.
    """

    density: float = 0.1
    alpha: float = 1.0
    scale: Literal["std", "least-squares"] = "std"
    top: Literal["vector", "tensor"] = "vector"
    sigma: Literal["vector", "tensor"] = "vector"

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise ConfigError(problem("density", "a number from 0 to 1", self.density))
        if not (isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(problem("alpha", "a number above 0", self.alpha))

    def encode(self, tensors: Tensors, manifest: Manifest) -> Iterator[memoryview | bytes]:
        """Yields the bytes of the compressed tensors; integer tensors travel unchanged."""
        yield from pack(self.compress(tensors, manifest), tensors, manifest, self.sigma == "tensor")

    def decode(self, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Reads tensors; raises WireError on any bytes that are not a payload for `manifest`."""
        codes, loose = unpack(payload, manifest)
        values = {code.spec.name: code.values() for code in codes} | loose
        return {spec.name: values[spec.name] for spec in manifest.specs}

    def largest(self, manifest: Manifest) -> int:
        """Returns the most bytes a payload for `manifest` can have."""
        return largest(manifest)

    def compress(self, tensors: Tensors, manifest: Manifest) -> list[Code]:
        """Chooses places, signs and scales of the floating tensors.

        Raises:
            WireError: `tensors` do not fit `manifest`, or hold a value that is not finite or whose square is not.
        """
        check_fit(tensors, manifest, "update")
        specs = floating(manifest)
        wide = any(spec.dtype == "float64" for spec in specs)

        def part(spec: TensorSpec) -> Array:
            flat = working(tensors[spec.name])
            return flat.astype(np.float64, copy=False) if wide else flat

        if self.scale != "std":
            check(tensors, manifest, "update")
        flats = [part(spec) for spec in specs]
        picks = self._pick(flats)
        each = [one.moments for one in picks]
        if not all(isfinite(one.squares) for one in each):
            check(tensors, manifest, "update")
            remedy = "The scale least-squares needs no squares"
            raise WireError(
                problem("update: scale std", "values whose squares fit into float64", "larger ones", remedy)
            )
        if self.scale != "std":
            each = [_mean_kept(*item) for item in zip(picks, flats, strict=True)]
        return [_code(*item) for item in zip(specs, picks, self._scales(each), strict=True)]

    def _pick(self, flats: Sequence[Array]) -> list[Pick]:
        """Chooses what is kept."""
        spread = self.scale == "std"
        if self.top == "vector":
            return pick(flats, kept_count(self.density, sum(flat.size for flat in flats)), spread)
        return [pick([flat], kept_count(self.density, flat.size), spread)[0] for flat in flats]

    def _scales(self, each: list[Moments]) -> list[float]:
        """Computes the scale of each tensor, in float64, from the moments of what it stands for."""
        if self.sigma == "vector":
            total = Moments()
            for one in each:
                total = total.plus(one)
            each = [total] * len(each)
        return [self.alpha * (one.mean if self.scale == "least-squares" else one.std) for one in each]


def _mean_kept(picked: Pick, flat: Array) -> Moments:
    """Moments of the kept magnitudes; only count and mean are used."""
    kept = flat[picked.positions] if picked.positions is not None else flat[picked.signs != 0]
    return Moments(kept.size, float(np.abs(kept).sum(dtype=np.float64)) / max(kept.size, 1))


def _code(spec: TensorSpec, picked: Pick, scale: float) -> Code:
    return Code(spec, picked.count, scale if picked.count else 0.0, picked.signs, picked.positions)
