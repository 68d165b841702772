"""The plain codec: tensors as little-endian bytes, one after another in manifest order, with nothing in between.

No header travels. The receiver holds the manifest already, so length, names, shapes and dtypes are known and checked
before any value is looked at. Widths are chosen by the method's `dtype`: float32, bfloat16 or float16.
"""

from collections.abc import Iterator

import numpy as np

from fedtune.errors import WireError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, as_bytes, check, check_finite


def encode(tensors: Tensors, manifest: Manifest) -> Iterator[memoryview]:
    """Yields the bytes of each tensor in manifest order, without copying contiguous ones.

    Raises:
        WireError: `tensors` do not fit `manifest`, or hold a value that is not finite.
    """
    check(tensors, manifest, "update")
    for spec in manifest.specs:
        yield as_bytes(tensors[spec.name])


def decode(payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
    """Returns read-only views into `payload`, one per spec of `manifest`.

    Raises:
        WireError: the length is not exactly the manifest's, or a value is not finite.
    """
    view = memoryview(payload).cast("B")
    if view.nbytes != manifest.nbytes:
        raise WireError(problem("payload", f"exactly {manifest.nbytes} bytes", f"{view.nbytes} bytes"))
    tensors: dict[str, Array] = {}
    offset = 0
    for spec in manifest.specs:
        array = np.frombuffer(view[offset : offset + spec.nbytes], np.uint8).view(DTYPES[spec.dtype])
        array = array.reshape(spec.shape)
        array.flags.writeable = False
        check_finite(array, f"payload: {spec.name}")
        tensors[spec.name] = array
        offset += spec.nbytes
    return tensors


def largest(manifest: Manifest) -> int:
    """Returns the size of every payload for `manifest`."""
    return manifest.nbytes
