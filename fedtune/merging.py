"""Merging adapters that were trained apart, with the arithmetic of PEFT; torch lives here.

    average           sum_k w_k t_k / sum_k w_k: of LoRA the mean of A and the mean of B
    task-arithmetic   sum_k w_k t_k                                    (Ilharco et al. 2023, arXiv 2212.04089)
    ties              trim, elect a sign, average those that agree     (Yadav et al. 2023, arXiv 2306.01708)
    dare              drop at random, rescale, sum                     (Yu et al. 2024, arXiv 2311.03099)
    breadcrumbs       drop the smallest and the very largest, sum      (Davari, Belilovsky 2023, arXiv 2312.06795)
    stack             sum_k w_k B_k A_k, exactly: [B_1 .. B_n] and [w_1 A_1; ..; w_n A_n], of all ranks together

t_k is what training changed: LoRA's weights, or those of IA3 less one. But for an average and a stack the weight of a
LoRA adapter goes onto A and onto B as its square root, as in PEFT's `add_weighted_adapter`: one alone becomes w B A,
and several have cross terms B_j A_k. A negative weight takes away what an adapter learned; an average has none.

Saved modules, biases and the magnitudes of DoRA are whole tensors, no change: only an average of them means anything.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import copysign, sqrt

import numpy as np
import torch
from peft.utils import merge_utils  # untyped: its results are given their type here

from fedtune.errors import ConfigError, ModelError, problem
from fedtune.lora import is_factor
from fedtune.tensors import Array, Tensors

METHODS = ("ties", "task-arithmetic", "dare", "breadcrumbs", "average", "stack")
_A, _B = (re.compile(rf"\.lora_({side}\.|embedding_{side}$)") for side in "AB")
_LARGEST = 0.01  # share of the largest magnitudes that breadcrumbs drops


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How to merge.

    Attributes:
        method: one of `METHODS`.
        weights: one for each adapter; empty means 1 for all.
        density: share of the values that ties, dare and breadcrumbs keep of each tensor.
        seed: of what dare drops.
    """

    method: str = "ties"
    weights: tuple[float, ...] = ()
    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(problem("--method", ", ".join(METHODS), self.method))
        if not 0 < self.density <= 1:
            raise ConfigError(problem("--density", "a number above 0, at most 1", self.density))


def merge(changes: Sequence[Tensors], how: Merge) -> dict[str, Array]:
    """Merges bags of the same names and shapes; computed in float32, returned in the first one's dtypes.

    Raises:
        ConfigError: there are more or fewer weights than adapters, for an average one is negative or all are 0, or the
            method is `stack`, which is a function of its own.
        ModelError: names or shapes differ, or a whole tensor is to be joined by another method than `average`.
    """
    weights = _weights(how, len(changes))
    _check_alike(changes)
    check_changes(changes[0], how)
    if how.method not in _RULES:
        raise ConfigError(problem("method", ", ".join(_RULES), how.method, "Call fedtune.merging.stack for it"))
    rule = _RULES[how.method]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        return {name: _merged(name, changes, weights, how, rule) for name in changes[0]}


def stack(adapters: Sequence[Tensors], how: Merge) -> dict[str, Array]:
    """Stacks LoRA factors as `load_peft` reads them, whose change is B A: `layer/A` (R, I), `layer/B` (O, R).

    A layer that an adapter lacks is one that it does not change. In the first dtype of each factor.

    Raises:
        ConfigError: there are more or fewer weights than adapters.
        ModelError: a layer has other sizes in one adapter than in another.
    """
    weights, out = _weights(how, len(adapters)), {}
    for name in sorted({name for adapter in adapters for name in adapter}):
        axis = 0 if name.endswith("/A") else 1
        parts = [(a[name], w if axis == 0 else 1.0) for a, w in zip(adapters, weights, strict=True) if name in a]
        sizes = {part.shape[1 - axis] for part, _ in parts}
        if len(sizes) > 1:
            raise ModelError(problem(name, "the same sizes in every adapter", sorted(sizes)))
        joined = np.concatenate([part.astype(np.float64) * weight for part, weight in parts], axis)
        out[name] = joined.astype(parts[0][0].dtype)
    return out


def check_changes(names: Iterable[str], how: Merge) -> None:
    """Raises ModelError when a tensor, by its name in PEFT's files, is none that `how` can join."""
    odd = next((name for name in names if not is_factor(name) and "ia3_l" not in name), "")
    if odd and how.method != "average":
        got = "a whole tensor (a saved module, a bias or a magnitude of DoRA), which adds up to nothing"
        raise ModelError(problem(odd, "what training changed (A and B of LoRA, or IA3)", got, "Use --method average"))


def _weights(how: Merge, count: int) -> list[float]:
    weights = list(how.weights) or [1.0] * count
    if len(weights) != count or not all(np.isfinite(weights)):
        raise ConfigError(problem("--weights", f"{count} numbers, one an adapter", how.weights))
    if how.method == "average":
        total = sum(weights)
        if min(weights) < 0 or not total:
            want, remedy = "none below 0 and not all 0, for an average", "task-arithmetic takes negative ones"
            raise ConfigError(problem("--weights", want, how.weights, remedy))
        weights = [weight / total for weight in weights]
    return weights


def _check_alike(changes: Sequence[Tensors]) -> None:
    first = {name: array.shape for name, array in changes[0].items()}
    for number, other in enumerate(changes[1:], 2):
        shapes = {name: array.shape for name, array in other.items()}
        if shapes != first:
            odd = next(name for name in sorted({*first, *shapes}) if first.get(name) != shapes.get(name))
            want, got = first.get(odd, "no such tensor"), shapes.get(odd, "no such tensor")
            remedy = "Only adapters of the same layers and ranks can be merged; --method stack takes any LoRA"
            raise ModelError(problem(f"adapter {number}: {odd}", want, got, remedy))


Rule = Callable[[list[torch.Tensor], torch.Tensor, float], torch.Tensor]


def _merged(name: str, changes: Sequence[Tensors], weights: Sequence[float], how: Merge, rule: Rule) -> Array:
    arrays = [torch.from_numpy(change[name].astype(np.float32)) for change in changes]
    own = weights if how.method == "average" else [_of_factor(name, weight) for weight in weights]
    return rule(arrays, torch.tensor(own), how.density).numpy().astype(changes[0][name].dtype)


def _of_factor(name: str, weight: float) -> float:
    """The part of an adapter's weight that goes onto this tensor: a minus onto A alone."""
    if _A.search(name):
        return copysign(sqrt(abs(weight)), weight)
    return sqrt(abs(weight)) if _B.search(name) else weight


def _breadcrumbs(arrays: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    return _sum([_middle(array, density) for array in arrays], weights, density)


def _middle(array: torch.Tensor, density: float) -> torch.Tensor:
    """Keeps a share `density` of the magnitudes, those just below the largest."""
    order = array.abs().reshape(-1).argsort(descending=True, stable=True)
    dropped = min(round(_LARGEST * order.numel()), order.numel() - 1)
    kept = order[dropped : dropped + max(1, round(density * order.numel()))]
    out = torch.zeros_like(array).reshape(-1)
    out[kept] = array.reshape(-1)[kept]
    return out.reshape(array.shape)


def _sum(arrays: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    total: torch.Tensor = merge_utils.task_arithmetic(arrays, weights)
    return total


_RULES: Mapping[str, Rule] = {
    "average": _sum,
    "task-arithmetic": _sum,
    "ties": merge_utils.ties,
    "dare": merge_utils.dare_linear,
    "breadcrumbs": _breadcrumbs,
}
