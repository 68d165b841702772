"""HetLoRA: factors of mixed ranks, padded with zeros and averaged by norm (Cho et al. 2024, arXiv 2401.06432).

    A = sum_k w_k pad(A_k),  B = sum_k w_k pad(B_k)        w_k = |B_k A_k|_F / sum_j |B_j A_j|_F

Client j starts the next round from the leading r_j rows of A and columns of B. The norm is that of each layer, by
the Gram trick, |B A|^2 = <B'B, A A'>, never from the product. Clients may differ in scale: sqrt(s_k) goes into both
factors before they are padded, and is taken out again of a slice. The mean of factors is not that of products.

Rank self-pruning (`prune_gamma` below 1): a client of rank r adds a penalty to its loss,

    lambda sum_layers |B[:, g r:]| |A[g r:]|

and where that sum is smaller after its training than before, it drops those rows and columns, sends the rest, and has
rank g r from then on, at the scale it had. How many a client kept is plain from the length of what it sends.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging, lowrank
from fedtune.lora import LoraSpec, key_a, key_b, layers_of, lora_scale, save_product
from fedtune.method import BaseModel, ClientJob, Member, Method, Tail
from fedtune.tensors import Array, Manifest, Tensors

Fold = dict[str, tuple[Member, Tensors]]
_RANK = "hetlora/rank"
"""Name in a client's memory of the rank that pruning has left it."""


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class HetLoRA(Method):
    """LoRA of mixed ranks, padded and averaged.

    Attributes:
        rank: the largest rank a client may have; that of clients that name none, and of the exported adapter.
        alpha: LoRA alpha of clients that name none; 0 keeps each client's scale at 2 (alpha = 2 r).
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors on the wire and in the state.
        prune_gamma: share of its rank that a client keeps when it prunes itself; 1 prunes nobody.
        prune_penalty: lambda, the weight of the penalty on what would be pruned.
    """

    name: ClassVar[str] = "hetlora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    prune_gamma: float = Field(default=1.0, gt=0, le=1)
    prune_penalty: float = Field(default=1e-3, ge=0)

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A as PEFT does, from `seed`; B is zero."""
        return averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed)

    def admit(self, member: Member) -> Member:
        """Takes any rank from 1 to `rank` and any alpha above 0."""
        return averaging.any_mix(member, self.rank, self.alpha, self.rank, "method.rank")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the whole adapter."""
        return state

    def fold(self, total: Fold | None, update: Tensors, member: Member, weight: int) -> Fold:
        """Keeps the factors under the client's id: their weights are known when all are there."""
        averaging.check(update, member, self._scale(member))
        return {**(total or {}), member.id: (member, update)}

    def finish(self, state: Tensors, total: Fold, weight: int) -> Tensors:
        """Averages the padded factors, each layer by its norms, in order of client id."""
        replies = [total[client] for client in sorted(total)]
        after: dict[str, Array] = {}
        for layer in layers_of(state):
            parts = [(u[key_a(layer)], u[key_b(layer)], self._scale(m)) for m, u in replies]
            norms = np.array([s * lowrank.squared_norm(a, b) ** 0.5 for a, b, s in parts])
            shares = norms / norms.sum() if norms.any() else np.full(len(parts), 1 / len(parts))
            a_ri, b_or = np.zeros(state[key_a(layer)].shape), np.zeros(state[key_b(layer)].shape)
            for share, (a, b, s) in zip(shares, parts, strict=True):
                a_ri[: len(a)] += share * s**0.5 * a
                b_or[:, : len(a)] += share * s**0.5 * b
            after[key_a(layer)] = a_ri.astype(state[key_a(layer)].dtype)
            after[key_b(layer)] = b_or.astype(state[key_b(layer)].dtype)
        return after

    def notes(self, state: Tensors, total: Fold | None) -> dict[str, list[str]]:
        """Says which clients have pruned their rank, and to what."""
        ranks = {client: (_rank_of(update), member.rank) for client, (member, update) in sorted((total or {}).items())}
        pruned = [f"{client}: {rank} of {most}" for client, (rank, most) in ranks.items() if rank < most]
        return {"pruned": pruned} if pruned else {}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches the leading rows of A and columns of B, without the client's own scale."""
        rank, scale = self._rank(job), self._scale(job.member)
        alpha = scale / lora_scale(rank, 1.0, self.rslora)
        spec = LoraSpec(tuple(layers_of(received)), rank, alpha, self.dropout, self.rslora)
        job.attach(spec, averaging.sliced(received, rank, scale**-0.5, scale**-0.5))

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Continues to train the slice, and prunes it where its last components have become smaller."""
        rank = self._rank(job)
        kept = max(1, int(self.prune_gamma * rank))
        if kept == rank:
            return averaging.as_sent(job.train_attached(), expected)
        before, after = job.attached(), job.train_attached(tail=Tail(kept, self.prune_penalty))
        if _tail(after, kept) < _tail(before, kept):
            after, rank = averaging.sliced(after, kept, 1.0, 1.0), kept
        job.memory[_RANK] = np.array([rank])
        return averaging.as_sent(after, expected)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A of (r_k, I) and B of (O, r_k) for every layer; less after pruning."""
        return averaging.of_rank(state, member.rank)

    def encode(self, update: Tensors, manifest: Manifest) -> Iterable[memoryview | bytes]:
        """Yields the bytes of an update, whatever rank is left of it."""
        return super().encode(update, manifest if self.prune_gamma == 1 else Manifest.of(update))

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads an update of the rank that its length says; any from 1 to the client's own where clients prune."""
        one = self.template(state, replace(member, rank=1)).nbytes
        rank = memoryview(payload).nbytes // one if self.prune_gamma < 1 else member.rank
        return super().decode(payload, state, replace(member, rank=min(max(rank, 1), member.rank)))

    def sizes(self, state: Tensors, member: Member) -> tuple[int, int]:
        """Returns the bytes of rank 1, where clients prune, and of the client's rank."""
        fewest, most = (self.template(state, replace(member, rank=rank)).nbytes for rank in (1, member.rank))
        return (fewest if self.prune_gamma < 1 else most), most

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the padded adapter, with scale 1."""
        save_product(folder, state, base_model)

    def _scale(self, member: Member) -> float:
        return lora_scale(member.rank, member.alpha, self.rslora)

    def _rank(self, job: ClientJob) -> int:
        """The rank that is left to the client."""
        return int(job.memory[_RANK][0]) if _RANK in job.memory else job.member.rank


def _rank_of(update: Tensors) -> int:
    return int(update[key_a(layers_of(update)[0])].shape[0])


def _tail(factors: Tensors, start: int) -> float:
    """The sum of |B[:, start:]| |A[start:]| over all layers."""
    return sum(
        float(np.linalg.norm(factors[key_a(layer)][start:]) * np.linalg.norm(factors[key_b(layer)][:, start:]))
        for layer in layers_of(factors)
    )
