"""Which layers carry a client's adapter: those of its last transformer blocks, the ones nearest the output.

A backward pass goes no deeper than the lowest block with an adapter. So a slow client saves most of it, and the memory
for it, by adapting few blocks; those near the output are worth most (LEGEND, arXiv 2412.20004).
"""

from collections.abc import Sequence

from fedtune.lora import is_table, key_a, key_b, layers_of
from fedtune.tensors import Array, Tensors


def blocks(layers: Sequence[str]) -> list[list[str]]:
    """Groups layers by transformer block, from the input to the output.

    A block's number is the first in a layer's dotted name: 3 in `model.layers.3.self_attn.q_proj`. A layer without one
    goes with the last block, being behind all of them as an output head is; an embedding goes with the first.
    """
    numbers = {layer: next((int(p) for p in layer.split(".") if p.isdecimal()), None) for layer in layers}
    known = [number for number in numbers.values() if number is not None] or [0]
    found: dict[int, list[str]] = {}
    for layer, number in numbers.items():
        outside = min(known) if is_table(layer) else max(known)
        found.setdefault(outside if number is None else number, []).append(layer)
    return [found[number] for number in sorted(found)]


def carried(factors: Tensors, depth: int) -> dict[str, Array]:
    """Picks the factors (`layer/A`, `layer/B`) of the last `depth` blocks, in their order; 0 picks all."""
    layers = layers_of(factors)
    chosen = {layer for block in blocks(layers)[-depth:] for layer in block}
    return {key: factors[key] for layer in layers if layer in chosen for key in (key_a(layer), key_b(layer))}
