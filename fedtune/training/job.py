"""One client's turn in one round: the verbs a method may use, on a torch model."""

from collections.abc import Collection, Sequence
from typing import Protocol

from fedtune.directions import Coefficients, Pool
from fedtune.errors import ProtocolError, problem
from fedtune.lora import LoraSpec, find_layers, overlaid
from fedtune.method import BaseModel, Member, Part, Tail, ZeroOrder
from fedtune.tensors import Array, Tensors
from fedtune.training.lora import fresh_factors
from fedtune.training.merging import MergedBase
from fedtune.training.shifting import ShiftedBase


class Holder(Protocol):
    """What a job needs of the worker that holds the weights."""

    stored: BaseModel
    base: MergedBase
    shifted: ShiftedBase
    attached: tuple[LoraSpec, Tensors] | None
    memory: dict[str, Array]

    def fit(
        self, spec: LoraSpec, factors: Tensors, seed: int, frozen: Collection[str] = (), tail: Tail | None = None
    ) -> Tensors:
        """Trains an adapter that starts at `factors`, but for the `frozen` sides, and returns its new ones."""

    def fit_weights(self, seed: int) -> Tensors:
        """Trains the weights that `shifted` names, and returns how far they moved."""

    def replay(self, part: Part, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Rebuilds what `part` names from the base, and returns its digest."""

    def fit_seeds(self, part: Part, pool: Pool, seeds: Coefficients, plan: ZeroOrder, seed: int) -> Array:
        """Trains `part` along `seeds`, and returns each one's scalar."""


class TorchJob:
    """A `fedtune.method.ClientJob`. It holds no weights: they are its worker's.

    Attributes:
        member: the client, as the coordinator admitted it.
        memory: what the client keeps between rounds.
        known: what the method has noted about the state the model holds.
        seed: of what this client draws in this turn.
        round_seed: of what all clients of the round draw alike.
    """

    def __init__(self, worker: Holder, member: Member, seed: int, round_seed: int) -> None:
        self.member = member
        self.memory: dict[str, Array] = worker.memory
        self.known: dict[str, Array] = {}
        self._worker = worker
        self.seed, self.round_seed = seed, round_seed

    def merge(self, factors: Tensors) -> None:
        """Adds B A of each layer to the base weights; layers of rank 0 stay as they are."""
        self._worker.base.merge(factors)

    def rebase(self) -> None:
        """Goes back to the base as it was, with no adapter attached."""
        self._worker.base.reset()
        self._worker.attached = None

    def attach(self, spec: LoraSpec, factors: Tensors) -> None:
        """Remembers an adapter beside the base; it is put into the model only while it trains."""
        self._worker.attached = spec, overlaid(spec, self._worker.attached, factors)

    def fresh(self, spec: LoraSpec) -> Tensors:
        """Draws a new adapter: A from the job's seed, B zero."""
        return fresh_factors(self._worker.base.model, spec, self.seed)

    def train_fresh(self, spec: LoraSpec) -> Tensors:
        """Trains a new adapter: A drawn from the job's seed, B zero."""
        return self._worker.fit(spec, self.fresh(spec), self.seed)

    def attached(self) -> Tensors:
        """Returns the factors of the attached adapter; raises ProtocolError when there is none."""
        return self._attached()[1]

    def train_attached(self, frozen: Collection[str] = (), tail: Tail | None = None) -> Tensors:
        """Trains the attached adapter further, but for the `frozen` sides; raises ProtocolError when there is none."""
        return self._worker.fit(*self._attached(), self.seed, frozen, tail)

    def layers(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Names the layers of the stored base that `targets` name; raises ConfigError for one that names none."""
        stored = self._worker.stored
        return tuple(layer.name for layer in find_layers(stored.weights, targets, stored.transposed))

    def shift(self, change: Tensors) -> None:
        """Sets each weight that `change` names to base + change, in one rounding."""
        self._worker.shifted.shift(change)

    def shifted(self) -> Tensors:
        """Returns the last change that `shift` was given."""
        return self._worker.shifted.change

    def train_weights(self) -> Tensors:
        """Trains the weights that `shift` named; the model is left as it was."""
        return self._worker.fit_weights(self.seed)

    def replay(self, part: Part, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Sets what `part` names to base + 2**-exponent * sum_k c_k z_k; returns the SHA-256 of it."""
        return self._worker.replay(part, pool, coefficients, exponent)

    def zo_steps(self, part: Part, pool: Pool, seeds: Coefficients, plan: ZeroOrder) -> Array:
        """Trains `part` along `seeds` and leaves it as it was; NaN stands where a step was skipped."""
        return self._worker.fit_seeds(part, pool, seeds, plan, self.seed)

    def _attached(self) -> tuple[LoraSpec, Tensors]:
        if self._worker.attached is None:
            raise ProtocolError(problem("adapter", "one attached before training", "none"))
        return self._worker.attached
