"""A base model on disk as the coordinator sees it: names, shapes and a fingerprint, read without torch.

The fingerprint hashes the weights as stored, tensor by tensor, so it does not depend on how they are spread over
files, and two machines agree on it exactly when they start from the same numbers.
"""

import hashlib
import json
import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import ModelError, problem
from fedtune.method import BaseModel
from fedtune.tensors import Manifest, TensorSpec, root_digest

_MAX_HEADER = 100 * 2**20
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
}
_CONV1D = ("gpt2", "openai-gpt")
# Checkpoints whose names lack the prefix that the loaded model has.
_PREFIX = {"gpt2": "transformer."}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor in one file: where its bytes are."""

    spec: TensorSpec
    file: Path
    start: int
    end: int


def open_base(folder: Path, name: str = "") -> BaseModel:
    """Reads a folder of safetensors files.

    Args:
        folder: holds `config.json` and `*.safetensors`.
        name: what to call the model in reports and adapters; the folder's path when empty.

    Raises:
        ModelError: the folder is missing, holds no safetensors, or a file is damaged.
    """
    config = _config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            problem(
                str(folder),
                "*.safetensors files",
                "none",
                "Other formats: convert with transformers' save_pretrained",
            )
        )
    entries = {entry.spec.name: entry for file in files for entry in _entries(file)}
    prefix = _PREFIX.get(config.get("model_type", ""), "")
    lacks = prefix and not any(entry.startswith(prefix) for entry in entries)
    ordered = [entries[entry] for entry in sorted(entries)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digest = root_digest(pool.map(_leaf, ordered))
    specs = (TensorSpec((prefix if lacks else "") + e.spec.name, e.spec.shape, e.spec.dtype) for e in ordered)
    return BaseModel(name or str(folder), Manifest(tuple(specs)), digest, config.get("model_type") in _CONV1D)


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ModelError(problem(str(folder), "a model folder with config.json", error)) from error


def _entries(file: Path) -> list[_Entry]:
    """Parses one header: 8 bytes of length, JSON, then the data."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [_entry(file, 8 + length, name, item) for name, item in header.items()]
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(problem(str(file), "a safetensors file", error)) from error


def _entry(file: Path, data: int, name: str, item: dict[str, Any]) -> _Entry:
    spec = TensorSpec(name, tuple(item["shape"]), _DTYPES[item["dtype"]])
    start, end = item["data_offsets"]
    if end - start != spec.nbytes or data + end > file.stat().st_size:
        raise ValueError(f"{name} is cut short")
    return _Entry(spec, file, data + start, data + end)


def _leaf(entry: _Entry) -> bytes:
    head = f"{entry.spec.name}\0{entry.spec.dtype}\0{entry.spec.shape}\0".encode()
    sha = hashlib.sha256(head)
    if entry.end > entry.start:
        with (
            entry.file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as data,
        ):
            sha.update(data[entry.start : entry.end])
    return sha.digest()
