"""One client's turn in one round: the verbs a method may use, on a torch model."""

from typing import Protocol

import numpy as np

from fedtune.errors import ProtocolError, problem
from fedtune.lora import LoraSpec
from fedtune.method import Member
from fedtune.tensors import Array, Tensors
from fedtune.training.lora import fresh_factors
from fedtune.training.merging import MergedBase


class Holder(Protocol):
    """What a job needs of the worker that holds the weights."""

    base: MergedBase
    attached: tuple[LoraSpec, Tensors] | None
    memory: dict[str, Array]

    def fit(self, spec: LoraSpec, factors: Tensors, seed: int) -> Tensors:
        """Trains an adapter that starts at `factors`, and returns its new ones."""


class TorchJob:
    """A `fedtune.method.ClientJob`. It holds no weights: they are its worker's.

    Attributes:
        member: the client, as the coordinator admitted it.
        memory: what the client keeps between rounds.
    """

    def __init__(self, worker: Holder, member: Member, seed: int) -> None:
        self.member = member
        self.memory: dict[str, Array] = worker.memory
        self._worker = worker
        self._seed = seed

    def merge(self, factors: Tensors) -> None:
        """Adds B A of each layer to the base weights for good; layers of rank 0 stay as they are."""
        self._worker.base.merge(factors)

    def attach(self, spec: LoraSpec, factors: Tensors) -> None:
        """Remembers an adapter beside the base; it is put into the model only while it trains."""
        self._worker.attached = spec, {name: np.array(array, np.float32) for name, array in factors.items()}

    def train_fresh(self, spec: LoraSpec) -> Tensors:
        """Trains a new adapter: A drawn from the job's seed, B zero."""
        return self._worker.fit(spec, fresh_factors(self._worker.base.model, spec, self._seed), self._seed)

    def train_attached(self) -> Tensors:
        """Trains the attached adapter further.

        Raises:
            ProtocolError: none is attached.
        """
        if self._worker.attached is None:
            raise ProtocolError(problem("adapter", "one attached before training", "none"))
        return self._worker.fit(*self._worker.attached, self._seed)
