"""The one value that travels: named arrays, and the manifest that says what they must look like.

A `Manifest` is issued by the coordinator and never by a client, so a receiver knows every name, shape, dtype and
the exact number of bytes before it reads the first one.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fedtune.errors import WireError, problem

Array: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = Mapping[str, Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
}
PRIVATE = "private/"
"""Names that begin so are the coordinator's own part of a state: never broadcast, and no part of its digest."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LEAF, _ROOT = b"fedtune/tensor/v1\0", b"fedtune/tensors/v1\0"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype (a key of `DTYPES`) of one array."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Manifest:
    """What a bag of tensors must look like: the specs in the order in which the bytes travel."""

    specs: tuple[TensorSpec, ...]

    @cached_property
    def nbytes(self) -> int:
        """Total size of the payload in bytes."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def names(self) -> list[str]:
        """Names in wire order."""
        return [spec.name for spec in self.specs]

    @classmethod
    def of(cls, tensors: Tensors) -> "Manifest":
        """Describes `tensors` in their own order."""
        return cls(tuple(TensorSpec(name, array.shape, dtype_name(array, name)) for name, array in tensors.items()))


def dtype_name(array: Array, of: str = "") -> str:
    """Names the dtype of `array`; raises WireError, naming what it is `of`, when fedtune does not carry it."""
    name = _NAMES.get(array.dtype)
    if name is None:
        want, remedy = f"one of {', '.join(DTYPES)}", "Cast it to one of them"
        raise WireError(problem(f"dtype of {of}" if of else "dtype", want, array.dtype, remedy))
    return name


def check(tensors: Tensors, manifest: Manifest, what: str = "tensors") -> None:
    """Raises WireError unless names, order, shapes and dtypes are the manifest's and every value is finite."""
    check_fit(tensors, manifest, what)
    for spec in manifest.specs:
        check_finite(tensors[spec.name], f"{what}: {spec.name}")


def check_fit(tensors: Tensors, manifest: Manifest, what: str = "tensors") -> None:
    """Raises WireError unless names, order, shapes and dtypes are the manifest's."""
    if list(tensors) != manifest.names:
        odd = sorted(set(tensors) ^ set(manifest.names))[:3] or "another order"
        raise WireError(problem(f"{what}: names", f"the {len(manifest.specs)} of the manifest", odd))
    for spec in manifest.specs:
        array = tensors[spec.name]
        if array.shape != spec.shape:
            raise WireError(problem(f"{what}: shape of {spec.name}", spec.shape, array.shape))
        if array.dtype != DTYPES[spec.dtype]:
            raise WireError(problem(f"{what}: dtype of {spec.name}", spec.dtype, array.dtype))


def check_finite(array: Array, name: str) -> None:
    """Raises WireError, naming the first bad position, when `array` holds NaN or an infinity."""
    if array.dtype.kind in "iub":
        return
    with np.errstate(invalid="ignore"):  # bfloat16 passes through float32, where a signalling NaN warns
        finite = np.isfinite(array)
    if not finite.all():
        at = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise WireError(problem(name, "finite values", f"{float(array[at])} at {at}"))


def leaf_digest(name: str, array: Array) -> bytes:
    """SHA-256 of one named array: name, dtype, shape and little-endian bytes (32 bytes)."""
    return leaf_of(TensorSpec(name, array.shape, dtype_name(array)), [as_bytes(array)])


def leaf_of(spec: TensorSpec, pieces: Iterable[memoryview]) -> bytes:
    """`leaf_digest` of an array that comes as the bytes of one piece after another."""
    head = spec.name.encode()
    shape = struct.pack(f"<{1 + len(spec.shape)}Q", len(spec.shape), *spec.shape)
    sha = hashlib.sha256(_LEAF + struct.pack("<Q", len(head)) + head + spec.dtype.encode() + b"\0" + shape)
    for piece in pieces:
        sha.update(piece)
    return sha.digest()


def as_bytes(array: Array) -> memoryview:
    """Returns the bytes of `array` in C order; a view where it is contiguous already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def root_digest(leaves: Iterable[bytes]) -> str:
    """SHA-256 over leaf digests given in the order of their tensors' names (64 hex digits)."""
    return hashlib.sha256(_ROOT + b"".join(leaves)).hexdigest()


def public_names(names: Iterable[str]) -> list[str]:
    """Sorts the names of what clients receive, too; leaves out the coordinator's own."""
    return sorted(name for name in names if not name.startswith(PRIVATE))


def digest(tensors: Tensors, threads: int = 1) -> str:
    """SHA-256 of a whole bag but for its private part, whatever the order of its names (64 hex digits).

    Guarantees: a function of names, dtypes, shapes and values alone; the same on every machine and for any `threads`.
    """
    names = public_names(tensors)
    if threads == 1:
        return root_digest(leaf_digest(name, tensors[name]) for name in names)
    with ThreadPoolExecutor(threads) as pool:
        return root_digest(pool.map(lambda name: leaf_digest(name, tensors[name]), names))
