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

from fedtune.directions import Coefficients, Pool
from fedtune.method import ZeroOrder

OnStep = Callable[[int, int, float], None]


class Backend(Protocol):
    """`fedtune.directions.cpu`, `gpu`, `portable` or `reference`."""

    def perturb(self, pool: Pool, k: int, scale: float, base: Any, first: int, out: Any) -> None:
        """Sets `out` to base + scale * z_k."""

    def advance(
        self, pool: Pool, k: int, change: float, ahead: int, scale: float, weights: Any, first: int, out: Any
    ) -> None:
        """Adds change * z_k to `weights`, then sets `out` to weights + scale * z_ahead."""


@dataclass
class Walk:
    """Weights that move along directions of a pool.

    Attributes:
        pool: the directions.
        backend: computes them.
        parts: of each tensor the weights, where they begin in the pool, and the weights a loss is computed with; flat.
    """

    pool: Pool
    backend: Backend
    parts: Sequence[tuple[Any, int, Any]]
    _pending: list[tuple[int, float]] = field(default_factory=list)

    def look(self, k: int, scale: float) -> None:
        """Sets the weights of the next loss to weights + scale * z_k."""
        for weights, first, out in self.parts:
            for moved, change in self._pending[:-1]:
                self.backend.perturb(self.pool, moved, change, weights, first, weights)
            if self._pending:
                self.backend.advance(self.pool, *self._pending[-1], k, scale, weights, first, out)
            else:
                self.backend.perturb(self.pool, k, scale, weights, first, out)
        self._pending.clear()

    def move(self, k: int, change: float) -> None:
        """Adds change * z_k to the weights, at the next look or `settle`."""
        self._pending.append((k, change))

    def settle(self) -> None:
        """Makes the moves that are due."""
        for weights, first, _ in self.parts:
            for k, change in self._pending:
                self.backend.perturb(self.pool, k, change, weights, first, weights)
        self._pending.clear()


@dataclass
class Steps:
    """What a training gave: a scalar for each direction (NaN where skipped), and the mean loss of each step."""

    scalars: npt.NDArray[np.float32]
    losses: list[float]

    @property
    def skipped(self) -> int:
        """Number of directions without a scalar."""
        return int(np.isnan(self.scalars).sum())


def train(
    walk: Walk,
    seeds: Coefficients,
    plan: ZeroOrder,
    loss: Callable[[int], float],
    on_step: OnStep | None = None,
) -> Steps:
    """Takes `plan.steps` steps along `seeds`.

    Args:
        walk: the weights; they are moved.
        seeds: numbers of the directions, `plan.directions` of each step after another.
        plan: hyper-parameters.
        loss: of the weights last looked at, on the batch of a step (0, 1, ...).
        on_step: told of every step.
    """
    scalars = np.full(len(seeds), np.nan, np.float32)
    losses: list[float] = []
    for step in range(plan.steps):
        around: list[float] = []
        for n in range(step * plan.directions, (step + 1) * plan.directions):
            plus, minus = (_at(walk, int(seeds[n]), scale, loss, step) for scale in (plan.eps, -plan.eps))
            around += [plus, minus]
            if _sound(plus, minus, plan.loss_clip):
                scalars[n] = _scalar(walk, int(seeds[n]), np.float32((plus - minus) / (2 * plan.eps)), plan, loss, step)
        for n in range(step * plan.directions, (step + 1) * plan.directions):
            if not math.isnan(scalars[n]):
                walk.move(int(seeds[n]), -plan.learning_rate * float(scalars[n]) / plan.directions)
        losses.append(sum(around) / len(around))
        if on_step:
            on_step(step + 1, plan.steps, losses[-1])
    walk.settle()
    return Steps(scalars, losses)


def _at(walk: Walk, k: int, scale: float, loss: Callable[[int], float], step: int) -> float:
    walk.look(k, scale)
    return loss(step)


def _sound(plus: float, minus: float, clip: float) -> bool:
    finite = math.isfinite(plus) and math.isfinite(minus)
    return finite and (clip == 0 or abs(plus - minus) <= clip)


def _scalar(walk: Walk, k: int, g: np.float32, plan: ZeroOrder, loss: Callable[[int], float], step: int) -> np.float32:
    if plan.optimizer == "sign":
        return np.float32(np.sign(g))
    if plan.optimizer == "conservative":
        length = plan.learning_rate * float(g)
        tried = [(_at(walk, k, -factor * length, loss, step), abs(factor), factor) for factor in (0, 1, -1)]
        return np.float32(min(tried)[2] * g)
    return g
