"""RoLoRA: rounds train and average B and A in turn, the other one frozen (Chen et al. 2024, arXiv 2409.02346).

    round 1, 3, ...    B = sum_k p_k B_k    with A as it was        s B A = sum_k p_k s B_k A
    round 2, 4, ...    A = sum_k p_k A_k    with B as it was        s B A = sum_k p_k s B A_k

Each round's mean is the exact mean of the products, as in FFA-LoRA and at the same half of the bytes, and yet both
factors learn. The state's `turn` counts closed rounds.
"""

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging
from fedtune.codecs.compression import Compression, Link
from fedtune.lora import LoraSpec, save_peft
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import Manifest, Tensors


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class RoLoRA(Method):
    """LoRA whose factors are trained by turns.

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

    name: ClassVar[str] = "rolora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    uplink: Link = Compression()

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A from `seed`; B is zero."""
        why = "The A of an embedding begins at zero, so that the first round would train a B that counts for nothing"
        adapter = averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed, why)
        return {"turn": np.array([0], np.int64), **adapter}

    def admit(self, member: Member) -> Member:
        """Takes only clients of the shared rank and alpha."""
        return averaging.same_for_all(member, self.rank, self._alpha, "All clients train beside the same frozen factor")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends what the last round changed to who has been there, and both factors to who has not."""
        turn = int(state["turn"][0])
        return state if since < max(turn - 1, 0) else {"turn": state["turn"], **averaging.only(state, trained_in(turn))}

    def fold(self, total: averaging.Total | None, update: Tensors, member: Member, weight: int) -> averaging.Total:
        """Adds weight * B, or weight * A."""
        return averaging.add(total, update, member, weight)

    def finish(self, state: Tensors, total: averaging.Total, weight: int) -> Tensors:
        """Divides by the summed weight."""
        return {**averaging.means(state, total, weight), "turn": state["turn"] + 1}

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches what was received; the other factor stays as it is attached."""
        layers = averaging.layers_in(received)
        job.attach(LoraSpec(layers, self.rank, self._alpha, self.dropout, self.rslora), received)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains the factor whose turn it is."""
        frozen = "A" if expected.names[0].endswith("/B") else "B"
        return averaging.moved(
            job, averaging.as_sent(job.train_attached(frozen=frozen), expected), expected, self.uplink
        )

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads a client's factors; what was compressed is how far they are from the state's."""
        return averaging.arrived(state, super().decode(payload, state, member), self.uplink)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects the factor whose turn it is."""
        return Manifest.of(averaging.only(state, trained_in(int(state["turn"][0]) + 1)))

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the adapter."""
        save_peft(folder, state, rank=self.rank, alpha=self._alpha, rslora=self.rslora, base_model=base_model)

    @property
    def _alpha(self) -> float:
        return self.alpha or 2.0 * self.rank


def trained_in(number: int) -> str:
    """Which factor round `number` (1, 2, ...) trains: `B` in odd rounds, `A` in even ones."""
    return "B" if number % 2 else "A"
