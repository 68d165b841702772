"""Other ways to write a ternary vector down, each a few plain lines, and the entropy none can go below."""

import io
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from safetensors.numpy import save

try:
    from compression import zstd
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

PACKER = "zstd -1" if zstd else "zlib -6"


def packed(data: bytes) -> bytes:
    """Compresses with zstd level 1, or where there is none with zlib's default."""
    return zstd.compress(data, 1) if zstd else zlib.compress(data)


def bound_bytes(tensors: Mapping[str, np.ndarray]) -> float:
    """sum_t n_t (H(p_t) + p_t) / 8, p_t the share of values of tensor t that are not zero."""
    bits = 0.0
    for array in tensors.values():
        n, k = array.size, np.count_nonzero(array)
        p = k / max(n, 1)
        bits += n * (0.0 if p in (0, 1) else -p * np.log2(p) - (1 - p) * np.log2(1 - p)) + k
    return bits / 8


def bitmap(tensors: Mapping[str, np.ndarray]) -> bytes:
    """One bit for each place, compressed, and one for each sign."""
    flat = _joined(tensors)
    kept = flat != 0
    return packed(np.packbits(kept).tobytes()) + np.packbits(flat[kept] < 0).tobytes()


def trits(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Five values to a byte, compressed."""
    flat = _joined(tensors)
    digits = np.zeros(5 * -(-flat.size // 5), np.uint8)
    digits[: flat.size] = (flat > 0) + 2 * (flat < 0)
    return packed((digits.reshape(-1, 5) @ np.array([1, 3, 9, 27, 81], np.uint8)).tobytes())


def dense(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The values in float16 in a safetensors file, compressed: what a repository of adapters would store."""
    return packed(save({name: array.astype(np.float16) for name, array in tensors.items()}))


def coordinates(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Sparse COO saved by torch: 64-bit places and 32-bit values."""
    import torch

    stream = io.BytesIO()
    torch.save({name: torch.from_numpy(array).to_sparse() for name, array in tensors.items()}, stream)
    return stream.getvalue()


WAYS: dict[str, Callable[[Mapping[str, np.ndarray]], bytes]] = {
    f"bitmap, {PACKER}, signs": bitmap,
    f"5 trits a byte, {PACKER}": trits,
    f"float16 safetensors, {PACKER}": dense,
    "sparse COO, torch.save": coordinates,
}


def _joined(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in tensors.values()])
