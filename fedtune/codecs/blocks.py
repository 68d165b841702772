"""Block quantisation: 8 or 4 bits a value, and one scale for every 64 values in a row.

For each floating tensor the payload holds the scales of its blocks (bfloat16, rounded up, so that no value is beyond
the largest code) and then the codes: round(value / scale), from -127 to 127 in a byte, or from -7 to 7 two to a byte,
the first in the lower half, in two's complement. Integer tensors travel as they are. 8.25 or 4.25 bits a value.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedtune.codecs.reader import Reader
from fedtune.codecs.signs import size_of
from fedtune.codecs.top import working
from fedtune.errors import WireError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, TensorSpec, as_bytes, check, check_finite

BLOCK = 64
_SCALE = DTYPES["bfloat16"]
_INTEGERS = ("int64", "int32", "uint8")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Symmetric quantisation by the largest magnitude of each block; `bits` is 8 or 4."""

    bits: Literal[8, 4] = 8

    def encode(self, tensors: Tensors, manifest: Manifest) -> Iterator[memoryview | bytes]:
        """Yields scales and codes, tensor by tensor.

        Raises:
            WireError: `tensors` do not fit `manifest`, hold a value that is not finite, or one beyond float32.
        """
        check(tensors, manifest, "update")
        for spec in manifest.specs:
            if spec.dtype in _INTEGERS:
                yield as_bytes(tensors[spec.name])
            else:
                scales, codes = self._quantise(working(tensors[spec.name]), spec)
                yield scales.tobytes()
                yield self._pack(codes)

    def decode(self, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Reads values back; raises WireError on a wrong length, a code or scale that is never written, set padding."""
        reader = Reader(payload, self.largest(manifest))
        out = {spec.name: self._read(reader, spec).reshape(spec.shape) for spec in manifest.specs}
        reader.end()
        return out

    def largest(self, manifest: Manifest) -> int:
        """Returns the size of every payload for `manifest`."""
        return sum(self._nbytes(spec) for spec in manifest.specs)

    @property
    def _top(self) -> int:
        return 127 if self.bits == 8 else 7

    def _nbytes(self, spec: TensorSpec) -> int:
        if spec.dtype in _INTEGERS:
            return spec.nbytes
        size = size_of(spec)
        return -(-size // BLOCK) * _SCALE.itemsize + -(-size * self.bits // 8)

    def _quantise(self, flat: Array, spec: TensorSpec) -> tuple[Array, Array]:
        """Returns the scale of each block, and the code of each value (int8)."""
        padded = np.zeros((-(-flat.size // BLOCK), BLOCK), flat.dtype)
        padded.reshape(-1)[: flat.size] = flat
        with np.errstate(over="ignore"):
            scales = _round_up((np.abs(padded).max(axis=1) / self._top).astype(np.float32))
        check_finite(scales, f"update: scales of {spec.name}")
        steps = scales.astype(padded.dtype)[:, None]
        np.divide(padded, steps, out=padded, where=steps > 0)
        codes = np.clip(np.rint(padded), -self._top, self._top).astype(np.int8)
        return scales, codes.reshape(-1)[: flat.size]

    def _pack(self, codes: Array) -> bytes:
        if self.bits == 8:
            return codes.tobytes()
        halves = np.zeros(-(-codes.size // 2) * 2, np.uint8)
        halves[: codes.size] = codes.view(np.uint8) & 15
        return (halves[::2] | halves[1::2] << 4).tobytes()

    def _read(self, reader: Reader, spec: TensorSpec) -> Array:
        size = size_of(spec)
        if spec.dtype in _INTEGERS:
            return reader.array(DTYPES[spec.dtype], size, spec.name)
        scales = reader.array(_SCALE, -(-size // BLOCK), f"scales of {spec.name}")
        check_finite(scales, f"payload: scales of {spec.name}")
        codes = self._codes(reader, spec)
        if (scales < 0).any() or (size and int(codes.min()) < -self._top) or codes[size:].any():
            raise WireError(problem(spec.name, f"scales of at least 0 and codes from -{self._top}", "others"))
        return _values(codes[:size], scales, DTYPES[spec.dtype])

    def _codes(self, reader: Reader, spec: TensorSpec) -> Array:
        """Reads the codes of a tensor and the padding of the last byte (int8)."""
        packed = reader.array(np.dtype(np.uint8), -(-size_of(spec) * self.bits // 8), f"codes of {spec.name}")
        if self.bits == 8:
            return packed.view(np.int8)
        return (np.stack([packed << 4, packed & 240], axis=1).reshape(-1).view(np.int8)) >> 4


def _values(codes: Array, scales: Array, dtype: np.dtype[np.generic]) -> Array:
    """Multiplies; what rounding pushes beyond the largest number of `dtype` becomes that number."""
    wide = np.float64 if dtype == np.float64 else np.float32
    steps = np.repeat(scales.astype(wide), BLOCK)[: codes.size]
    largest = float(_finfo(dtype).max)
    with np.errstate(over="ignore"):
        product: Array = np.clip(codes * steps, -largest, largest)
    return product.astype(dtype)


def _finfo(dtype: np.dtype[np.generic]) -> "np.finfo[np.floating]":
    import ml_dtypes

    return ml_dtypes.finfo(dtype)  # type: ignore[no-any-return]  # untyped; numpy's own for numpy's dtypes


def _round_up(values: Array) -> Array:
    """Rounds float32 of at least 0 up to bfloat16, which is its upper half."""
    bits = values.view(np.uint32).astype(np.uint64) + 0xFFFF
    return (bits >> 16).astype(np.uint16).view(_SCALE)
