"""Server optimisers: what the coordinator does with a round's mean change D of the shared state x.

    none       x <- x + lr D                                          FedAvg with lr = 1
    momentum   m <- b1 m + D             x <- x + lr m                FedAvgM (Hsu et al. 2019, arXiv 1909.06335)
    nesterov   m <- b1 m + D             x <- x + lr (D + b1 m)       DiLoCo (Douillard et al. 2023, arXiv 2311.08105)
    adam       m <- b1 m + (1 - b1) D    v <- b2 v + (1 - b2) D^2
    yogi       the same m                v <- v - (1 - b2) D^2 sign(v - D^2)
               both: x <- x + lr m / (sqrt(v) + tau)      Reddi et al. 2021, arXiv 2003.00295, algorithm 2

m starts at 0, v at tau^2; nothing corrects their bias. Squares are of D, and D is weighted by examples as in every
method here. The first three are linear in D and m, so they work on a product B A without forming it: its change and
its momentum are stacks of factors. adam and yogi need the square of every entry, which no stack has.
"""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from fedtune.tensors import PRIVATE, Array, Tensors

FIRST, SECOND = PRIVATE + "m/", PRIVATE + "v/"
"""Prefixes of the moments' names in the coordinator's state; float64."""
_RATES = {"none": 1.0, "momentum": 1.0, "nesterov": 0.7, "adam": 1e-3, "yogi": 1e-3}


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class ServerOptimizer:
    """The coordinator's own optimiser.

    Attributes:
        name: `none`, `momentum`, `nesterov`, `adam` or `yogi`.
        learning_rate: lr; 0 takes 1 for `none` and `momentum`, 0.7 for `nesterov`, 0.001 for `adam` and `yogi`.
        beta1: b1, share of the momentum that stays.
        beta2: b2, share of the squares that stays.
        tau: added to the root of the squares; the larger it is, the less they matter.
    """

    name: Literal["none", "momentum", "nesterov", "adam", "yogi"] = "none"
    learning_rate: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or _RATES[self.name]

    @property
    def is_plain(self) -> bool:
        """Whether x simply becomes x + D."""
        return self.name == "none" and self.rate == 1.0

    @property
    def is_linear(self) -> bool:
        """Whether the step is a sum of multiples of D and m."""
        return self.name in ("none", "momentum", "nesterov")

    def shares(self) -> tuple[float, float]:
        """Returns p and q of a linear step p D + q m, where m is the momentum before the round.

        The momentum after it is b1 m + D.
        """
        p, q = {"none": (1.0, 0.0), "momentum": (1.0, self.beta1), "nesterov": (1 + self.beta1, self.beta1**2)}[
            self.name
        ]
        return self.rate * p, self.rate * q

    def step(self, before: Tensors, mean: Tensors, state: Tensors) -> dict[str, Array]:
        """Moves arrays from `before` towards `mean`, entry by entry in float64.

        Args:
            before: the shared arrays as the round began.
            mean: the weighted means of what the clients sent, same names.
            state: where the moments of the last round are, if there are any.

        Returns:
            The new arrays, in the dtypes of `before`, and the new moments.
        """
        after: dict[str, Array] = {}
        for name, array in before.items():
            x = array.astype(np.float64)
            move, moments = self._moved(name, mean[name] - x, state)
            after[name] = (x + move).astype(array.dtype)
            after.update(moments)
        return after

    def _moved(self, name: str, d: Array, state: Tensors) -> tuple[Array, dict[str, Array]]:
        if self.name == "none":
            return self.rate * d, {}
        m = state.get(FIRST + name, np.zeros_like(d))
        if self.is_linear:
            p, q = self.shares()
            return p * d + q * m, {FIRST + name: self.beta1 * m + d}
        m = self.beta1 * m + (1 - self.beta1) * d
        v = state.get(SECOND + name, np.full_like(d, self.tau**2))
        sign = np.sign(v - d**2) if self.name == "yogi" else 1.0
        v = v - (1 - self.beta2) * (d**2 * sign if self.name == "yogi" else v - d**2)
        return self.rate * m / (np.sqrt(v) + self.tau), {FIRST + name: m, SECOND + name: v}


def _named(value: Any) -> Any:
    """Takes the name of an optimiser for a table that holds only this."""
    return {"name": value} if isinstance(value, str) else value


Outer = Annotated[ServerOptimizer, BeforeValidator(_named)]
"""The type of a method's field: a table of `ServerOptimizer`'s keys, or just its name."""
