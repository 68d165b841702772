"""The shared state on disk: each version writes only the tensors that changed, and every tensor proves itself."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedtune.errors import StorageError, problem
from fedtune.tensors import DTYPES, Array, Tensors, leaf_digest, root_digest
from fedtune_server.blobs import Blobs
from fedtune_server.records import VersionRow

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"} | {
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}


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
    blob = blobs.put(save({name: np.ascontiguousarray(array) for name, array in changed.items()})) if changed else ""
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
    return root_digest(bytes.fromhex(leaves[name]) for name in sorted(leaves))


def _read(blobs: Blobs, digest: str) -> dict[str, Array]:
    try:
        # safetensors.numpy does not read bfloat16; its own parser, which carries no types, does.
        items = deserialize(bytes(blobs.load(digest)))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise StorageError(problem(str(blobs.folder / digest), "a safetensors file", error)) from error
    return {name: _array(item) for name, item in items}


def _array(item: Mapping[str, object]) -> Array:
    data, shape, kind = item["data"], item["shape"], item["dtype"]
    if not isinstance(data, bytes | bytearray) or not isinstance(shape, list) or kind not in _DTYPES:
        raise StorageError(problem("version", "a tensor of fedtune", kind))
    return np.frombuffer(data, np.uint8).view(DTYPES[_DTYPES[str(kind)]]).reshape(shape)
