"""FLoRIST-style aggregation: FLoRA's stack, cut where its energy is (Ramesh et al. 2025, arXiv 2506.09199).

    B_stack A_stack = sum_k p_k s_k B_k A_k = U S V'        keep the least p with sum_{i<=p} S_i^2 >= tau sum_i S_i^2

The SVD is of the small core between the orthogonal parts of both stacks, never of the matrix. Every layer gets the
rank that its own spectrum asks for, so clients download far less than FLoRA's stack; with tau = 1 it is FLoRA. As
there, clients may have any rank and scale, merge each round into their base, and train a fresh adapter.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging, depth, history, lowrank, stacking
from fedtune.lora import LoraSpec, key_a, key_b, layers_of, lora_scale, save_product
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import DTYPES, Manifest, Tensors


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FLoRIST(Method):
    """Stacking with an energy threshold.

    Attributes:
        rank: rank of clients that name none.
        alpha: LoRA alpha of clients that name none; 0 keeps each client's scale at 2 (alpha = 2 r).
        max_rank: the largest rank a client may bring (`rank` itself is always taken).
        energy: tau, the share of each layer's squared norm that is kept; 1 keeps all.
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors on the wire and in the state.
    """

    name: ClassVar[str] = "florist"
    takes_depth: ClassVar[bool] = True

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_rank: int = Field(default=256, ge=1)
    energy: float = Field(default=0.9, gt=0, le=1)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Starts from stacks of rank 0."""
        return history.begun(base, self.target_modules, self.dtype)

    def admit(self, member: Member) -> Member:
        """Takes any rank from 1 to `max_rank`, any alpha above 0, any depth."""
        return averaging.any_mix(member, self.rank, self.alpha, max(self.rank, self.max_rank), "method.max_rank")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the rounds after `since`."""
        return history.after(state, since)

    def fold(self, total: stacking.Stack | None, update: Tensors, member: Member, weight: int) -> stacking.Stack:
        """Adds the factors to the round's stack, or their product where that is smaller."""
        reply = stacking.Reply(member, weight, self._scale(member), update)
        return (total or stacking.Stack()).add(reply, keep=False)

    def finish(self, state: Tensors, total: stacking.Stack, weight: int) -> Tensors:
        """Keeps the leading components of each layer's mean; where nobody carries a layer, nothing is added."""
        factors = total.mean(history.of_round(state, 0), {}, least="float64").factors
        for layer in layers_of(factors):
            kept = lowrank.recompress(factors[key_a(layer)], factors[key_b(layer)], energy=self.energy)
            factors[key_a(layer)] = kept.a_ri.astype(DTYPES[self.dtype])
            factors[key_b(layer)] = kept.b_or.astype(DTYPES[self.dtype])
        return {**state, **history.numbered(history.last(state) + 1, factors)}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Merges each missed round into the base weights, in order."""
        for factors in history.missed(received):
            job.merge(factors)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains a fresh adapter of this client's own rank."""
        layers, member = tuple(layers_of(expected.names)), job.member
        factors = job.train_fresh(LoraSpec(layers, member.rank, member.alpha, self.dropout, self.rslora))
        return averaging.as_sent(factors, expected)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A of (r_k, I) and B of (O, r_k) for every layer that carries the client's adapter."""
        return averaging.of_rank(depth.carried(history.of_round(state, 0), member.depth), member.rank)

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes all rounds as one adapter of scale 1."""
        save_product(folder, history.joined(state), base_model)

    def _scale(self, member: Member) -> float:
        return lora_scale(member.rank, member.alpha, self.rslora)
