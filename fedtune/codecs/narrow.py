"""Floating tensors in 16 bits: bfloat16 keeps float32's range, float16 has three bits more of precision."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedtune.codecs import raw
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, check

_WIDE = ("float64", "float32")


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Rounds float64 and float32 to `dtype` on the wire; all else travels as it is. Half the bytes of float32."""

    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    def encode(self, tensors: Tensors, manifest: Manifest) -> Iterator[memoryview | bytes]:
        """Yields rounded values; raises WireError when one is not finite or leaves the range of `dtype`."""
        check(tensors, manifest, "update")
        narrow = self._manifest(manifest)
        with np.errstate(over="ignore"):
            rounded = {s.name: tensors[s.name].astype(DTYPES[s.dtype], copy=False) for s in narrow.specs}
        yield from raw.encode(rounded, narrow)

    def decode(self, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Reads values back into the dtypes of `manifest`."""
        rounded = raw.decode(payload, self._manifest(manifest))
        return {s.name: rounded[s.name].astype(DTYPES[s.dtype], copy=False) for s in manifest.specs}

    def largest(self, manifest: Manifest) -> int:
        """Returns the size of every payload for `manifest`."""
        return self._manifest(manifest).nbytes

    def _manifest(self, manifest: Manifest) -> Manifest:
        return Manifest(tuple(replace(s, dtype=self.dtype) if s.dtype in _WIDE else s for s in manifest.specs))
