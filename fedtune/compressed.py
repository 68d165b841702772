"""Compressed adapters and fine-tunes on disk: a folder whose weights are one `.ternary` file (`compressed_file.py`).

The file holds what training changed: an adapter's weights themselves (LoRA), their distance from one (IA3), or from a
base model's weights (a full fine-tune). Integers are compared as integers, in which no digit is lost.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtune.codecs.spectral import Spectral
from fedtune.codecs.ternary import Ternary
from fedtune.compressed_file import GB, MAGIC, TERNARY, declared, read, write
from fedtune.errors import ConfigError, ModelError, problem
from fedtune.peft_weights import CONFIG, balance_lora, check_adapter, read_config
from fedtune.tensors import Array, Manifest, Tensors, check, dtype_name
from fedtune.weights import save_weights
from fedtune.whole_folder import check_new, whole_folder

WEIGHTS = "adapter_model.safetensors"


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
        ModelError: `source` is neither, is damaged, or holds tensors that are not measured from zero or from a base.
        WireError: a value is not finite, or a dtype is not carried.
        ConfigError: `target` is not empty, or the codec is not for an adapter.
        StorageError: `target` cannot be written; nothing of it is left.
    """
    if isinstance(codec, Spectral) and base is None:
        raise ConfigError(problem("--codec", "ternary for an adapter", "one of singular vectors, which it is already"))
    check_new(target)
    weights = compressible(source)
    change = difference(source, weights, base)
    check(change, Manifest.of(change), str(source))
    if balanced and base is None:
        change = balance_lora(change)
    data = write(change, codec)
    with whole_folder(target) as draft:
        _copy_rest(source, draft)
        (draft / TERNARY).write_bytes(data)
    return Sizes(sum(a.size for a in weights.values()), sum(a.nbytes for a in weights.values()), len(data))


def compressible(source: Path) -> dict[str, Array]:
    """Reads the weights of what can be compressed; raises ModelError or WireError, with the reason, for all else."""
    if (source / TERNARY).exists() and not (source / CONFIG).exists():
        remedy = "Take the model it was made of, or fedtune decompress it with --base"
        raise ModelError(problem(str(source), "a model in safetensors", "one that is compressed already", remedy))
    weights = load_weights(source)
    for name, array in weights.items():
        dtype_name(array, f"{source}: {name}")
    if (source / CONFIG).exists():
        check_adapter(source, weights)
    return weights


def decompress(source: Path, target: Path, *, base: Path | None = None, most: float | None = None) -> None:
    """Writes what `compress` left of an adapter or a fine-tune as plain safetensors, to a new folder.

    Args:
        source: the compressed folder.
        target: the folder to write.
        base: the model that was fine-tuned; None for an adapter.
        most: how many bytes the weights may have; None for what an adapter of that file's size comes to, or the base.

    Raises:
        WireError: the file is damaged or hostile.
        ModelError: there is no such file, or `base` is missing or does not fit.
        ConfigError: `target` is not empty.
        StorageError: `target` cannot be written; nothing of it is left.
    """
    check_new(target)
    _write_plain(source, target, restore(source, base, most), "model.safetensors" if base else WEIGHTS)


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
    _write_plain(like, target, _added(change, _reference(like, _shapes(change), None)), WEIGHTS)


def restore(source: Path, base: Path | None = None, most: float | None = None) -> dict[str, Array]:
    """Returns the weights of a compressed folder; `most` is the limit of `read`, which for a fine-tune is its base."""
    data = _bytes(source / TERNARY)
    shapes = {spec.name: spec.shape for spec in declared(data).specs}
    reference = _reference(source, shapes, base)
    return _added(read(data, inf if base and most is None else most), reference)


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
    except KeyError as error:
        raise ModelError(problem(str(folder), "weights of a dtype that numpy has", error)) from error


def difference(source: Path, weights: Tensors, base: Path | None) -> dict[str, Array]:
    """Returns what training changed, in the dtypes of `weights`."""
    reference = _reference(source, _shapes(weights), base)
    return {n: _moved(array, reference[n], -1) if n in reference else array for n, array in weights.items()}


def _reference(source: Path, shapes: Mapping[str, tuple[int, ...]], base: Path | None) -> dict[str, Array]:
    """Returns what weights of these shapes are measured from, where that is not zero, in a shape that broadcasts."""
    if (source / CONFIG).exists():
        if base is not None:
            raise ConfigError(problem("--base", "none for an adapter", base))
        ones = read_config(source)["peft_type"] == "IA3"
        return {name: np.ones(()) for name in shapes if ones and "ia3_l" in name}
    if base is None:
        remedy = "Give the model it was fine-tuned from with --base"
        raise ModelError(problem(str(source), f"an adapter with {CONFIG}", "a model", remedy))
    theirs = load_weights(base)
    for name, shape in shapes.items():
        if name not in theirs or theirs[name].shape != shape:
            got, remedy = getattr(theirs.get(name), "shape", "none"), "Give the very model it was fine-tuned from"
            raise ModelError(problem(f"{base}: {name}", f"shape {shape}", got, remedy))
    return {name: theirs[name] for name in shapes}


def _added(change: Tensors, reference: Tensors) -> dict[str, Array]:
    return {n: _moved(array, reference[n], 1) if n in reference else array for n, array in change.items()}


def _moved(array: Array, reference: Array, sign: int) -> Array:
    """Adds a reference, or takes it away: in float64, rounded once; integers in their own dtype, exactly."""
    if array.dtype.kind in "iu":
        if reference.dtype.kind not in "iub":
            return array
        step = reference.astype(array.dtype)
        return np.asarray(np.add(array, step) if sign > 0 else np.subtract(array, step))
    return np.asarray(array.astype(np.float64) + sign * reference.astype(np.float64)).astype(array.dtype)


def _shapes(weights: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in weights.items()}


def _write_plain(like: Path, target: Path, weights: Tensors, name: str) -> None:
    with whole_folder(target) as draft:
        _copy_rest(like, draft)
        save_weights(draft / name, weights, {"format": "pt"})


def _copy_rest(source: Path, target: Path) -> None:
    """Copies configuration and tokenizer, not weights."""
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in file.name and file.is_file():
            shutil.copyfile(file, target / file.name)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(problem(str(file), "a compressed adapter", error.strerror)) from error


__all__ = [
    "GB",
    "MAGIC",
    "TERNARY",
    "balance_lora",
    "check_new",
    "compress",
    "compressible",
    "decompress",
    "difference",
    "load_weights",
    "plain",
    "read",
    "restore",
    "save_merged",
    "write",
]
