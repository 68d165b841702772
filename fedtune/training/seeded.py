"""What a seed method tunes, on a torch model: its own weights, or an adapter's factors, rebuilt from coefficients.

The base stays as it is, which costs nothing where it is mapped from a file; what is tuned is made from it, and made
again when it is needed. A rebuild starts from the base and rounds once. Adding only what has changed since the last
round would save nothing (one walk over the weights either way, and a walk is a few copies' worth), and cannot give
the same bits: a weight of 8 or 24 bits has forgotten what its last rounding cut off.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune.directions import Coefficients, Pool, layout
from fedtune.lora import LoraSpec, key_a
from fedtune.sparse import Smallest
from fedtune.tensors import leaf_digest, root_digest
from fedtune.training.lora import fresh_factors, injected
from fedtune.training.streaming import array
from fedtune.zo import Line, put_back

Replayed = tuple[Pool, Coefficients, int]
_SPAN = 2**22


class Seeded(Protocol):
    """Weights that are a base plus directions of a pool."""

    def replay(self, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Sets the weights to base + 2**-exponent * sum_k c_k z_k, rounded once; returns their digest."""

    def digest(self) -> bytes:
        """SHA-256 of all weights: their names, shapes, dtypes and values (32 bytes)."""

    def reset(self) -> None:
        """Puts the base back."""

    def walk(self, pool: Pool) -> Any:
        """Opens a context in which the parameters are in the model and its weights may move; yields their lines."""


@dataclass(frozen=True)
class Origin:
    """One tensor of the base: what its weights are rebuilt from.

    Attributes:
        base: the tensor.
        first: where it begins in a pool.
        moving: the weights that move; None: all do.
    """

    base: Tensor
    first: int
    moving: Smallest | None = None

    def rebuild(self, replayed: Replayed, out: Any, span: slice = slice(None)) -> None:
        """Sets `out` to a span of whole tiles of base + 2**-exponent * sum_k c_k z_k; what does not move stays."""
        source, begin = flat(self.base)[span], span.start or 0
        backend(self.base).replay(*replayed, source, self.first + begin, out)
        if self.moving is None:
            return
        for start in range(0, len(out), _SPAN):
            part = slice(start, start + _SPAN)
            put_back(out[part], source[part], self.moving.left_out(begin + start, len(out[part])))

    def line(self, pool: Pool, weights: Any, *, anew: bool = False) -> Line:
        """Returns `weights` on their way along directions of `pool`."""
        left_out = self.moving.left_out if self.moving else None
        return Line(pool, backend(self.base), weights, self.first, left_out, anew=anew)


def origins(model: nn.Module, density: float | None) -> dict[str, Origin]:
    """Returns the tensors of a model by name, in order; tied ones count once.

    Args:
        model: as it is now.
        density: which fraction of each tensor moves, its smallest weights; None: all.
    """
    base = {name: weight.data.contiguous() for name, weight in sorted(model.named_parameters())}
    first = layout({name: weight.numel() for name, weight in base.items()})
    if density is None:
        return {name: Origin(weight, first[name]) for name, weight in base.items()}
    moving = {name: Smallest.of(flat(weight), flat(weight.cpu()), density) for name, weight in base.items()}
    return {name: Origin(weight, first[name], moving[name]) for name, weight in base.items()}


class SeedModel:
    """The weights of a model itself, all of them or the smallest of each tensor.

    Tensors are known by their names in the model; tied ones count once.
    """

    def __init__(self, model: nn.Module, density: float | None = None) -> None:
        self._weights = dict(sorted(model.named_parameters()))
        self._origins = origins(model, density)
        self._replayed: Replayed | None = None

    def replay(self, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Sets the weights to base + 2**-exponent * sum_k c_k z_k, rounded once; returns the model's digest."""
        self._rebuild((pool, coefficients, exponent))
        return self.digest()

    def digest(self) -> bytes:
        """SHA-256 of all weights: their names, shapes, dtypes and values (32 bytes)."""
        return _digest({name: weight.data for name, weight in self._weights.items()})

    def reset(self) -> None:
        """Puts the base back."""
        self._replayed = None
        for name, weight in self._weights.items():
            weight.data = self._origins[name].base

    @contextmanager
    def walk(self, pool: Pool) -> Iterator[dict[nn.Parameter, Line]]:
        """Lets the weights move for the length of a `with` block; afterwards they are as before.

        Narrow weights move in float32. Others move where they are, if a rebuild is quick (`hadamard`): then nothing is
        held twice, and they are rebuilt in the end.
        """
        before = {name: weight.data for name, weight in self._weights.items()}
        again = self._replayed if self._replayed and self._replayed[0].kind == "hadamard" else None
        try:
            lines = {}
            for name, weight in self._weights.items():
                wide = before[name]
                if again is None or wide.dtype not in (torch.float32, torch.float64):
                    wide = wide.to(torch.promote_types(wide.dtype, torch.float32), copy=True)
                lines[weight] = self._origins[name].line(pool, flat(wide))
            yield lines
        finally:
            for name, weight in self._weights.items():
                weight.data = before[name]
            if again:
                self._rebuild(again)

    def _rebuild(self, replayed: Replayed) -> None:
        self._replayed = replayed
        for name, weight in self._weights.items():
            base = self._origins[name].base
            if weight.data.data_ptr() == base.data_ptr():
                weight.data = torch.empty_like(base)
            self._origins[name].rebuild(replayed, flat(weight.data))


class SeedAdapter:
    """The factors of a LoRA adapter on a model: A drawn from a seed that everyone has, B zero; float32."""

    def __init__(self, model: PreTrainedModel, spec: LoraSpec, seed: int) -> None:
        self._model, self.spec = model, spec
        drawn = fresh_factors(model, spec, seed)
        self._base = {name: torch.from_numpy(drawn[name]).to(model.device) for name in sorted(drawn)}
        self._first = layout({name: factor.numel() for name, factor in self._base.items()})
        self._now = self._base

    def replay(self, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Sets the factors to base + 2**-exponent * sum_k c_k z_k, rounded once; returns their digest."""
        now = {name: torch.empty_like(base) for name, base in self._base.items()}
        for name, base in self._base.items():
            backend(base).replay(pool, coefficients, exponent, flat(base), self._first[name], flat(now[name]))
        self._now = now
        return self.digest()

    def factors(self) -> dict[str, Any]:
        """Returns the factors as numpy arrays."""
        return {name: factor.cpu().numpy() for name, factor in self._now.items()}

    def scaled(self) -> dict[str, Any]:
        """Returns the factors with the adapter's scale in A."""
        factors = self.factors()
        for layer in self.spec.layers:
            factors[key_a(layer)] = factors[key_a(layer)] * np.float32(self.spec.scale)
        return factors

    def digest(self) -> bytes:
        """SHA-256 of all factors: their names, shapes, dtypes and values (32 bytes)."""
        return _digest(self._now)

    def reset(self) -> None:
        """Puts A as drawn and B zero back."""
        self._now = self._base

    @contextmanager
    def walk(self, pool: Pool) -> Iterator[dict[nn.Parameter, Line]]:
        """Puts the adapter into the model for the length of a `with` block, and lets its factors move."""
        with injected(self._model, self.spec, self.factors()) as adapter:
            lines = {}
            for name, weight in adapter.weights.items():
                wide = weight.data.clone()
                weight.requires_grad_(False)
                lines[weight] = Line(pool, backend(wide), flat(wide), self._first[name])
            yield lines


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    here = ((name, tensor.cpu()) for name, tensor in tensors.items())
    leaves = (leaf_digest(name, flat(tensor).reshape(tuple(tensor.shape))) for name, tensor in here)
    return bytes.fromhex(root_digest(leaves))


def backend(tensor: Tensor) -> Any:
    """Returns the module that computes directions where `tensor` is: numba, Triton, or torch alone."""
    if tensor.device.type == "cpu":
        cpu, threads = import_module("fedtune.directions.cpu"), torch.get_num_threads()
        names = ("replay", "advance", "spread")
        return SimpleNamespace(**{name: partial(getattr(cpu, name), threads=threads) for name in names})
    try:
        return import_module("fedtune.directions.gpu")
    except ImportError:
        return import_module("fedtune.directions.portable")


def flat(tensor: Tensor) -> Any:
    """Views a contiguous tensor as one axis, as a numpy array when it is on the CPU."""
    return array(tensor.view(-1))
