"""The bytes of ternary codes.

Version 1. LEB128 numbers, little-endian values; "in order" is the manifest's order.

    1 byte     1, the version
    1 byte     flags: 1 = a scale for each tensor, 0 = one for all
    numbers    how many values of each tensor are kept, for tensors of a floating dtype, in order
    scales     one float64; or for each tensor that keeps any, in order, one value of its own dtype
    gaps       length in bytes, raw DEFLATE stream (`gaps.py`)      for all tensors that keep less than 3 in 10
    low bits   of each gap of tensors that keep less than 1 in 64   "
    signs      one bit for each gap                                 "
    trits      length in bytes, raw DEFLATE stream (`trits.py`)     for those that keep 3 in 10 and more
    values     tensors of an integer dtype as they are, in order

Each section takes its tensors from the lowest share kept to the highest (equal shares in order), so that Huffman codes,
which are renewed where it pays, meet one density at a time; bits fill bytes from the lowest, without stopping between
tensors. A section whose tensors keep nothing is left out. A payload must be used up exactly; unused bits and trits are
0. Any raw DEFLATE stream of the right bytes is read: which one is written (`deflate.py`) is no part of the format.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import isfinite

import numpy as np

from fedtune.codecs import gaps, trits
from fedtune.codecs.reader import Reader, varint
from fedtune.codecs.signs import Code, size_of
from fedtune.errors import WireError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, TensorSpec, as_bytes

VERSION = 1
DENSE = Fraction(3, 10)
"""Share of kept values from which a tensor is written as trits."""
_SCALE_EACH = 1
_FLOAT64 = DTYPES["float64"]
_LOOSE = {"int64", "int32", "uint8"}


def pack(codes: Sequence[Code], tensors: Tensors, manifest: Manifest, each: bool) -> Iterator[memoryview | bytes]:
    """Writes codes, one for each floating tensor of `manifest`, in order; `tensors` hold the integer ones.

    Raises:
        WireError: a scale does not fit the dtype of its tensor.
    """
    yield bytes([VERSION, _SCALE_EACH if each else 0]) + b"".join(varint(code.count) for code in codes)
    yield _pack_scales(codes, each)
    few, many = _by_density([code.count for code in codes], [code.spec for code in codes])
    if few:
        pairs = [codes[i].sparse() for i in few]
        yield gaps.encode([size_of(codes[i].spec) for i in few], [pair[0] for pair in pairs])
        yield gaps.encode_signs(np.concatenate([pair[1] for pair in pairs]))
    if many:
        yield trits.encode([codes[i].dense() for i in many])
    for spec in manifest.specs:
        if spec.dtype in _LOOSE:
            yield as_bytes(tensors[spec.name])


def unpack(payload: memoryview | bytes, manifest: Manifest) -> tuple[list[Code], dict[str, Array]]:
    """Reads what `pack` wrote: the codes of the floating tensors, and the integer tensors.

    Raises:
        WireError: the bytes are not exactly such a payload. Memory stays within a few times that of `manifest`.
    """
    reader, specs = Reader(payload, largest(manifest)), floating(manifest)
    version, flags = reader.take(2, "head")
    if version != VERSION or flags > _SCALE_EACH:
        raise WireError(problem("head", f"version {VERSION} and flags 0 or 1", f"{version} and {flags}"))
    counts = [reader.varint(size_of(spec), f"kept values of {spec.name}") for spec in specs]
    scales = _read_scales(reader, specs, counts, bool(flags))
    few, many = _by_density(counts, specs)
    codes: dict[int, Code] = {}
    codes |= _read_gaps(reader, specs, counts, scales, few)
    codes |= _read_trits(reader, specs, counts, scales, many)
    loose = {s.name: _loose(reader, s) for s in manifest.specs if s.dtype in _LOOSE}
    reader.end()
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int8)
    empty = {i: Code(spec, 0, scales[i], nothing[1], nothing[0]) for i, spec in enumerate(specs) if not counts[i]}
    return [(codes | empty)[i] for i in range(len(specs))], loose


def largest(manifest: Manifest) -> int:
    """Returns the most bytes a payload for `manifest` can have: all tensors just below 3 in 10, nothing compressed."""
    values = sum(size_of(spec) for spec in floating(manifest))
    loose = sum(spec.nbytes for spec in manifest.specs if spec.dtype in _LOOSE)
    return 1024 + 32 * len(manifest.specs) + 2 * values // 5 + loose


def floating(manifest: Manifest) -> list[TensorSpec]:
    """Lists the tensors that are compressed, in order."""
    return [spec for spec in manifest.specs if spec.dtype not in _LOOSE]


def _by_density(counts: Sequence[int], specs: Sequence[TensorSpec]) -> tuple[list[int], list[int]]:
    """Splits the tensors that keep anything into those for gaps and those for trits, each from sparse to dense."""
    share = {i: Fraction(count, size_of(specs[i])) for i, count in enumerate(counts) if count}
    order = sorted(share, key=lambda i: share[i])  # stable: equal shares stay in order
    return [i for i in order if share[i] < DENSE], [i for i in order if share[i] >= DENSE]


def _pack_scales(codes: Sequence[Code], each: bool) -> bytes:
    kept = [code for code in codes if code.count]
    for code in kept:
        _check_scale(code.spec, code.scale)
    if not each:
        return np.array([kept[0].scale if kept else 0.0], _FLOAT64).tobytes()
    return b"".join(np.array([code.scale]).astype(DTYPES[code.spec.dtype]).tobytes() for code in kept)


def _read_scales(reader: Reader, specs: Sequence[TensorSpec], counts: Sequence[int], each: bool) -> list[float]:
    if not each:
        one = float(reader.array(_FLOAT64, 1, "scale")[0])
        scales = [one if count else 0.0 for count in counts]
    else:
        scales = [
            float(reader.array(DTYPES[spec.dtype], 1, f"scale of {spec.name}")[0]) if count else 0.0
            for spec, count in zip(specs, counts, strict=True)
        ]
    for spec, scale in zip(specs, scales, strict=True):
        _check_scale(spec, scale)
    return scales


def _check_scale(spec: TensorSpec, scale: float) -> None:
    """Raises WireError unless a scale is at least 0 and finite in the tensor's dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = float(np.asarray(scale).astype(DTYPES[spec.dtype]))
    if not (isfinite(rounded) and scale >= 0):
        raise WireError(problem(f"scale of {spec.name}", f"a finite {spec.dtype} of at least 0", scale))


def _read_gaps(
    reader: Reader, specs: Sequence[TensorSpec], counts: Sequence[int], scales: Sequence[float], few: Sequence[int]
) -> dict[int, Code]:
    if not few:
        return {}
    kept = [counts[i] for i in few]
    places = gaps.decode(reader, [size_of(specs[i]) for i in few], kept)
    signs = np.split(gaps.decode_signs(reader, sum(kept)), np.cumsum(kept)[:-1])
    return {i: Code(specs[i], counts[i], scales[i], s, p) for i, s, p in zip(few, signs, places, strict=True)}


def _read_trits(
    reader: Reader, specs: Sequence[TensorSpec], counts: Sequence[int], scales: Sequence[float], many: Sequence[int]
) -> dict[int, Code]:
    if not many:
        return {}
    parts = trits.decode(reader, [size_of(specs[i]) for i in many])
    if [int(np.count_nonzero(part)) for part in parts] != [counts[i] for i in many]:
        raise WireError(problem("trits", "as many values as announced for each tensor", "others"))
    return {i: Code(specs[i], counts[i], scales[i], part) for i, part in zip(many, parts, strict=True)}


def _loose(reader: Reader, spec: TensorSpec) -> Array:
    return reader.array(DTYPES[spec.dtype], size_of(spec), spec.name).reshape(spec.shape)
