"""A torch model whose weights are a base plus directions of a pool: rebuilt from coefficients, trained by losses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedtune.directions import Coefficients, Pool, layout
from fedtune.errors import ModelError, TrainingError, problem
from fedtune.kspace import unpacked
from fedtune.method import ZeroOrder
from fedtune.methods.fedkseed import FILE
from fedtune.tensors import Array, leaf_digest, root_digest
from fedtune.training.adapt import Bench
from fedtune.training.loop import autocast
from fedtune.zo import Walk, train


class SeedModel:
    """The weights of a model, all of them, on the base they were loaded with.

    Tensors are known by their names in the model; tied ones count once. The base stays as it is, which costs nothing
    where it is mapped from a file.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = dict(sorted(model.named_parameters()))
        self._base = {name: weight.data.contiguous() for name, weight in self._weights.items()}
        self._first = layout({name: weight.numel() for name, weight in self._base.items()})

    def replay(self, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Sets the weights to base + 2**-exponent * sum_k c_k z_k, rounded once; returns the model's digest."""
        for name, weight in self._weights.items():
            base, out = self._base[name], torch.empty_like(self._base[name])
            backend(base).replay(pool, coefficients, exponent, flat(base), self._first[name], flat(out))
            weight.data = out
        return self.digest()

    def load(self, folder: Path) -> None:
        """Rebuilds the model that `FedKSeed.export` wrote to `folder`; raises ModelError when there is none."""
        try:
            with safe_open(folder / FILE, framework="numpy") as file:
                about = file.metadata()
                stored = {name: file.get_tensor(name) for name in ("pool", "coefficients", "exponent")}
            pool = Pool(about["pool"], int(stored["pool"][0]), int(about["seeds"]))
            self.replay(pool, unpacked(stored["coefficients"]), int(stored["exponent"][0]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ModelError(problem(str(folder / FILE), "the coefficients of a FedKSeed run", error)) from error

    def digest(self) -> bytes:
        """SHA-256 of all weights: their names, shapes, dtypes and values (32 bytes)."""
        arrays = ((name, weight.data.cpu()) for name, weight in self._weights.items())
        leaves = (leaf_digest(name, flat(w).reshape(tuple(w.shape))) for name, w in arrays)
        return bytes.fromhex(root_digest(leaves))

    def reset(self) -> None:
        """Puts the base back."""
        for name, weight in self._weights.items():
            weight.data = self._base[name]

    @contextmanager
    def walk(self, pool: Pool) -> Iterator[Walk]:
        """Lets the weights move along directions for the length of a `with` block; afterwards they are as before.

        Narrow weights move in float32.
        """
        before = {name: weight.data for name, weight in self._weights.items()}
        parts = []
        try:
            for name, weight in self._weights.items():
                start = before[name].contiguous()
                wide = start.clone() if start.dtype == torch.float64 else start.to(torch.float32, copy=True)
                weight.data = torch.empty_like(start)
                parts.append((flat(wide), self._first[name], flat(weight.data)))
            yield Walk(pool, backend(wide), parts)
        finally:
            for name, weight in self._weights.items():
                weight.data = before[name]


def fit_seeds(
    bench: Bench, model: SeedModel, pool: Pool, seeds: Coefficients, plan: ZeroOrder, seed: int
) -> tuple[Array, dict[str, float]]:
    """Trains all weights along `seeds`; the model is left as it was before.

    Returns:
        The scalar of each direction, float32, NaN where skipped; and the metrics of `fedtune.training.loop.train`,
        with `skipped`.

    Raises:
        TrainingError: every step was skipped.
    """
    steps, stream = replace(bench.plan(), steps=plan.steps).batches(seed)
    start, batches = time.monotonic(), list(stream)
    with torch.inference_mode(), model.walk(pool) as walk:
        done = train(walk, seeds, plan, lambda step: _loss(bench, batches[step]), bench.on_step)
    if done.skipped == len(seeds):
        remedy = "Lower method.learning_rate, or raise method.loss_clip"
        raise TrainingError(problem("steps", "a finite loss in one of them at least", "none", remedy))
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
    }


def _loss(bench: Bench, parts: Any) -> float:
    learned = sum(len(part.at) for part in parts)
    with autocast(bench.config, bench.scorer.model.device):
        return sum(float(bench.scorer(part).sum()) for part in parts) / learned


def backend(tensor: Tensor) -> Any:
    """Returns the module that computes directions where `tensor` is: numba, Triton, or torch alone."""
    if tensor.device.type == "cpu":
        cpu, threads = import_module("fedtune.directions.cpu"), torch.get_num_threads()
        names = ("replay", "perturb", "advance")
        return SimpleNamespace(**{name: partial(getattr(cpu, name), threads=threads) for name in names})
    try:
        return import_module("fedtune.directions.gpu")
    except ImportError:
        return import_module("fedtune.directions.portable")


def flat(tensor: Tensor) -> Any:
    """Views a contiguous tensor as one axis, as a numpy array when it is on the CPU."""
    line = tensor.view(-1)
    if line.device.type != "cpu":
        return line
    if line.dtype == torch.bfloat16:
        return line.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return line.numpy()
