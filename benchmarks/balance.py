"""What compression does to a FLoRA client's factors: as trained, balanced, or as their distance from the first draw.

`python benchmarks/balance.py [--model tiny] [--steps 8] [--rank 16]` trains one adapter and prints for each form and
codec: the relative error of B A, the held-out loss of the model with it, and the bytes.
"""

import argparse
import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from fedtune.balance import balanced
from fedtune.codecs.blocks import Blocks
from fedtune.codecs.codec import Codec
from fedtune.codecs.compression import change, changed
from fedtune.codecs.ternary import Ternary
from fedtune.config import Config, Shared, parse
from fedtune.lora import LoraSpec, find_layers, key_a, key_b, layers_of, scale_array
from fedtune.method import Member
from fedtune.tensors import Manifest, Tensors
from fedtune.training.evaluate import Evaluator
from fedtune.training.worker import TorchWorker

DENSITIES = (0.05, 0.1, 0.2, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    config = parse(
        {
            "model": {"name": options.model},
            "data": {"name": "vader", "held_out_rows": 200},
            "method": {"rank": options.rank},
            "training": {"steps": options.steps, "batch_size": 4, "learning_rate": 2e-3, "max_length": 128},
            "client": {"threads": 1},
        }
    )
    spec, first, trained = train(config)
    evaluator = Evaluator.open(config)

    def loss(factors: Tensors) -> float:
        scaled = {n: scale_array(a, spec.scale) if n.endswith("/A") else a for n, a in factors.items()}
        return evaluator.factors(scaled)["loss"]

    print(f"base {evaluator.base()['loss']:.4f}, float32 {loss(trained):.4f}\n")
    print("| factors | codec | " + " | ".join(f"{d:.0%}" for d in DENSITIES) + " |\n|" + "---|" * (2 + len(DENSITIES)))
    for form, (bag, back) in forms(first, trained).items():
        for name, steps in codecs().items():
            print(f"| {form} | {name} | " + " | ".join(measured(trained, bag, back, c, loss) for c in steps) + " |")


def train(config: Config) -> tuple[LoraSpec, Tensors, Tensors]:
    """Returns the adapter's spec, its first draw, and what training made of it."""
    worker = TorchWorker.open(config, Shared.of(config))
    job = worker.job(config.method, Member("client"), 1)
    shapes = {name: tuple(weight.shape) for name, weight in worker.base.model.named_parameters()}
    weights = Manifest.of({name: np.empty(shape, np.uint8) for name, shape in shapes.items()})
    layers = tuple(layer.name for layer in find_layers(weights, config.method.target_modules))
    spec = LoraSpec(layers, config.method.rank, 2.0 * config.method.rank)
    return spec, job.fresh(spec), job.train_fresh(spec)


def forms(first: Tensors, trained: Tensors) -> dict[str, tuple[Tensors, Callable[[Tensors], Tensors]]]:
    """What is encoded, and what turns it back into factors."""
    return {
        "as trained": (trained, lambda bag: bag),
        "balanced": (balanced(trained), lambda bag: bag),
        "from the first draw": (change(trained, first), lambda bag: changed(first, bag)),
    }


def codecs() -> dict[str, list[Codec]]:
    found: dict[str, list[Codec]] = {f"int{bits}": [Blocks(bits=bits)] for bits in (8, 4)}
    for top, sigma, scale in (
        ("vector", "vector", "std"),
        ("vector", "vector", "least-squares"),
        ("vector", "tensor", "least-squares"),
        ("tensor", "tensor", "least-squares"),
    ):
        each = [Ternary(density=d, scale=scale, top=top, sigma=sigma) for d in DENSITIES]
        found[f"top of {top}, scale of {sigma}, {scale}"] = each
    return found


def measured(
    trained: Tensors,
    bag: Tensors,
    back: Callable[[Tensors], Tensors],
    codec: Codec,
    loss: Callable[[Tensors], float],
) -> str:
    manifest = Manifest.of(bag)
    payload = b"".join(codec.encode(bag, manifest))
    factors = back(codec.decode(payload, manifest))
    return f"{error(trained, factors):.3f}, {loss(factors):.4f} ({len(payload) / 1000:.1f} kB)"


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
