"""A training function of your own as a fedtune worker: fedtune puts the adapter in, you train, fedtune takes it out.

    def open_worker(config, shared, index, on_step):      # runs once, on the client's machine
        model, loader = my_model(), my_loader(index)
        return OwnWorker(model, my_folder, len(loader), lambda model, seed: my_train(model, loader), shared.seed)

The function gets the model with a LoRA adapter in it, whose factors are the only weights that require a gradient (with
`fedavg`: the weights that are trained), and returns what it measured. It fits every runtime:
`fedtune_client.main.run`, and `fedtune.flower.client.client_app`.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeAlias

import numpy as np
from transformers import PreTrainedModel

from fedtune.base import open_base
from fedtune.capability import Capability
from fedtune.directions import Coefficients, Pool
from fedtune.errors import ProtocolError, TrainingError, problem
from fedtune.lora import LoraSpec
from fedtune.method import Member, Method, Part, Tail, ZeroOrder
from fedtune.rounds import job_seed, round_seed
from fedtune.tensors import Array, Tensors
from fedtune.training.job import TorchJob
from fedtune.training.lora import injected
from fedtune.training.merging import MergedBase
from fedtune.training.shifting import ShiftedBase, moved

TrainFunction: TypeAlias = Callable[[PreTrainedModel, int], dict[str, float]]
"""Trains the weights that require a gradient, in place, with all randomness from the seed; returns its metrics."""


class OwnWorker:
    """A `fedtune.worker.Worker` around a training function.

    Attributes:
        stored: the base model on disk.
        base_digest: fingerprint of its weights.
        examples: rows the function trains on: the weight of this client's update.
        metrics: what the last training returned.
        base: the model, with what has been merged into it.
        shifted: the model, with how far its own weights are from the base's.
        attached: adapter a method has attached, and its factors.
        memory: what the client keeps between rounds.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, examples: int, train: TrainFunction, seed: int) -> None:
        """Wraps a model.

        Args:
            model: as loaded from `folder`, on the device it is to be trained on.
            folder: the base model on disk; the coordinator has the same, and compares fingerprints.
            examples: at least 1.
            train: the function.
            seed: of the run (`shared.seed`).
        """
        self.stored = open_base(folder)
        self.base_digest = self.stored.digest
        self.examples = examples
        self.metrics: dict[str, float] = {}
        self.base = MergedBase(model)
        self.shifted = ShiftedBase(model)
        self.attached: tuple[LoraSpec, Tensors] | None = None
        self.memory: dict[str, Array] = {}
        self._train, self._seed = train, seed

    def reset(self) -> None:
        """Goes back to the base weights, with nothing attached."""
        self.base.reset()
        self.shifted.reset()
        self.attached = None

    def measure(self, method: Method, member: Member) -> Capability:
        """Raises ProtocolError: what one step of a function costs cannot be told from outside."""
        remedy = "State client.depth and client.rank by hand"
        raise ProtocolError(problem("client.measure", "false, with a training function of one's own", "true", remedy))

    def job(self, method: Method, member: Member, round_number: int) -> TorchJob:
        """Starts one round's turn."""
        seed = job_seed(self._seed, round_number, member.id)
        return TorchJob(self, member, seed, round_seed(self._seed, round_number))

    def fit(
        self, spec: LoraSpec, factors: Tensors, seed: int, frozen: Collection[str] = (), tail: Tail | None = None
    ) -> Tensors:
        """Puts an adapter in, calls the function, and takes the adapter out.

        Raises:
            TrainingError: the function changed nothing.
            ProtocolError: the method has a penalty to add to its loss.
        """
        if tail:
            remedy = "Set method.prune_gamma to 1: the function computes its loss itself"
            raise ProtocolError(problem("a penalty of the method", "fedtune's own training loop", "a function", remedy))
        with injected(self.base.model, spec, factors, frozen) as adapter:
            before = adapter.factors()
            self.metrics = self._called(seed)
            after = adapter.factors()
        _check(not all(np.array_equal(before[name], after[name]) for name in before))
        return after

    def fit_weights(self, seed: int) -> Tensors:
        """Calls the function with weights of the model's own to train, and puts them back.

        Raises:
            TrainingError: the function changed nothing.
        """
        with self.shifted.moving() as weights:
            before = {name: weight.detach().clone() for name, weight in weights.items()}
            self.metrics = self._called(seed)
            by = moved(weights, before, self.shifted.change)
        _check(any(array.any() for array in by.values()))
        return by

    def replay(self, part: Part, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Raises ProtocolError: seed methods train without gradients, in a loop of their own."""
        want = "a method that trains adapters, such as flora"
        raise ProtocolError(problem("a training function of one's own", want, "one that sends seeds"))

    def fit_seeds(self, part: Part, pool: Pool, seeds: Coefficients, plan: ZeroOrder, seed: int) -> Array:
        """Raises ProtocolError, as `replay` does before it."""
        raise ProtocolError(problem("a training function of one's own", "an adapter to train", "seeds"))

    def _called(self, seed: int) -> dict[str, float]:
        return {name: float(value) for name, value in self._train(self.base.model, seed).items()}


def _check(changed: bool) -> None:
    if not changed:
        want = "weights that the training function changed"
        remedy = "Train the weights that require a gradient, in place"
        raise TrainingError(problem("update", want, "those it was given", remedy))
