"""ComPEFT's ternary updates: bytes beside the entropy bound and other formats, time beside the authors' compression.

The authors' way is written from its description (`src/qlora/ties_utils.py` of prateeky2806/ComPEFT): the k-th value of
the magnitudes, a mask, a product, the standard deviation times the sign; "whole" also has the mean that they take and
their check that nothing left out is larger than what is kept. It gives a dense tensor and writes no bytes; ours is
timed from the dense vector to the last byte, in numpy alone and with numba's loops, whose bytes must be the same.
"Decode and add" is what a client does with a compressed step of the state (float32), "fold" what a coordinator does
with an update (exact sums, two int64 a value). The limit of bytes is sum_t n_t (H(p_t) + p_t), of time a read of the
vector. Sizes are of three bags: an i.i.d. vector, a made-up adapter whose tensors differ in scale by up to 30 times,
and with --adapter a PEFT adapter of your own.
"""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _sparse import WAYS, bound_bytes
from _table import Row, interleave, options, report

from fedtune import exact
from fedtune.averaging import add_codes
from fedtune.codecs.backend import Way, using
from fedtune.codecs.ternary import Ternary
from fedtune.codecs.ternary_format import unpack
from fedtune.method import Member
from fedtune.tensors import Manifest, Tensors

DENSITIES = (0.05, 0.1, 0.2, 0.5)


def main() -> None:
    arguments = options(__doc__, adapter={"type": Path, "help": "PEFT adapter folder to compress too"})
    size = 2_000_000 if arguments.quick else 16_000_000
    bags = {"i.i.d.": iid(size), "made-up adapter": adapter(30)}
    if arguments.adapter:
        from safetensors.numpy import load_file

        bags["real adapter"] = load_file(arguments.adapter / "adapter_model.safetensors")
    rows = [row for name, bag in bags.items() for row in sizes(name, bag)]
    rows += times(bags["i.i.d."]["x"], 3 if arguments.quick else 5)
    exact_on_ties()
    report("Ternary updates (ComPEFT)", rows, arguments.json)


def iid(size: int) -> dict[str, np.ndarray]:
    """Draws one normal vector."""
    return {"x": np.random.Generator(np.random.Philox(key=1)).standard_normal(size, np.float32)}


def adapter(layers: int) -> dict[str, np.ndarray]:
    """Draws a LoRA adapter of 135 million parameters' shapes, r = 16; each factor has a scale of its own."""
    rng = np.random.Generator(np.random.Philox(key=2))
    shapes = {
        "q": (576, 576),
        "k": (576, 192),
        "v": (576, 192),
        "o": (576, 576),
        "up": (576, 1536),
        "down": (1536, 576),
    }
    bag = {}
    for layer in range(layers):
        for name, (inputs, outputs) in shapes.items():
            for factor, shape in (("A", (16, inputs)), ("B", (outputs, 16))):
                scale = np.float32(10 ** rng.uniform(-1.5, 0))
                bag[f"{layer}.{name}.{factor}"] = scale * rng.standard_normal(shape, np.float32)
    return bag


def sizes(name: str, bag: Tensors) -> list[Row]:
    """Compares bytes at every density."""
    rows, manifest = [], Manifest.of(bag)
    half = 2 * sum(array.size for array in bag.values())
    for density in DENSITIES:
        codec = Ternary(density=density)
        payload = b"".join(codec.encode(bag, manifest))
        decoded = codec.decode(payload, manifest)
        bound, work = bound_bytes(decoded), f"{name}, {density:.0%}"
        rows.append(Row(work, len(payload), "bytes", half, bound, "peer: float16, dense"))
        for way, write in WAYS.items():
            rows.append(Row(work, len(payload), "bytes", len(write(decoded)), note=f"peer: {way}"))
    return rows


def times(x: np.ndarray, repeats: int) -> list[Row]:
    """Compares seconds, ours with every byte written."""
    import torch

    torch.set_num_threads(1)
    tensor, bag, total = torch.from_numpy(x), {"x": x}, np.zeros_like(x)
    manifest, rows = Manifest.of(bag), []
    sums = {"x": exact.add(None, x, 1, "x")}
    for density in DENSITIES:
        codec = Ternary(density=density)
        payload = b"".join(codec.encode(bag, manifest))
        ways: dict[str, Callable[[], object]] = {
            "numpy": lambda c=codec: encoded(c, bag, manifest, "numpy"),
            "numba": lambda c=codec: encoded(c, bag, manifest, "numba"),
            "authors": lambda d=density: authors(tensor, d),
            "whole": lambda d=density: authors(tensor, d, whole=True),
            "limit": lambda: x.sum(),
            "add": lambda p=payload: [code.add_to(total, 1.0) for code in unpack(p, manifest)[0]],
            "dense": lambda c=codec, p=payload: np.add(total, c.decode(p, manifest)["x"], out=total),
            "fold": lambda p=payload: add_codes(sums, unpack(p, manifest)[0], Member("a"), 1),
            "fold dense": lambda c=codec, p=payload: exact.add(sums["x"], c.decode(p, manifest)["x"], 1, "x"),
        }
        if ways["numpy"]() != ways["numba"]():
            raise SystemExit(f"numpy and numba differ at {density:.0%}")
        best = interleave(ways, repeats)
        for way in ("numpy", "numba"):
            for peer in ("authors", "whole"):
                note = f"{way}; peer: authors' step, {'whole' if peer == 'whole' else 'kthvalue, mask, multiply'}"
                rows.append(Row(f"encode, {density:.0%}", best[way], "s CPU", best[peer], best["limit"], note))
            rows.append(
                Row(f"decode and add, {density:.0%}", best["add"], "s CPU", best[way], note=f"peer: our encode, {way}")
            )
            rows.append(Row(f"fold, {density:.0%}", best["fold"], "s CPU", best[way], note=f"peer: our encode, {way}"))
        for work, key in (("decode and add", "add"), ("fold", "fold")):
            dense = best["dense" if key == "add" else "fold dense"]
            rows.append(Row(f"{work}, {density:.0%}", best[key], "s CPU", dense, note="peer: by way of dense"))
    return rows


def encoded(codec: Ternary, bag: Tensors, manifest: Manifest, way: Way) -> bytes:
    """Encodes in one of two ways."""
    with using(way):
        return b"".join(codec.encode(bag, manifest))


def authors(tensor: "torch.Tensor", density: float, whole: bool = False) -> "torch.Tensor":  # noqa: F821
    """Compresses as the authors do; `whole` with all that stands around it."""
    if whole:
        tensor.mean()
    std = tensor.std()
    threshold, _ = tensor.abs().kthvalue(tensor.numel() - int(tensor.numel() * density))
    mask = tensor.abs() >= threshold
    kept = tensor * mask
    if whole and tensor[~mask].abs().max() > kept[mask].abs().min():
        raise SystemExit("the authors' step kept others than the largest")
    return std * kept.sign()


def exact_on_ties() -> None:
    """Keeps exactly as many as asked for where most magnitudes are equal."""
    x = np.round(np.random.Generator(np.random.Philox(key=3)).standard_normal(1_000_000)).astype(np.float32)
    for density in DENSITIES:
        (code,) = Ternary(density=density).compress({"x": x}, Manifest.of({"x": x}))
        if code.count != round(density * x.size):
            raise SystemExit(f"kept {code.count} of {x.size} values at {density:.0%}")


if __name__ == "__main__":
    main()
