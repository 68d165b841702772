"""FLoRA: federated LoRA by stacking (Wang et al., NeurIPS 2024, arXiv 2409.05976, section 4).

Client k trains A_k (r_k x I) and B_k (O x r_k) from a fresh start, with scale s_k = alpha_k / r_k and p_k its share of
the examples. Stacking gives the exact mean of the products, whatever the ranks and scales:

    A_stack = [p_1 s_1 A_1 ; ... ; p_K s_K A_K]    B_stack = [B_1, ..., B_K]
    B_stack A_stack = sum_k p_k s_k B_k A_k

p_k and s_k both go into A, so clients may differ in alpha too; the paper puts only p_k there and needs one scale.
The state is base + one stack per closed round, under names `000003/layer/A`: a client receives only the rounds it
lacks and merges them into its base, in order.
"""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import exact
from fedtune.errors import ProtocolError, problem
from fedtune.lora import LoraSpec, find_layers, key_a, key_b, layers_of, lora_scale, save_peft
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import DTYPES, Array, Manifest, Tensors, TensorSpec

Fold = dict[str, tuple[Member, int, Tensors]]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FLoRA(Method):
    """FLoRA with any mix of ranks and alphas.

    Attributes:
        rank: rank of clients that name none.
        alpha: LoRA alpha of clients that name none; 0 keeps each client's scale at 2 (alpha = 2 r).
        max_rank: the largest rank a client may bring (`rank` itself is always taken).
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors on the wire and in the state.
    """

    name: ClassVar[str] = "flora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_rank: int = Field(default=256, ge=1)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Starts from stacks of rank 0: they hold no numbers, only the layers' shapes."""
        dtype = DTYPES[self.dtype]
        state: dict[str, Array] = {}
        for layer in find_layers(base.weights, self.target_modules, base.transposed):
            state[f"{_round(0)}/{key_a(layer.name)}"] = np.zeros((0, layer.inputs), dtype)
            state[f"{_round(0)}/{key_b(layer.name)}"] = np.zeros((layer.outputs, 0), dtype)
        return state

    def admit(self, member: Member) -> Member:
        """Takes any rank from 1 to `max_rank` and any alpha above 0."""
        rank, largest = member.rank or self.rank, max(self.rank, self.max_rank)
        if not 1 <= rank <= largest:
            raise ProtocolError(problem(f"rank of {member.id}", f"1 to {largest}", rank, "See method.max_rank"))
        alpha = member.alpha or self.alpha or 2.0 * rank
        if not 0 < alpha < inf:
            raise ProtocolError(problem(f"alpha of {member.id}", "a number above 0", alpha))
        return Member(member.id, rank, alpha)

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the stacks of the rounds after `since`; the first time with the empty ones of version 0."""
        return {name: array for name, array in state.items() if int(name[:6]) > since}

    def fold(self, total: Fold | None, update: Tensors, member: Member, weight: int) -> Fold:
        """Keeps the factors under the client's id: a stack is as large as what it is made of.

        Raises:
            WireError: s_k A_k or B_k reach 2048 in magnitude: training diverged, and a stack might overflow its dtype.
        """
        for name, array in update.items():
            exact.check_magnitude(array, f"{name} of {member.id}", self._scale(member) if name.endswith("/A") else 1.0)
        return {**(total or {}), member.id: (member, weight, update)}

    def finish(self, state: Tensors, total: Fold, weight: int) -> Tensors:
        """Stacks the updates in order of client id."""
        name = _round(last_round(state) + 1)
        replies = [total[client] for client in sorted(total)]
        stack: dict[str, Array] = {}
        for layer in layers_of(replies[0][2]):
            parts = [(u[key_a(layer)], n / weight * self._scale(m)) for m, n, u in replies]
            stack[f"{name}/{key_a(layer)}"] = _stacked_scaled(parts)
            stack[f"{name}/{key_b(layer)}"] = np.concatenate([u[key_b(layer)] for _, _, u in replies], axis=1)
        return {**state, **stack}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Merges each missed round into the base weights, in order."""
        for name in sorted({name[:6] for name in received} - {_round(0)}):
            job.merge({key[7:]: array for key, array in received.items() if key[:6] == name})

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains a fresh adapter of this client's own rank."""
        layers, member = tuple(layers_of(expected.names)), job.member
        factors = job.train_fresh(LoraSpec(layers, member.rank, member.alpha, self.dropout, self.rslora))
        return {name: array.astype(DTYPES[self.dtype], copy=False) for name, array in factors.items()}

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A of (r_k, I) and B of (O, r_k) for every layer."""
        specs = []
        for layer in layers_of([name[7:] for name in state if name[:6] == _round(0)]):
            inputs, outputs = (
                state[f"{_round(0)}/{key_a(layer)}"].shape[1],
                state[f"{_round(0)}/{key_b(layer)}"].shape[0],
            )
            specs.append(TensorSpec(key_a(layer), (member.rank, inputs), self.dtype))
            specs.append(TensorSpec(key_b(layer), (outputs, member.rank), self.dtype))
        return Manifest(tuple(specs))

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes all rounds as one adapter: their stacks, stacked, with scale 1."""
        factors = stacked(state)
        rank = max((factors[key_a(layer)].shape[0] for layer in layers_of(factors)), default=0)
        save_peft(folder, factors, rank=max(rank, 1), alpha=max(rank, 1), base_model=base_model)

    def _scale(self, member: Member) -> float:
        return lora_scale(member.rank, member.alpha, self.rslora)


def last_round(state: Tensors) -> int:
    """Number of the latest round in a state."""
    return max(int(name[:6]) for name in state)


def stacked(state: Tensors) -> dict[str, Array]:
    """Joins the stacks of all rounds: `layer/A` (R, I) and `layer/B` (O, R), R the sum of all ranks so far."""
    rounds = sorted({name[:6] for name in state})
    factors: dict[str, Array] = {}
    for layer in layers_of([name[7:] for name in state if name[:6] == rounds[0]]):
        factors[key_a(layer)] = np.concatenate([state[f"{r}/{key_a(layer)}"] for r in rounds], axis=0)
        factors[key_b(layer)] = np.concatenate([state[f"{r}/{key_b(layer)}"] for r in rounds], axis=1)
    return factors


def _round(number: int) -> str:
    return f"{number:06d}"


def _stacked_scaled(parts: Sequence[tuple[Array, float]]) -> Array:
    """p_k s_k A_k one below the other; each product is taken in float64 and rounded once."""
    first = parts[0][0]
    stack = np.empty((sum(a_ri.shape[0] for a_ri, _ in parts), first.shape[1]), first.dtype)
    row = 0
    for a_ri, factor in parts:
        rows = stack[row : row + a_ri.shape[0]]
        np.multiply(a_ri, factor, out=rows, dtype=np.float64, casting="same_kind")
        row += a_ri.shape[0]
    return stack
