"""FedAvg-LoRA, also called FedIT: clients' A and B are averaged separately (Zhang et al. 2023, arXiv 2305.05644).

    A = sum_k p_k A_k,  B = sum_k p_k B_k        p_k = n_k / sum_j n_j

It is the baseline that most frameworks ship. B A is not the mean of the B_k A_k, and all ranks must be equal.
The state is the averaged adapter, which every client continues to train.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import exact
from fedtune.errors import ProtocolError, problem
from fedtune.lora import LoraSpec, find_layers, kaiming_uniform, key_a, key_b, layers_of, save_peft
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import DTYPES, Array, Manifest, Tensors

Total = dict[str, exact.ExactSum]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FedAvgLoRA(Method):
    """FedAvg of LoRA factors.

    Attributes:
        rank: of the one adapter all share.
        alpha: LoRA alpha; 0 means 2 r.
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors on the wire and in the state.
    """

    name: ClassVar[str] = "fedavg-lora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A as PEFT does, from `seed`; B is zero."""
        rng = np.random.Generator(np.random.Philox(key=seed))
        state: dict[str, Array] = {}
        for layer in find_layers(base.weights, self.target_modules, base.transposed):
            state[key_a(layer.name)] = kaiming_uniform(rng, self.rank, layer.inputs).astype(DTYPES[self.dtype])
            state[key_b(layer.name)] = np.zeros((layer.outputs, self.rank), DTYPES[self.dtype])
        return state

    def admit(self, member: Member) -> Member:
        """Takes only clients of the shared rank and alpha."""
        if member.rank not in (0, self.rank) or member.alpha not in (0, self._alpha):
            want, got = (
                f"rank {self.rank} and alpha {self._alpha:g}",
                f"rank {member.rank} and alpha {member.alpha:g}",
            )
            remedy = "Averaging A and B needs equal shapes; method.name = 'flora' takes any mix"
            raise ProtocolError(problem(f"client {member.id}", want, got, remedy))
        return Member(member.id, self.rank, self._alpha)

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the whole adapter."""
        return state

    def fold(self, total: Total | None, update: Tensors, member: Member, weight: int) -> Total:
        """Adds weight * A and weight * B as integers, into `total` itself; a value too large changes nothing."""
        for name, array in update.items():
            exact.check_magnitude(array, f"{name} of {member.id}")
        return {
            name: exact.add(total[name] if total else None, array, weight, f"{name} of {member.id}")
            for name, array in update.items()
        }

    def finish(self, state: Tensors, total: Total, weight: int) -> Tensors:
        """Divides by the summed weight."""
        return {name: total[name].mean(weight, array.dtype) for name, array in state.items()}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches the averaged adapter."""
        job.attach(self._spec(received), received)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Continues to train the attached adapter."""
        factors = job.train_attached()
        return {name: array.astype(DTYPES[self.dtype], copy=False) for name, array in factors.items()}

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects what was sent."""
        return Manifest.of(state)

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the averaged adapter."""
        save_peft(folder, state, rank=self.rank, alpha=self._alpha, rslora=self.rslora, base_model=base_model)

    @property
    def _alpha(self) -> float:
        return self.alpha or 2.0 * self.rank

    def _spec(self, factors: Tensors) -> LoraSpec:
        return LoraSpec(tuple(layers_of(factors)), self.rank, self._alpha, self.dropout, self.rslora)
