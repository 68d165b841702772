"""What compression does to a LoRA adapter: relative error of B A, factors as they are trained or balanced first.

`python benchmarks/balance.py ADAPTER_DIR`
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from fedtune.balance import balanced
from fedtune.codecs.blocks import Blocks
from fedtune.codecs.codec import Codec
from fedtune.codecs.ternary import Ternary
from fedtune.lora import key_a, key_b, layers_of, load_peft
from fedtune.tensors import Manifest, Tensors

DENSITIES = (0.05, 0.1, 0.2, 0.5)


def main() -> None:
    factors = {name: np.asarray(a, np.float32) for name, a in load_peft(Path(sys.argv[1])).items()}
    codecs: dict[str, list[Codec]] = {f"int{bits}": [Blocks(bits=bits)] for bits in (8, 4)}
    for top in ("vector", "tensor"):
        for scale in ("std", "least-squares"):
            codecs[f"{top}, {scale}"] = [Ternary(density=d, scale=scale, top=top, sigma=top) for d in DENSITIES]
    print("| factors | codec | " + " | ".join(f"{d:.0%}" for d in DENSITIES) + " |\n|" + "---|" * (2 + len(DENSITIES)))
    for name, bag in (("as trained", factors), ("balanced", balanced(factors))):
        for codec, steps in codecs.items():
            print(f"| {name} | {codec} | " + " | ".join(measured(factors, bag, one) for one in steps) + " |")


def measured(factors: Tensors, bag: Tensors, codec: Codec) -> str:
    manifest = Manifest.of(bag)
    payload = b"".join(codec.encode(bag, manifest))
    return f"{error(factors, codec.decode(payload, manifest)):.3f} ({len(payload) / 1000:.1f} kB)"


def error(factors: Tensors, other: Tensors) -> float:
    """|B' A' - B A| / |B A| over all layers, Frobenius norms."""
    apart = whole = 0.0
    for layer in layers_of(factors):
        product = factors[key_b(layer)] @ factors[key_a(layer)]
        apart += float(np.square(other[key_b(layer)] @ other[key_a(layer)] - product).sum())
        whole += float(np.square(product).sum())
    return float(np.sqrt(apart / whole))


if __name__ == "__main__":
    main()
