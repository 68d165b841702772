"""The shared state on disk: each version writes only the tensors that changed, and every tensor proves itself."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.errors import StorageError, problem
from fedtune.stored import CODE_OF_NAME, NAME_OF_CODE
from fedtune.tensors import DTYPES, Array, Tensors, as_bytes, dtype_name, leaf_digest, public_names, root_digest
from fedtune_server.blobs import Blobs
from fedtune_server.records import VersionRow


@dataclass(frozen=True)
class Version:
    """One immutable version of the state, with the record of where its tensors lie."""

    number: int
    state: Tensors
    row: VersionRow

    @property
    def digest(self) -> str:
        """SHA-256 of the state."""
        return self.row.digest


def save_version(blobs: Blobs, number: int, state: Tensors, before: Version | None) -> Version:
    """Writes the tensors that `before` does not hold, durably; the row is left to the caller.

    Raises:
        StorageError: the disk refused.
    """
    old = before.row.tensors if before else {}
    leaves = {name: _leaf(name, array, before) for name, array in state.items()}
    changed = {name: array for name, array in state.items() if name not in old or old[name][1] != leaves[name]}
    blob = blobs.put(_safetensors(changed)) if changed else ""
    where = {name: (blob if name in changed else old[name][0], leaves[name]) for name in state}
    return Version(number, state, VersionRow(number, _root(leaves), where))


def load_version(blobs: Blobs, row: VersionRow) -> Version:
    """Reads a version back; raises StorageError when a blob is missing or damaged."""
    loaded: dict[str, Tensors] = {blob: _read(blobs, blob) for blob in {blob for blob, _ in row.tensors.values()}}
    state: dict[str, Array] = {}
    for name, (blob, leaf) in row.tensors.items():
        array = loaded[blob].get(name)
        if array is None or leaf_digest(name, array).hex() != leaf:
            raise StorageError(problem(f"{name} of version {row.version}", f"SHA-256 {leaf}", "other values"))
        state[name] = array
    return Version(row.version, state, row)


def _leaf(name: str, array: Array, before: Version | None) -> str:
    """Digest of one tensor; an array taken over unchanged from the version before is not read again."""
    if before and before.state.get(name) is array:
        return before.row.tensors[name][1]
    return leaf_digest(name, array).hex()


def _root(leaves: Mapping[str, str]) -> str:
    return root_digest(bytes.fromhex(leaves[name]) for name in public_names(leaves))


def _safetensors(tensors: Mapping[str, Array]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file without holding it: length of the header, header, then the arrays' own memory.

    Wide types come first, so that every array starts at a multiple of its item size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    offset = 0
    for name in order:
        array = tensors[name]
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": CODE_OF_NAME[dtype_name(array)], "shape": array.shape, "data_offsets": span}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield as_bytes(tensors[name])


def _read(blobs: Blobs, digest: str) -> dict[str, Array]:
    """Returns arrays that are views of the mapped file."""
    view = blobs.load(digest)
    try:
        (length,) = struct.unpack("<Q", view[:8])
        header = json.loads(bytes(view[8 : 8 + length]))
        return {name: _array(view[8 + length :], item) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise StorageError(problem(str(blobs.folder / digest), "a safetensors file", error)) from error


def _array(data: memoryview, item: Mapping[str, Any]) -> Array:
    start, end = item["data_offsets"]
    array = np.frombuffer(data[start:end], np.uint8).view(DTYPES[NAME_OF_CODE[item["dtype"]]]).reshape(item["shape"])
    array.flags.writeable = False
    return array
