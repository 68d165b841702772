"""Training a torch model by losses alone, along directions of a pool."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from fedtune.directions import KINDS, Coefficients, Pool
from fedtune.directions.pool import Kind
from fedtune.errors import ConfigError, ModelError, TrainingError, problem
from fedtune.kspace import LIMIT, unpacked
from fedtune.method import Part, ZeroOrder
from fedtune.methods.fedkseed import FILE
from fedtune.tensors import Array
from fedtune.training.adapt import Bench, measured
from fedtune.training.encoding import Encoded
from fedtune.training.frugal import FrugalModel
from fedtune.training.loop import autocast
from fedtune.training.packing import Batch, collate
from fedtune.training.scoring import TOLERANCE, Scorer
from fedtune.training.seeded import SeedAdapter, Seeded, SeedModel
from fedtune.training.streaming import Losses, Streamed, array, streaming
from fedtune.zo import Line, PlainWalk, Walk, train

Lines: TypeAlias = Mapping[nn.Parameter, Line]
Looks: TypeAlias = Literal["together", "apart", "whole"]
TOGETHER = 1024
"""Tokens a batch up to which two looks share a forward pass; larger ones gain nothing from it, and it takes room."""
_MISFITS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError)
_FAR = (1e-2, -1e-2)  # far enough for a loss to show


def seeded(model: PreTrainedModel, part: Part, low_memory: bool = False) -> Seeded:
    """Returns what of a model a seed method tunes; with `low_memory`, without a copy of its weights.

    Raises:
        ConfigError: the model is on a device without float64, in which a rebuild is rounded.
    """
    if model.device.type == "mps":
        remedy = "Apple's GPUs have no float64, and a rebuild without it would give other bits than everyone else's"
        raise ConfigError(problem("client.device", "cpu or cuda for a seed method", model.device, remedy))
    if part.lora:
        return SeedAdapter(model, part.lora, part.seed)
    density = part.density if part.kind == "sparse" else None
    return FrugalModel(model, density) if low_memory else SeedModel(model, density)


def fit_seeds(
    bench: Bench, held: Seeded, pool: Pool, seeds: Coefficients, plan: ZeroOrder, seed: int
) -> tuple[Array, dict[str, float]]:
    """Trains weights along `seeds`; they are left as they were before.

    Returns:
        The scalar of each direction, float32, NaN where skipped; and the metrics of
        `fedtune.training.adapt.fit_adapter`, with `skipped`.

    Raises:
        TrainingError: every step was skipped.
    """
    steps, stream = replace(bench.plan(), steps=plan.steps).batches(seed)
    start, batches = time.monotonic(), list(stream)
    with torch.inference_mode(), held.walk(pool) as lines:
        looks = how(bench.scorer, lines)
        if looks == "together" and max(part.ids.size for batch in batches for part in batch) > TOGETHER:
            looks = "apart"
        own = _measured(bench, lines, looks, "_before")
        with walking(bench.scorer.model, lines, looks, _losses(bench, batches)) as walk:
            done = train(walk, seeds, plan, bench.on_step)
        own |= _measured(bench, lines, looks)
    if done.skipped == len(seeds):
        want = f"one at least with finite losses, within loss_clip, and a slope below {LIMIT:.0f}"
        remedy = "Lower method.learning_rate, or raise method.loss_clip"
        raise TrainingError(problem("steps", want, "none", remedy))
    tokens = sum(part.tokens for batch in batches for part in batch)
    learned = sum(len(part.at) for batch in batches for part in batch)
    sound = [loss for loss in done.losses if np.isfinite(loss)] or [0.0]
    return done.scalars, {
        "loss": sum(sound) / len(sound),
        "loss_first": sound[0],
        "loss_last": sound[-1],
        "steps": float(steps),
        "skipped": float(done.skipped),
        "tokens": float(tokens),
        "answer_tokens": float(learned),
        "seconds": time.monotonic() - start,
    } | own


@contextmanager
def walking(model: PreTrainedModel, lines: Lines, looks: Looks, compute: Losses) -> Iterator[Walk]:
    """Makes a walk of the weights in `model`, by layers or as a whole.

    Args:
        model: holds the parameters.
        lines: their weights on their way.
        looks: how the model may be looked at (`how`).
        compute: losses of a step's batch, laid out some times over.
    """
    if looks == "whole":
        for weight in lines:
            weight.data = torch.empty_like(weight.data)
        parts = [(line, array(weight.data.view(1, -1))) for weight, line in lines.items()]
        yield PlainWalk(parts, lambda step: compute(step, 1)[0])
        return
    walk = Streamed(list(lines.values()), compute, together=looks == "together")
    with streaming(model, lines, walk):
        yield walk


def how(scorer: Scorer, lines: Lines) -> Looks:
    """Finds out how this architecture lets its weights be looked at, with a few forward passes over 12 tokens.

    Returns:
        `together`: layers make their weights, and two looks are the halves of one batch; `apart`: one look after the
        other; `whole`: some module reads weights that are not its own, so all are made beforehand.
    """
    ids = np.arange(3, 15) % scorer.model.config.get_text_config().vocab_size
    rows = [Encoded.plain(part, [True] * len(part)) for part in (ids[:7].tolist(), ids[7:].tolist())]
    batch, seen = collate(rows, [[0], [1]]), list[torch.Tensor]()

    def compute(_: int, copies: int) -> list[float]:
        seen.append(scorer(batch.repeated(copies)).view(copies, -1))
        return [0.0] * copies

    try:
        with walking(scorer.model, lines, "apart", compute) as walk:
            walk.losses(0, _FAR, 0)
    except _MISFITS:
        return "whole"
    try:
        with walking(scorer.model, lines, "together", compute) as walk:
            walk.losses(0, _FAR, 0)
    except _MISFITS:
        return "apart"
    limit = TOLERANCE.get(scorer.model.dtype, 0.05)
    return "together" if torch.allclose(torch.cat(seen[:-1]), seen[-1], rtol=limit, atol=limit) else "apart"


def rebuilt(model: PreTrainedModel, folder: Path) -> Seeded:
    """Rebuilds what `FedKSeed.export` wrote to `folder`, on the base that is in `model`.

    Raises:
        ModelError: there is nothing of the kind, or it does not fit the model.
    """
    try:
        with safe_open(folder / FILE, framework="numpy") as file:
            part = Part.from_text(file.metadata())
            kinds: dict[str, Kind] = {kind: kind for kind in KINDS}
            kind, k = kinds[file.metadata()["pool"]], int(file.metadata()["seeds"])
            stored = {name: file.get_tensor(name) for name in ("pool", "coefficients", "exponent")}
        held = seeded(model, part)
        held.replay(Pool(kind, int(stored["pool"][0]), k), unpacked(stored["coefficients"]), int(stored["exponent"][0]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(problem(str(folder / FILE), "the coefficients of a FedKSeed run", error)) from error
    return held


def _measured(bench: Bench, lines: Lines, looks: Looks, when: str = "") -> dict[str, float]:
    """Measures the weights where they are on their way, one look at a time."""
    found: dict[str, float] = {}

    def compute(_: int, copies: int) -> list[float]:
        found.update(measured(bench, when))
        return [0.0] * copies

    if bench.measure:
        with walking(bench.scorer.model, lines, looks, compute) as walk:
            walk.losses(0, (0.0,), 0)
    return found


def _losses(bench: Bench, batches: Sequence[Sequence[Batch]]) -> Losses:
    def compute(step: int, copies: int) -> list[float]:
        total = torch.zeros(copies, dtype=torch.float64)
        with autocast(bench.config, bench.scorer.model.device):
            for part in batches[step]:
                total += bench.scorer(part.repeated(copies)).view(copies, -1).sum(1).double().cpu()
        return (total / sum(len(part.at) for part in batches[step])).tolist()

    return compute
