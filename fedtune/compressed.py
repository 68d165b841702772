"""Compressed adapters and fine-tunes on disk: a folder whose weights are one `.ternary` file.

The file holds what training changed: an adapter's weights themselves (LoRA), their distance from one (IA3), or from a
base model's weights (a full fine-tune).

    8 bytes   FEDTERN1
    4 bytes   length of what follows, little-endian
    ...       JSON, deflated by zlib: {"tensors": [[name, dtype, shape], ...]}
    ...       the payload of `fedtune.codecs.ternary_format`, to the end of the file

A full fine-tune may hold singular vectors instead (`fedtune.codecs.spectral`): then the JSON has `"groups": [[vectors,
bits], ...]`, too, and the payload is theirs.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtune.balance import balance
from fedtune.codecs.spectral import Spectral
from fedtune.codecs.ternary import Ternary
from fedtune.errors import ConfigError, ModelError, StorageError, WireError, problem
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, TensorSpec, check
from fedtune.weights import save_weights

MAGIC = b"FEDTERN1"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TERNARY = "weights.ternary"
_MAX_HEADER = 1 << 26
_MAX_BYTES = 1 << 36
_MAX_GROUPS, _MAX_VECTORS = 16, 1 << 24


@dataclass(frozen=True, slots=True)
class Sizes:
    """What compression came to: values, bytes before and after."""

    values: int
    before: int
    after: int


def compress(
    source: Path, target: Path, codec: Ternary | Spectral, *, base: Path | None = None, balanced: bool = True
) -> Sizes:
    """Writes a compressed copy of a PEFT LoRA or IA3 adapter, or of a full fine-tune of `base`, to a new folder.

    Args:
        source: a PEFT adapter folder, or a model folder with safetensors.
        target: the folder to write.
        codec: density, alpha and scale; or groups of singular vectors, for a full fine-tune.
        base: the model that was fine-tuned; None for an adapter.
        balanced: bring LoRA factors into balance first (see `fedtune.balance`).

    Raises:
        ModelError: `source` is neither, or is damaged.
        WireError: a value is not finite.
        ConfigError: `target` is not empty, or the codec is not for an adapter.
    """
    if isinstance(codec, Spectral) and base is None:
        raise ConfigError(problem("--codec", "ternary for an adapter", "one of singular vectors, which it is already"))
    weights = load_weights(source)
    change = difference(source, weights, base)
    check(change, Manifest.of(change), str(source))
    if balanced:
        change = balance_lora(change)
    data = write(change, codec)
    new_folder(target)
    _copy_rest(source, target)
    _save(target / TERNARY, lambda file: file.write_bytes(data))
    return Sizes(sum(a.size for a in weights.values()), sum(a.nbytes for a in weights.values()), len(data))


def decompress(source: Path, target: Path, *, base: Path | None = None) -> None:
    """Writes what `compress` left of an adapter or a fine-tune as plain safetensors, to a new folder.

    Raises:
        WireError: the file is damaged or hostile.
        ModelError: there is no such file, or `base` is missing or does not fit.
        ConfigError: `target` is not empty.
    """
    weights = restore(source, base)
    new_folder(target)
    _copy_rest(source, target)
    name = WEIGHTS if (source / CONFIG).exists() else "model.safetensors"
    _save(target / name, lambda file: save_weights(file, weights, {"format": "pt"}))


@contextmanager
def plain(folder: Path) -> Iterator[Path]:
    """Opens an adapter folder for readers of PEFT's files: itself, or for a compressed one a plain copy for a while."""
    if not (folder / TERNARY).exists():
        yield folder
        return
    with TemporaryDirectory() as place:
        decompress(folder, Path(place))
        yield Path(place)


def save_merged(like: Path, target: Path, change: Tensors) -> None:
    """Writes what training changed as an adapter with the configuration of `like`, to a new folder."""
    weights = _added(change, _reference(like, change, None))
    new_folder(target)
    _copy_rest(like, target)
    _save(target / WEIGHTS, lambda file: save_weights(file, weights, {"format": "pt"}))


def restore(source: Path, base: Path | None = None) -> dict[str, Array]:
    """Returns the weights of a compressed folder."""
    change = read(_bytes(source / TERNARY))
    return _added(change, _reference(source, change, base))


def load_weights(folder: Path) -> dict[str, Array]:
    """Reads the weights of a PEFT folder, of a model folder, or of a compressed adapter; raises ModelError."""
    if (folder / TERNARY).exists():
        return restore(folder)
    files = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else sorted(folder.glob("model*.safetensors"))
    if not files:
        want = f"a folder with {WEIGHTS}, model.safetensors or {TERNARY}"
        raise ModelError(problem(str(folder), want, "none of them", "Make one of a run with fedtune export"))
    try:
        return {name: array for file in files for name, array in load_file(file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(problem(str(folder), "weights in safetensors", error)) from error


def difference(source: Path, weights: Tensors, base: Path | None) -> dict[str, Array]:
    """Returns what training changed, in the dtypes of `weights`."""
    reference = _reference(source, weights, base)
    return {
        name: np.asarray(array.astype(np.float64) - reference[name]).astype(array.dtype) if name in reference else array
        for name, array in weights.items()
    }


def balance_lora(weights: Tensors) -> dict[str, Array]:
    """Balances every pair of two-dimensional LoRA factors among PEFT's names."""
    out = dict(weights)
    for a in (name for name in weights if ".lora_A." in name):
        b = a.replace(".lora_A.", ".lora_B.")
        if b in weights and weights[a].ndim == weights[b].ndim == 2:
            out[a], out[b] = balance(weights[a], weights[b])
    return out


def write(tensors: Tensors, codec: Ternary | Spectral) -> bytes:
    """Returns the bytes of a `.ternary` file."""
    manifest = Manifest.of(tensors)
    about: dict[str, Any] = {"tensors": [[s.name, s.dtype, s.shape] for s in manifest.specs]}
    if isinstance(codec, Spectral):
        about["groups"] = codec.groups
    header = zlib.compress(json.dumps(about, separators=(",", ":")).encode(), 9)
    return b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *codec.encode(tensors, manifest)])


def read(data: bytes) -> dict[str, Array]:
    """Reads the bytes of a `.ternary` file; raises WireError on any that `write` does not write."""
    if data[:8] != MAGIC:
        raise WireError(problem(TERNARY, f"a file that begins with {MAGIC.decode()}", data[:8]))
    start = 12 + int.from_bytes(data[8:12], "little")
    manifest, codec = _header(data[12:start])
    if manifest.nbytes > _MAX_BYTES:
        raise WireError(problem(f"{TERNARY}: tensors", f"at most {_MAX_BYTES} bytes", manifest.nbytes))
    try:
        return codec.decode(memoryview(data)[start:], manifest)
    except MemoryError as error:
        raise WireError(problem(f"{TERNARY}: tensors", "what fits into memory", f"{manifest.nbytes} bytes")) from error


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
        raise WireError(problem(f"{TERNARY}: header", "a list of names, dtypes and shapes", error)) from error
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
    return TensorSpec(name, tuple(shape), dtype)


def _reference(source: Path, weights: Tensors, base: Path | None) -> dict[str, Array]:
    """Returns what weights are measured from, where that is not zero; float64 or the base's dtype."""
    if (source / CONFIG).exists():
        if base is not None:
            raise ConfigError(problem("--base", "none for an adapter", base))
        ones = _kind(source) == "IA3"
        return {name: np.ones(array.shape) for name, array in weights.items() if ones and "ia3_l" in name}
    if base is None:
        remedy = "Give the model it was fine-tuned from with --base"
        raise ModelError(problem(str(source), f"an adapter with {CONFIG}", "a model", remedy))
    theirs = load_weights(base)
    for name, array in weights.items():
        if name not in theirs or theirs[name].shape != array.shape:
            raise ModelError(
                problem(f"{base}: {name}", f"shape {array.shape}", theirs[name].shape if name in theirs else "none")
            )
    return {name: theirs[name].astype(np.float64) for name in weights}


def _added(change: Tensors, reference: Tensors) -> dict[str, Array]:
    return {
        name: np.asarray(array.astype(np.float64) + reference[name]).astype(array.dtype) if name in reference else array
        for name, array in change.items()
    }


def _kind(folder: Path) -> str:
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind = str(config.get("peft_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(problem(str(folder / CONFIG), "a PEFT configuration", error)) from error
    if kind not in ("LORA", "IA3"):
        raise ModelError(problem(f"{folder}: peft_type", "LORA or IA3", kind))
    return kind


def new_folder(target: Path) -> None:
    """Makes a folder to write; raises ConfigError when something is there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(problem(str(target), "a new or empty folder", "something is there"))
    _save(target, lambda folder: folder.mkdir(parents=True, exist_ok=True))


def _copy_rest(source: Path, target: Path) -> None:
    """Copies configuration and tokenizer, not weights."""

    def copy(files: Iterable[Path]) -> None:
        for file in files:
            shutil.copyfile(file, target / file.name)

    names = [
        f
        for f in sorted(source.iterdir())
        if f.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in f.name
    ]
    _save(target, lambda _: copy(names))


def _save(path: Path, action: Callable[[Path], object]) -> None:
    try:
        action(path)
    except OSError as error:
        raise StorageError(problem(str(path), "a place that can be written", error.strerror)) from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(problem(str(file), "a compressed adapter", error.strerror)) from error
