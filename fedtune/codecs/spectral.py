"""Full fine-tunes as few singular vectors: leading ones in more bits, later ones in fewer.

    D ~ U S V^T        B = U sqrt(S) (O, r),  A = sqrt(S) V^T (r, I)        by the SVD of each matrix's change D

With 16 bits for all it is ERE, the low-rank residual (Ryu, Seo and Yoo 2023, arXiv 2305.18425); with fewer bits for
later vectors it is mixed precision after Delta-CoMe (Ping et al. 2024, arXiv 2406.08903), which goes down to 2 bits
with GPTQ where we stop at 4 with plain rounding. What is no matrix travels in bfloat16, integers as they are.

Bytes: the parts that are no matrix, then the groups of vectors from the leading one on; each part is written by
`narrow.py` or `blocks.py`, whose sizes are known beforehand, so nothing lies between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fedtune.blas import one_thread
from fedtune.codecs.blocks import Blocks
from fedtune.codecs.codec import Codec
from fedtune.codecs.narrow import Narrow
from fedtune.codecs.reader import Reader
from fedtune.errors import ConfigError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, TensorSpec, check

Group: TypeAlias = tuple[int, int]
_CODERS: dict[int, Codec] = {16: Narrow(), 8: Blocks(bits=8), 4: Blocks(bits=4)}
_WIDE = np.float64
_ROWS = 16  # at a time: what they and their products take stays in the cache


@dataclass(frozen=True, kw_only=True)
class Spectral:
    """Leading singular vectors in groups.

    Attributes:
        groups: from the leading vector on, how many vectors and with how many bits (16, 8 or 4).
    """

    groups: tuple[Group, ...] = ((2, 8), (30, 4))

    def __post_init__(self) -> None:
        if not self.groups or any(count < 1 or bits not in _CODERS for count, bits in self.groups):
            raise ConfigError(problem("groups", "counts of at least 1, with 16, 8 or 4 bits", self.groups))

    def encode(self, tensors: Tensors, manifest: Manifest) -> Iterator[memoryview | bytes]:
        """Yields the parts.

        Raises:
            WireError: `tensors` do not fit `manifest`, or hold a value that is not finite.
        """
        check(tensors, manifest, "update")
        values = {spec.name: tensors[spec.name] for spec in manifest.specs if not _is_matrix(spec)}
        for spec in manifest.specs:
            if _is_matrix(spec):
                values |= self._vectors(spec.name, tensors[spec.name].astype(_WIDE))
        for coder, part in self._parts(manifest):
            yield from coder.encode({name: values[name] for name in part.names}, part)

    def decode(self, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Multiplies the vectors out; raises WireError on any bytes that are not exactly the parts."""
        reader, values = Reader(payload, self.largest(manifest)), dict[str, Array]()
        for number, (coder, part) in enumerate(self._parts(manifest)):
            values |= coder.decode(reader.take(coder.largest(part), f"part {number}"), part)
        reader.end()
        return {
            spec.name: self._product(spec, values) if _is_matrix(spec) else values[spec.name] for spec in manifest.specs
        }

    def largest(self, manifest: Manifest) -> int:
        """Returns the size of every payload for `manifest`."""
        return sum(coder.largest(part) for coder, part in self._parts(manifest))

    def fitted(self, manifest: Manifest) -> "Spectral":
        """Returns the same codec, with the same payloads, without vectors that no matrix of `manifest` has."""
        left, groups = max((min(spec.shape) for spec in manifest.specs if _is_matrix(spec)), default=1), list[Group]()
        for count, bits in self.groups:
            if left > 0:
                groups.append((min(count, left), bits))
            left -= count
        return Spectral(groups=tuple(groups))

    def _parts(self, manifest: Manifest) -> list[tuple[Codec, Manifest]]:
        """Lists what is written with what, in order."""
        parts = [(_CODERS[16], Manifest(tuple(spec for spec in manifest.specs if not _is_matrix(spec))))]
        first = 0
        for count, bits in self.groups:
            specs = [
                TensorSpec(f"{spec.name}/{side}{first}", (shown, width), "float32")
                for spec in manifest.specs
                if _is_matrix(spec)
                for shown in [min(count, min(spec.shape) - first)]
                if shown > 0
                for side, width in (("A", spec.shape[1]), ("B", spec.shape[0]))
            ]
            parts.append((_CODERS[bits], Manifest(tuple(specs))))
            first += count
        return parts

    def _vectors(self, name: str, matrix_oi: Array) -> dict[str, Array]:
        """Returns the groups' rows of A and columns of B, both (vectors, width)."""
        with one_thread():
            u, s, v = np.linalg.svd(matrix_oi, full_matrices=False)
        a, b = np.sqrt(s)[:, None] * v, (u * np.sqrt(s)).T
        found, first = dict[str, Array](), 0
        for count, _ in self.groups:
            for side, rows in (("A", a), ("B", b)):
                found[f"{name}/{side}{first}"] = rows[first : first + count].astype(np.float32)
            first += count
        return found

    def _product(self, spec: TensorSpec, values: Tensors) -> Array:
        out, first = np.zeros(spec.shape, _WIDE), 0
        for count, _ in self.groups:
            if f"{spec.name}/A{first}" in values:
                a, b = (values[f"{spec.name}/{side}{first}"].astype(_WIDE) for side in "AB")
                _add_product(out, a, b)
            first += count
        return out.astype(DTYPES[spec.dtype])


def _add_product(out: Array, a: Array, b: Array) -> None:
    """Adds the products of columns of B and rows of A one after another, so that every machine has the same bits."""
    for start in range(0, len(out), _ROWS):
        rows = slice(start, start + _ROWS)
        for row, column in zip(a, b, strict=True):
            out[rows] += column[rows, None] * row


def ere(rank: int) -> Spectral:
    """ERE: the leading `rank` singular vectors in 16 bits."""
    return Spectral(groups=((rank, 16),))


def delta_come(rank: int) -> Spectral:
    """Mixed precision: the two leading vectors in 8 bits, the others up to `rank` in 4."""
    return Spectral(groups=((min(rank, 2), 8), *(((rank - 2, 4),) if rank > 2 else ())))


def _is_matrix(spec: TensorSpec) -> bool:
    return len(spec.shape) == 2 and min(spec.shape) > 0 and spec.dtype not in ("int64", "int32", "uint8")
