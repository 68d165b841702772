"""Training one adapter on one client's rows: what every kind of run does with the loop."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedtune.config.schema import TrainingConfig
from fedtune.errors import TrainingError, problem
from fedtune.lora import LoraSpec
from fedtune.tensors import Array, Tensors
from fedtune.training.encoding import Encoded
from fedtune.training.loop import train
from fedtune.training.lora import injected
from fedtune.training.packing import Plan
from fedtune.training.scoring import Scorer
from fedtune.worker import OnStep


@dataclass(frozen=True)
class Bench:
    """What training needs beside an adapter: the model, its tokenizer, encoded rows, hyper-parameters."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    rows: list[Encoded]
    config: TrainingConfig
    on_step: OnStep | None = None

    def plan(self) -> Plan:
        """Returns what a training turn reads."""
        c = self.config
        packing = c.packing and self.scorer.packs
        return Plan(self.rows, c.max_length, packing, c.batch_size, c.steps, c.epochs, c.accumulate)


def fit_adapter(bench: Bench, spec: LoraSpec, factors: Tensors, seed: int) -> tuple[dict[str, Array], dict[str, float]]:
    """Trains an adapter that starts at `factors`; the model is left as it was before.

    Args:
        bench: model, rows and hyper-parameters.
        spec: the adapter's layers, rank and scale.
        factors: where it starts (`layer/A`, `layer/B`).
        seed: of the order of rows and of dropout.

    Returns:
        The new factors, float32, and the metrics of `fedtune.training.loop.train`.

    Raises:
        TrainingError: a loss is not finite, or no factor changed.
    """
    with injected(bench.scorer.model, spec, factors) as adapter:
        before = adapter.factors()
        metrics = train(
            bench.scorer, adapter.weights.values(), bench.plan().batches(seed), bench.config, seed, bench.on_step
        )
        after = adapter.factors()
    if all(np.array_equal(before[name], after[name]) for name in before):
        raise TrainingError(
            problem("update", "factors that changed", "the ones training began with", "Raise training.learning_rate")
        )
    return {name: np.asarray(array, np.float32) for name, array in after.items()}, metrics
