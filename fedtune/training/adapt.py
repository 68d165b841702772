"""Training one adapter on one client's rows: what every kind of run does with the loop."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import TrainingConfig
from fedtune.errors import TrainingError, problem
from fedtune.exact import LIMIT
from fedtune.lora import LoraSpec
from fedtune.method import Tail
from fedtune.tensors import Array, Tensors
from fedtune.training.encoding import Encoded
from fedtune.training.loop import train
from fedtune.training.lora import injected
from fedtune.training.packing import Plan
from fedtune.training.scoring import Scorer
from fedtune.training.shifting import ShiftedBase, moved
from fedtune.worker import OnStep


@dataclass(frozen=True)
class Bench:
    """What training needs beside an adapter: the model, its tokenizer, encoded rows, hyper-parameters.

    `measure` gives figures of the model as it is, on rows of the client's own.
    """

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    rows: list[Encoded]
    config: TrainingConfig
    on_step: OnStep | None = None
    measure: Callable[[], dict[str, float]] | None = None

    def plan(self) -> Plan:
        """Returns what a training turn reads."""
        c = self.config
        packing = c.packing and self.scorer.packs
        return Plan(self.rows, c.max_length, packing, c.batch_size, c.steps, c.epochs, c.accumulate)


def fit_adapter(
    bench: Bench,
    spec: LoraSpec,
    factors: Tensors,
    seed: int,
    frozen: Collection[str] = (),
    tail: Tail | None = None,
) -> tuple[dict[str, Array], dict[str, float]]:
    """Trains an adapter that starts at `factors`; the model is left as it was before.

    Args:
        bench: model, rows and hyper-parameters.
        spec: the adapter's layers, rank and scale.
        factors: where it starts (`layer/A`, `layer/B`).
        seed: of the order of rows and of dropout.
        frozen: sides (`A`, `B`) that are not trained.
        tail: a penalty that is added to each step's loss.

    Returns:
        The new factors, float32, and the metrics of `fedtune.training.loop.train`; with `measure`, also `own_loss` and
        the like of the trained model, and `own_loss_before` of the one that training began with.

    Raises:
        TrainingError: a loss is not finite, no factor changed, or one grew out of bounds.
    """
    with injected(bench.scorer.model, spec, factors, frozen) as adapter:
        before, own_before = adapter.factors(), measured(bench, "_before")
        penalty = partial(adapter.penalty, tail) if tail else None
        batches, outer = bench.plan().batches(seed), [w for name, w in adapter.weights.items() if name.endswith("/B")]
        metrics = train(bench.scorer, adapter.trained(), batches, bench.config, seed, bench.on_step, penalty, outer)
        metrics |= own_before | measured(bench)
        after = adapter.factors()
    _check(before, after)
    return after, metrics


def fit_weights(bench: Bench, base: ShiftedBase, seed: int) -> tuple[dict[str, Array], dict[str, float]]:
    """Trains the weights that the change of `base` names; they are left as they were before.

    Returns:
        How far they moved, float32, and the metrics as of `fit_adapter`.

    Raises:
        ModelError: the weights are not float32.
        TrainingError: a loss is not finite, no weight moved, or one moved out of bounds.
    """
    with base.moving() as weights:
        start, own_before = (
            {name: weight.detach().clone() for name, weight in weights.items()},
            measured(bench, "_before"),
        )
        metrics = train(bench.scorer, weights.values(), bench.plan().batches(seed), bench.config, seed, bench.on_step)
        metrics |= own_before | measured(bench)
        by = moved(weights, start, base.change)
    _check({name: np.zeros_like(array) for name, array in by.items()}, by)
    return by, metrics


def measured(bench: Bench, when: str = "") -> dict[str, float]:
    """Returns figures of the model as it is on the client's own rows (`own_loss` and the like), if it has some."""
    found = bench.measure() if bench.measure else {}
    return {f"own_{name}{when}": found[name] for name in ("loss", "accuracy") if name in found}


def _check(before: Tensors, after: Tensors) -> None:
    """Raises TrainingError unless something changed, and stayed within what methods can sum."""
    for name, array in after.items():
        # Norms inside a model hide infinities from the loss, so the factors are looked at themselves.
        largest = float(np.abs(array).max(initial=0.0))
        if not largest < LIMIT:
            want = f"magnitudes below {LIMIT:.0f}"
            raise TrainingError(problem(f"trained {name}", want, largest, "Lower training.learning_rate"))
    if all(np.array_equal(before[name], after[name]) for name in before):
        want, got = "factors that changed", "those that training began with"
        raise TrainingError(problem("update", want, got, "Raise training.learning_rate"))
