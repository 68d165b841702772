"""FlexLoRA: sum the products, hand each client the best slice of its own rank (Bai et al. 2024, arXiv 2402.11505).

    sum_k p_k s_k B_k A_k = U S V'        client j starts from  B = U_r S_r / s_j,  A = V_r',  r = r_j

The sum is never formed: the SVD is of the small core between the two stacks (`fedtune.lowrank`), with the same result.
The state is its best part of rank `rank`, the largest a client may have. All receive the same bytes and take their
slice themselves, so that each can prove what it was given; a smaller client downloads more than it uses.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging, lowrank, stacking
from fedtune.lora import LoraSpec, is_table, key_a, key_b, layers_of, lora_scale, save_product
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import Array, Manifest, Tensors


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FlexLoRA(Method):
    """LoRA of mixed ranks, redistributed by SVD.

    Attributes:
        rank: the largest rank a client may have; that of clients that name none, and of the exported adapter.
        alpha: LoRA alpha of clients that name none; 0 keeps each client's scale at 2 (alpha = 2 r).
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors on the wire and in the state.
    """

    name: ClassVar[str] = "flexlora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A as PEFT does, from `seed`; B is zero."""
        return averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed)

    def admit(self, member: Member) -> Member:
        """Takes any rank from 1 to `rank` and any alpha above 0."""
        return averaging.any_mix(member, self.rank, self.alpha, self.rank, "method.rank")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the whole adapter."""
        return state

    def fold(self, total: stacking.Stack | None, update: Tensors, member: Member, weight: int) -> stacking.Stack:
        """Adds the factors to the round's stack, or their product where that is smaller."""
        reply = stacking.Reply(member, weight, self._scale(member), update)
        return (total or stacking.Stack()).add(reply, keep=False)

    def finish(self, state: Tensors, total: stacking.Stack, weight: int) -> Tensors:
        """Decomposes the weighted sum of products; rows of A for which it has no component stay, with B zero.

        Of an embedding it is the other way round.
        """
        mean = total.mean(state, {}, least="float64").factors
        after: dict[str, Array] = {}
        for layer in layers_of(state):
            best = lowrank.recompress(mean[key_a(layer)], mean[key_b(layer)], rank=self.rank)
            root, kept = np.sqrt(best.singular), len(best.singular)
            a, b = state[key_a(layer)].copy(), state[key_b(layer)].copy()
            (a if is_table(layer) else b)[:] = 0  # as in the first draw: the product is zero, and can be learned
            a[:kept], b[:, :kept] = best.a_ri / root[:, None], best.b_or * root
            after[key_a(layer)], after[key_b(layer)] = a, b
        return after

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches the client's slice: its leading rows of A, its leading columns of B over its own scale."""
        member = job.member
        spec = LoraSpec(tuple(layers_of(received)), member.rank, member.alpha, self.dropout, self.rslora)
        job.attach(spec, averaging.sliced(received, member.rank, 1.0, 1.0 / self._scale(member)))

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Continues to train the slice."""
        return averaging.as_sent(job.train_attached(), expected)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A of (r_k, I) and B of (O, r_k) for every layer."""
        return averaging.of_rank(state, member.rank)

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the best adapter of rank `rank`, with scale 1."""
        save_product(folder, state, base_model)

    def _scale(self, member: Member) -> float:
        return lora_scale(member.rank, member.alpha, self.rslora)
