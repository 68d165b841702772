"""How long a round takes this client, and how much memory: a few steps on its own rows, at three adapters.

One block at the full rank, all blocks at it, and all blocks at rank 1 give the three parts of a `Cost`.
"""

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from fedtune.capability import Capability, Cost
from fedtune.depth import blocks
from fedtune.lora import LoraSpec
from fedtune.training.adapt import Bench
from fedtune.training.loop import autocast, train
from fedtune.training.lora import Adapter, fresh_factors, injected

_STEPS = 2
_OPTIMIZER = 16
"""Bytes of a trained value: itself, its gradient and AdamW's two moments, float32."""


def probe(bench: Bench, layers: Sequence[str], rank: int) -> Capability:
    """Measures; the model is left as it was. It takes six steps of training and three forward passes.

    Args:
        bench: model, rows and hyper-parameters.
        layers: all layers that may carry an adapter.
        rank: the largest rank.
    """
    grouped = blocks(layers)
    points = [(1, rank), (len(grouped), rank), (len(grouped), 1)]
    found = [_measure(bench, [layer for block in grouped[-k:] for layer in block], r) for k, r in points]
    seconds, memory = ([each[i] for each in found] for i in (0, 1))
    return Capability(line(seconds, len(grouped), rank), line(memory, len(grouped), rank), _room(bench))


def line(values: Sequence[float], deepest: int, rank: int) -> Cost:
    """Returns the cost that is `values` at (1, `rank`), (`deepest`, `rank`) and (`deepest`, 1), as (depth, rank).

    Noise may bend it; then no part is negative all the same. With one block, what does not go with the rank is fixed.
    """
    one, whole, low = values
    by_rank = max(0.0, whole - low) / (deepest * (rank - 1)) if rank > 1 else 0.0
    slope = max(0.0, whole - one) / (deepest - 1) if deepest > 1 else by_rank * rank
    by_rank = min(by_rank, slope / rank)
    return Cost(max(0.0, whole - deepest * slope), slope - rank * by_rank, by_rank)


def _measure(bench: Bench, layers: Sequence[str], rank: int) -> tuple[float, float]:
    """Seconds of a round, from the faster of two steps, and bytes that a step takes, with an adapter in `layers`."""
    spec = LoraSpec(tuple(layers), rank, 2.0 * rank)
    model, ends = bench.scorer.model, [time.perf_counter()]

    def stepped(step: int, steps: int, loss: float) -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        ends.append(time.perf_counter())

    with injected(model, spec, fresh_factors(model, spec, 0)) as adapter:
        memory = _memory(bench, adapter)
        steps, stream = bench.plan().batches(0)
        first = [next(stream)] * _STEPS
        ends[0] = time.perf_counter()
        train(bench.scorer, adapter.trained(), (_STEPS, first), bench.config, 0, stepped)
    return steps * min(b - a for a, b in pairwise(ends)), memory


def _memory(bench: Bench, adapter: Adapter) -> float:
    """Bytes that autograd keeps between forward and backward of one part of a step, and those of the trained values."""
    model = bench.scorer.model
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    part = next(bench.plan().batches(0)[1])[0]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(bench.config, model.device):
        loss = bench.scorer(part).sum()
    del loss
    return float(sum(kept.values()) + _OPTIMIZER * sum(weight.numel() for weight in adapter.trained()))


def _room(bench: Bench) -> float:
    """Bytes free on the device: of the GPU, or of this machine, shared with whoever else trains on it."""
    device = bench.scorer.model.device
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = (row.split() for row in Path("/proc/meminfo").read_text().splitlines())
        return next(float(row[1]) * 1024 for row in lines if row[0] == "MemAvailable:")
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
