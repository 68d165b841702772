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

from safetensors import SafetensorError, safe_open

from fedtune.errors import ModelError, problem
from fedtune.method import BaseModel
from fedtune.stored import NAME_OF_CODE
from fedtune.tensors import Manifest, TensorSpec, root_digest

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
        folder: holds `config.json` and the weights: `model.safetensors`, or the files that
            `model.safetensors.index.json` lists, or else every `*.safetensors`.
        name: what to call the model in reports and adapters; the folder's path when empty.

    Raises:
        ModelError: the folder is missing, holds no safetensors, a file is missing or damaged, or two files hold
            the same tensor.
    """
    config = _config(folder)
    kind = str(config.get("model_type"))
    entries: dict[str, _Entry] = {}
    for entry in (entry for file in _files(folder) for entry in _entries(file)):
        if entry.spec.name in entries:
            other = entries[entry.spec.name].file.name
            raise ModelError(problem(str(entry.file), f"tensors that {other} lacks", entry.spec.name))
        entries[entry.spec.name] = entry
    prefix = _PREFIX.get(kind, "")
    lacks = prefix and not any(entry.startswith(prefix) for entry in entries)
    ordered = [entries[entry] for entry in sorted(entries)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digest = root_digest(pool.map(_leaf, ordered))
    specs = (TensorSpec((prefix if lacks else "") + e.spec.name, e.spec.shape, e.spec.dtype) for e in ordered)
    return BaseModel(name or str(folder), Manifest(tuple(specs)), digest, kind in _CONV1D)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"a config.json that holds {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(problem(str(folder), "a model folder with config.json", error)) from error
    return config


def _files(folder: Path) -> list[Path]:
    """Lists the files that transformers would load, in the same order of preference."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        try:
            return sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(problem(str(index), "an index of safetensors files", error)) from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "Other formats: convert with transformers' save_pretrained"
        raise ModelError(problem(str(folder), "*.safetensors files", "none", remedy))
    return files


def _entries(file: Path) -> list[_Entry]:
    """Reads one header (8 bytes of length, then JSON) after the safetensors library has found the file sound."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [_entry(file, 8 + length, name, item) for name, item in header.items()]
    except KeyError as error:
        raise ModelError(problem(str(file), f"tensors of {', '.join(NAME_OF_CODE)}", error)) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(problem(str(file), "a safetensors file", error)) from error


def _entry(file: Path, data: int, name: str, item: dict[str, Any]) -> _Entry:
    spec = TensorSpec(name, tuple(item["shape"]), NAME_OF_CODE[item["dtype"]])
    start, end = item["data_offsets"]
    return _Entry(spec, file, data + start, data + end)


def _leaf(entry: _Entry) -> bytes:
    head = json.dumps([entry.spec.name, entry.spec.dtype, entry.spec.shape])
    sha = hashlib.sha256(head.encode() + b"\0")
    if entry.end > entry.start:
        with (
            entry.file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view,
            memoryview(view) as data,
        ):
            sha.update(data[entry.start : entry.end])
    return sha.digest()
