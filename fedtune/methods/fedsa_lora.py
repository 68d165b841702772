"""FedSA-LoRA: A is averaged, B stays with its client (Guo et al., ICLR 2025, arXiv 2410.01463).

    A = sum_k p_k A_k        client k computes W x + s B_k A x

A has been found to learn what clients have in common, and B what is their own. Every client ends with a model of its
own; B_k is in its memory (`fedtune.personal`) and no byte of it is sent. FedAvg-LoRA with `personal = ["lora_B"]` is
the same thing.
"""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging, personal
from fedtune.codecs.compression import Compression, Link
from fedtune.lora import LoraSpec, save_peft
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.tensors import Manifest, Tensors


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FedSALoRA(Method):
    """LoRA with a shared A and personal Bs.

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

    name: ClassVar[str] = "fedsa-lora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    uplink: Link = Compression()

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A from `seed`; of B there is only the shape."""
        why = "The B of an embedding is drawn, by each client anew, and As beside unlike Bs have no mean worth having"
        drawn = averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed, why)
        return personal.withheld(drawn, ["lora_B"])

    def admit(self, member: Member) -> Member:
        """Takes only clients of the shared rank and alpha."""
        return averaging.same_for_all(member, self.rank, self._alpha, "Averaging A needs equal shapes")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends A."""
        return state

    def fold(self, total: averaging.Total | None, update: Tensors, member: Member, weight: int) -> averaging.Total:
        """Adds weight * A."""
        return averaging.add(total, update, member, weight)

    def finish(self, state: Tensors, total: averaging.Total, weight: int) -> Tensors:
        """Divides by the summed weight."""
        return averaging.means(state, total, weight)

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches the mean A with the client's own B, which is zero at first."""
        spec = LoraSpec(averaging.layers_in(received), self.rank, self._alpha, self.dropout, self.rslora)
        job.attach(spec, personal.completed(job, spec, received))

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains both; sends A."""
        trained = job.train_attached()
        personal.keep(job, trained, expected)
        return averaging.moved(job, averaging.as_sent(trained, expected), expected, self.uplink)

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads a client's factors; what was compressed is how far they are from the state's."""
        return averaging.arrived(state, super().decode(payload, state, member), self.uplink)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects A of every layer."""
        return personal.shared(state)

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes A beside a B of zeros, into which every client puts its own (`fedtune.personal.own_adapter`)."""
        factors = personal.exported(state, self.rank)
        save_peft(folder, factors, rank=self.rank, alpha=self._alpha, rslora=self.rslora, base_model=base_model)

    @property
    def _alpha(self) -> float:
        return self.alpha or 2.0 * self.rank
