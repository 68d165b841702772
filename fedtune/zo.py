"""Training without gradients: two losses along a direction say how far to go (MeZO; Malladi et al. 2023, 2305.17333).

The weights of a step are made out of place, from the weights it starts at: nothing is added and taken away again, so
weights of low precision never drift. A change is made in the same walk over memory as the next perturbation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedtune.directions import Coefficients, Move, Pool
from fedtune.kspace import LIMIT
from fedtune.method import ZeroOrder

OnStep = Callable[[int, int, float], None]
_SETTLED = 2**22
_STEEPEST = LIMIT * (1 - 2.0**-24)  # so its float32 is below LIMIT
_MIXES = "it moves along a mix of all past directions, which no sum of one scalar a seed can hold. Use sgd"
_SCALES = "it scales every weight by its own history, which scalars by seed cannot carry. Use sgd or sign"
REFUSED = {
    "momentum": _MIXES,
    "nesterov": _MIXES,
    "adam": _SCALES,
    "adamw": _SCALES + "; weight decay is no multiple of a direction either",
    "rmsprop": _SCALES,
    "adagrad": _SCALES,
    "forward-grad": "it needs derivatives along a direction (jvp), so the memory of a second model, and kernels that "
    "have them; for small eps sgd gives the same scalar",
    "sgd-decay": "a learning rate that changes does not commute with summing scalars over rounds. Use sgd",
}
"""Optimisers whose steps are not one scalar a seed, and why."""


class Backend(Protocol):
    """`fedtune.directions.cpu`, `gpu`, `portable` or `reference`."""

    def advance(self, pool: Pool, moves: Sequence[Move], weights: Any, first: int) -> None:
        """Adds change * z_k to `weights` for each move (k, change) in turn, each sum rounded."""

    def spread(
        self, pool: Pool, k: int, scales: Sequence[float], weights: Any, first: int, outs: Any, move: Move | None = None
    ) -> None:
        """Adds change * z_moved to `weights`, then sets each `outs[j]` to weights + scales[j] * z_k."""


class Walk(Protocol):
    """Weights that move along directions, and whose losses can be asked for."""

    def losses(self, k: int, scales: Sequence[float], step: int) -> list[float]:
        """Returns the losses at weights + scale * z_k, on the batch of a step (0, 1, ...)."""

    def move(self, k: int, change: float) -> None:
        """Adds change * z_k to the weights, at the next look or `settle`."""

    def settle(self) -> None:
        """Makes the moves that are due."""


@dataclass
class Line:
    """One tensor on its way: its weights end to end, where they begin in the pool, and the moves that are due.

    Attributes:
        pool: the directions.
        backend: computes them.
        weights: flat, float32 or float64; or what makes them when a slice is taken.
        first: where they begin in the pool.
        left_out: of so many weights from a place on, says which ones never move; None: all do.
        place: where `weights` begin in the tensor.
        due: moves that are not made yet.
        anew: `weights` are as at the start whenever they are asked for, so moves stay due.
    """

    pool: Pool
    backend: Backend
    weights: Any
    first: int
    left_out: Callable[[int, int], Any] | None = None
    place: int = 0
    due: list[Move] = field(default_factory=list)
    anew: bool = False

    def spread(self, k: int, scales: Sequence[float], outs: Any, span: slice = slice(None)) -> None:
        """Makes the moves that are due in a span of whole tiles, then sets `outs[j]` to weights + scales[j] * z_k.

        Whoever has spread every span calls `arrived`.
        """
        weights, start = self.weights[span], span.start or 0
        before = copied(weights) if self.left_out else weights
        self.backend.advance(self.pool, self.due[:-1], weights, self.first + start)
        last = self.due[-1] if self.due else None
        self.backend.spread(self.pool, k, scales, weights, self.first + start, outs, last)
        if self.left_out:
            left = self.left_out(self.place + start, len(weights))
            for changed in (weights, *outs):
                put_back(changed, before, left)

    def arrived(self) -> None:
        """Forgets the moves that were due, if they are made for good."""
        if not self.anew:
            self.due.clear()

    def settle(self) -> None:
        """Makes the moves that are due, some tiles at a time."""
        if self.anew:
            return
        for start in range(0, len(self.weights) if self.due else 0, _SETTLED):
            weights = self.weights[start : start + _SETTLED]
            before = copied(weights) if self.left_out else weights
            self.backend.advance(self.pool, self.due, weights, self.first + start)
            if self.left_out:
                put_back(weights, before, self.left_out(self.place + start, len(weights)))
        self.arrived()


@dataclass
class PlainWalk:
    """A walk with room for one whole set of weights to compute losses with.

    Attributes:
        parts: each tensor, and where its weights of the next loss go (1, N).
        loss: of the weights last looked at, on the batch of a step.
    """

    parts: Sequence[tuple[Line, Any]]
    loss: Callable[[int], float]

    def losses(self, k: int, scales: Sequence[float], step: int) -> list[float]:
        """Computes one loss after another."""
        return [self._at(k, scale, step) for scale in scales]

    def move(self, k: int, change: float) -> None:
        """Adds change * z_k to the weights, at the next look or `settle`."""
        for line, _ in self.parts:
            line.due.append((k, change))

    def settle(self) -> None:
        """Makes the moves that are due."""
        for line, _ in self.parts:
            line.settle()

    def _at(self, k: int, scale: float, step: int) -> float:
        for line, out in self.parts:
            line.spread(k, (scale,), out)
            line.arrived()
        return self.loss(step)


@dataclass
class Steps:
    """What a training gave: a scalar for each direction (NaN where skipped), and the mean loss of each step."""

    scalars: npt.NDArray[np.float32]
    losses: list[float]

    @property
    def skipped(self) -> int:
        """Number of directions without a scalar."""
        return int(np.isnan(self.scalars).sum())


def train(walk: Walk, seeds: Coefficients, plan: ZeroOrder, on_step: OnStep | None = None) -> Steps:
    """Takes `plan.steps` steps along `seeds`.

    Args:
        walk: the weights; they are moved.
        seeds: numbers of the directions, `plan.directions` of each step after another.
        plan: hyper-parameters.
        on_step: told of every step.
    """
    scalars = np.full(len(seeds), np.nan, np.float32)
    losses: list[float] = []
    for step in range(plan.steps):
        around: list[float] = []
        turn = range(step * plan.directions, (step + 1) * plan.directions)
        for n in turn:
            plus, minus = walk.losses(int(seeds[n]), (plan.eps, -plan.eps), step)
            around += [plus, minus]
            if _sound(plus, minus, plan):
                g = np.float32((plus - minus) / (2 * plan.eps))
                scalars[n] = _scalar(walk, int(seeds[n]), g, plan, step)
        for n in turn:
            if not math.isnan(scalars[n]):
                walk.move(int(seeds[n]), -plan.learning_rate * float(scalars[n]) / plan.directions)
        losses.append(sum(around) / len(around))
        if on_step:
            on_step(step + 1, plan.steps, losses[-1])
    walk.settle()
    return Steps(scalars, losses)


def _sound(plus: float, minus: float, plan: ZeroOrder) -> bool:
    slope = abs(plus - minus) / (2 * plan.eps)
    sendable = slope < _STEEPEST or (plan.optimizer == "sign" and math.isfinite(slope))
    return sendable and (plan.loss_clip == 0 or abs(plus - minus) <= plan.loss_clip)


def _scalar(walk: Walk, k: int, g: np.float32, plan: ZeroOrder, step: int) -> np.float32:
    if plan.optimizer == "sign":
        return np.float32(np.sign(g))
    if plan.optimizer == "conservative":
        length = plan.learning_rate * float(g)
        losses = walk.losses(k, (0.0, -length, length), step)
        return np.float32(min(zip(losses, (0, 1, 1), (0, 1, -1), strict=True))[2] * g)
    return g


def copied(values: Any) -> Any:
    """Copies a numpy array or a torch tensor."""
    return values.copy() if isinstance(values, np.ndarray) else values.clone()


def put_back(values: Any, before: Any, left_out: Any) -> None:
    """Sets `values` to `before` where `left_out` says so: both numpy arrays, or both torch tensors."""
    if isinstance(values, np.ndarray):
        np.copyto(values, before, where=left_out, casting="unsafe")  # narrower values came from narrow ones
    else:
        values[left_out] = before[left_out].to(values.dtype)
