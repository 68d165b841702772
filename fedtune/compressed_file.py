"""The `.ternary` file: what training changed, with the names and shapes of it.

    8 bytes   FEDTERN1
    4 bytes   length of what follows, little-endian
    ...       JSON, deflated by zlib: {"tensors": [[name, dtype, shape], ...]}
    ...       the payload of `fedtune.codecs.ternary_format`, to the end of the file

A full fine-tune may hold singular vectors instead (`fedtune.codecs.spectral`): then the JSON has `"groups": [[vectors,
bits], ...]`, too, and the payload is theirs.

A few bytes can announce any number of zeros, so a reader says how many bytes it takes.
"""

import json
import zlib
from math import ceil, prod
from typing import Any

from fedtune.codecs.spectral import Spectral
from fedtune.codecs.ternary import Ternary
from fedtune.errors import ConfigError, WireError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, TensorSpec

MAGIC = b"FEDTERN1"
TERNARY = "weights.ternary"
GB = 1e9
_LARGE, _TIMES = 1 * GB, 1000  # an honest adapter is below the one, or shrinks less than the other says
_MAX_HEADER = 1 << 26
_MAX_ARRAY = 1 << 62
_MAX_GROUPS, _MAX_VECTORS = 16, 1 << 24


def write(tensors: Tensors, codec: Ternary | Spectral) -> bytes:
    """Returns the bytes of a `.ternary` file."""
    manifest = Manifest.of(tensors)
    about: dict[str, Any] = {"tensors": [[s.name, s.dtype, s.shape] for s in manifest.specs]}
    if isinstance(codec, Spectral):
        codec = codec.fitted(manifest)
        about["groups"] = codec.groups
    header = zlib.compress(json.dumps(about, separators=(",", ":")).encode(), 9)
    return b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *codec.encode(tensors, manifest)])


def declared(data: bytes) -> Manifest:
    """Returns what a file says it holds; raises WireError when it does not say it as `write` does."""
    return _opened(data)[0]


def read(data: bytes, most: float | None = None) -> dict[str, Array]:
    """Reads the bytes of a `.ternary` file.

    Args:
        data: the file.
        most: how many bytes the tensors may have; None for 1 GB, or 1000 times the file where that is more.

    Raises:
        WireError: `write` does not write such bytes, or there would be more than `most`.
    """
    manifest, codec, payload = _opened(data)
    limit = max(_LARGE, _TIMES * len(data)) if most is None else most
    if manifest.nbytes > limit:
        want, got = f"at most {limit / GB:.4g} GB", f"{manifest.nbytes / GB:.4g} GB in a file of {len(data)} bytes"
        remedy = f"If you trust it, make it plain: fedtune decompress DIR OUT --max-gb {ceil(manifest.nbytes / GB)}"
        raise WireError(problem(f"{TERNARY}: tensors", want, got, remedy))
    try:
        return codec.decode(payload, manifest)
    except MemoryError as error:
        raise WireError(problem(f"{TERNARY}: tensors", "what fits into memory", f"{manifest.nbytes} bytes")) from error


def _opened(data: bytes) -> tuple[Manifest, Ternary | Spectral, memoryview]:
    if data[:8] != MAGIC:
        raise WireError(problem(TERNARY, f"a file that begins with {MAGIC.decode()}", data[:8]))
    start = 12 + int.from_bytes(data[8:12], "little")
    return *_header(data[12:start]), memoryview(data)[start:]


def _header(header: bytes) -> tuple[Manifest, Ternary | Spectral]:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(header, _MAX_HEADER)
        if not inflater.eof or inflater.unused_data:
            raise ValueError("it is cut off, too long or followed by more")
        about = json.loads(text)
        specs = tuple(_spec(*entry) for entry in about["tensors"])
        codec = Spectral(groups=_groups(about["groups"])) if "groups" in about else Ternary()
    except (zlib.error, ValueError, TypeError, KeyError, RecursionError, ConfigError) as error:
        remedy = "The file is damaged: compress or fetch it again"
        raise WireError(problem(f"{TERNARY}: header", "a list of names, dtypes and shapes", error, remedy)) from error
    if len({spec.name for spec in specs}) != len(specs):
        raise WireError(problem(f"{TERNARY}: header", "each name once", "a name twice"))
    return Manifest(specs), codec


def _groups(groups: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(groups, list) or len(groups) > _MAX_GROUPS:
        raise ValueError("groups")
    pairs = tuple((count, bits) for count, bits in groups)
    if not all(type(n) is int and n < _MAX_VECTORS for pair in pairs for n in pair):
        raise ValueError("groups")
    return pairs


def _spec(name: Any, dtype: Any, shape: Any) -> TensorSpec:
    whole = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
    if not isinstance(name, str) or not whole or len(shape) > 8 or dtype not in DTYPES:
        raise ValueError(f"entry {str([name, dtype, shape])[:80]}")
    if prod(n or 1 for n in shape) > _MAX_ARRAY // DTYPES[dtype].itemsize:  # numpy refuses such, even without values
        raise ValueError(f"shape {shape}")
    if name == "__metadata__":
        raise ValueError(f"name {name!r}, which safetensors keeps for itself")
    name.encode()  # half a surrogate pair is no name that a file can have
    return TensorSpec(name, tuple(shape), dtype)
