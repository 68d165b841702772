"""FedEx-LoRA: A and B are averaged, and what that leaves out goes into the base (Singhal et al., arXiv 2410.09432).

    A = sum_k p_k A_k,  B = sum_k p_k B_k        W <- W + s (sum_k p_k B_k A_k - B A)

so that W + s B A is the exact mean of the clients' models. The residual is a covariance, and is kept as one:

    sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B) (A_k - A)

in factors whose rank is at most that of K clients together: (K - 1) r. It is sent in factors too, never as a matrix;
as a `layer/A`, `layer/B` it knows no layout, so Conv1D and linear layers both add it the right way round. The state is
the averaged adapter beside the residual of every round, which a newcomer needs all of.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging, history, lowrank
from fedtune.codecs.compression import Compression, Link
from fedtune.lora import LoraSpec, key_a, key_b, layers_of, lora_scale, save_product, scale_array
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import DTYPES, Array, Manifest, Tensors

Fold = dict[str, tuple[Member, int, Tensors]]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FedExLoRA(Method):
    """FedAvg of LoRA factors made exact by a residual.

    Attributes:
        rank: of the one adapter all share.
        alpha: LoRA alpha; 0 means 2 r.
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors in the state, and on the wire while nothing compresses them.
        uplink: how updates travel: the name of a codec, or a table of the keys below. All but `raw` send how far the
            factors moved.
    """

    name: ClassVar[str] = "fedex-lora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    uplink: Link = Compression()

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A from `seed`; B is zero, and there is no residual."""
        adapter = averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed)
        return {**adapter, **history.begun(base, self.target_modules, self.dtype)}

    def admit(self, member: Member) -> Member:
        """Takes only clients of the shared rank and alpha."""
        return averaging.same_for_all(member, self.rank, self._alpha, "Averaging A and B needs equal shapes")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the adapter, and the residuals of the rounds after `since`."""
        return history.after(state, since)

    def fold(self, total: Fold | None, update: Tensors, member: Member, weight: int) -> Fold:
        """Keeps the factors under the client's id: the residual needs them beside their mean."""
        averaging.check(update, member)
        return {**(total or {}), member.id: (member, weight, update)}

    def finish(self, state: Tensors, total: Fold, weight: int) -> Tensors:
        """Averages the factors, and keeps the residual against the means as they are rounded."""
        replies = [total[client] for client in sorted(total)]
        sums: averaging.Total | None = None
        for member, n, update in replies:
            sums = averaging.add(sums, update, member, n)
        after = averaging.means(state, sums or {}, weight)
        parts = [(n / weight, update) for _, n, update in replies]
        residual = self._residual(parts, {name: after[name] for name in replies[0][2]})
        return {**after, **history.numbered(history.last(state) + 1, residual)}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Merges the residuals of missed rounds into the base, in order, and attaches the averaged adapter."""
        for residual in history.missed(received):
            job.merge(residual)
        adapter = _adapter(received)
        spec = LoraSpec(tuple(layers_of(adapter)), self.rank, self._alpha, self.dropout, self.rslora)
        job.attach(spec, adapter)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Continues to train the attached adapter."""
        return averaging.moved(job, averaging.as_sent(job.train_attached(), expected), expected, self.uplink)

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads a client's factors; what was compressed is how far they are from the state's."""
        return averaging.arrived(state, super().decode(payload, state, member), self.uplink)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A and B of every layer."""
        return Manifest.of(_adapter(state))

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes residuals and adapter as one adapter of scale 1."""
        adapter = {n: scale_array(a, self._scale) if n.endswith("/A") else a for n, a in _adapter(state).items()}
        factors = history.joined({**state, **history.numbered(history.last(state) + 1, adapter)})
        save_product(folder, factors, base_model)

    def _residual(self, parts: list[tuple[float, Tensors]], mean: Tensors) -> dict[str, Array]:
        """s sum_k p_k (B_k - B) (A_k - A) of every layer, in as few components as it has."""
        factors: dict[str, Array] = {}
        for layer in layers_of(mean):
            a, b = (mean[key].astype(np.float64) for key in (key_a(layer), key_b(layer)))
            a_ri = np.concatenate([p * self._scale * (u[key_a(layer)] - a) for p, u in parts], axis=0)
            b_or = np.concatenate([u[key_b(layer)] - b for _, u in parts], axis=1)
            small = lowrank.recompress(a_ri, b_or)
            factors[key_a(layer)] = small.a_ri.astype(DTYPES[self.dtype])
            factors[key_b(layer)] = small.b_or.astype(DTYPES[self.dtype])
        return factors

    @property
    def _alpha(self) -> float:
        return self.alpha or 2.0 * self.rank

    @property
    def _scale(self) -> float:
        return lora_scale(self.rank, self._alpha, self.rslora)


def _adapter(state: Tensors) -> dict[str, Array]:
    return {name: array for name, array in state.items() if not history.is_past(name)}
