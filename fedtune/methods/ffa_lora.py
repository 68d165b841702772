"""FFA-LoRA: A is drawn once and frozen, only B is trained and averaged (Sun et al., ICLR 2024, arXiv 2403.12313).

    sum_k p_k s B_k A_0 = s (sum_k p_k B_k) A_0        p_k = n_k / sum_j n_j

With one A for all, the mean of the B_k is the exact mean of the products. A travels once, down; then B alone goes each
way: half the bytes of FedAvg-LoRA. The price is that the change can never leave the rows of A_0.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fedtune import averaging, trust
from fedtune.codecs.compression import Compression, Link
from fedtune.lora import LoraSpec, lora_scale, save_peft
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.outer import Outer, ServerOptimizer
from fedtune.tensors import Manifest, Tensors


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FFALoRA(Method):
    """LoRA with A frozen.

    Attributes:
        rank: of the one adapter all share.
        alpha: LoRA alpha; 0 means 2 r.
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors in the state, and on the wire while nothing compresses them.
        uplink: how updates travel: the name of a codec, or a table of the keys below. All but `raw` send how far the
            factors moved.
        server_optimizer: what the coordinator does with the means: `none` (they are the next factors), `momentum`,
            `nesterov`, `adam` or `yogi`, or a table of the keys below.
        krum_byzantine: f, clients a round that may be hostile: multi-Krum leaves out the f whose products B A are
            farthest from the others'. Rounds need 2 f + 3 updates.
        clip_norm: longest change of B A by a client, all layers together; longer ones are shortened; 0 shortens none.
        trim: the mean of each entry of B leaves out so many of its largest and of its smallest values, and counts all
            other clients the same. It takes the place of the two above, and needs one A for all, as this method has.
    """

    name: ClassVar[str] = "ffa-lora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    uplink: Link = Compression()
    server_optimizer: Outer = ServerOptimizer()
    krum_byzantine: int = Field(default=0, ge=0, le=1000)
    clip_norm: float = Field(default=0.0, ge=0)
    trim: int = Field(default=0, ge=0, le=1000)

    @model_validator(mode="after")
    def _check(self) -> "FFALoRA":
        if self.trim and (self.krum_byzantine or self.clip_norm):
            raise ValueError("trim takes the place of krum_byzantine and clip_norm: set only one kind of robust mean")
        return self

    @property
    def least_updates(self) -> int:
        """What robust folding needs to tell the few from the many."""
        return max(2 * self.trim + 1, 2 * self.krum_byzantine + 3 if self.krum_byzantine else 1)

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A_0 from the run's seed; B is zero."""
        why = "The A of an embedding begins at zero, and would stay there: choose a method that trains A"
        return averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed, why)

    def admit(self, member: Member) -> Member:
        """Takes only clients of the shared rank and alpha."""
        return averaging.same_for_all(member, self.rank, self._alpha, "All clients train their B for the same A")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends B, and A the first time."""
        return averaging.public(state) if since < 0 else averaging.only(state, "B")

    def fold(self, total: Any, update: Tensors, member: Member, weight: int) -> averaging.Total | averaging.Kept:
        """Adds weight * B; robust means compare clients, so they keep what each has sent."""
        return (averaging.keep if self._judges else averaging.add)(total, update, member, weight)

    def finish(self, state: Tensors, total: Any, weight: int) -> Tensors:
        """Divides by the summed weight, and takes the server optimiser's step.

        Raises:
            RoundError: too few updates for a robust mean.
        """
        if self.trim:
            return averaging.closed(state, trust.trimmed(total, self.trim), self.server_optimizer)
        if not self._judges:
            return averaging.closed(state, averaging.exact_means(total, weight), self.server_optimizer)
        judged = trust.averaged(state, total, self._scale, self.krum_byzantine, self.clip_norm)
        after = averaging.closed(state, judged.means, self.server_optimizer)
        return {**after, **trust.noted(judged.left_out, judged.clipped)}

    def notes(self, state: Tensors, total: Any) -> dict[str, list[str]]:
        """Names whom multi-Krum left out and whose change was shortened."""
        return trust.notes(state)

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches the mean B; A stays as it is attached."""
        layers = averaging.layers_in(received)
        job.attach(LoraSpec(layers, self.rank, self._alpha, self.dropout, self.rslora), received)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains B."""
        return averaging.moved(
            job, averaging.as_sent(job.train_attached(frozen=("A",)), expected), expected, self.uplink
        )

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads a client's factors; what was compressed is how far they are from the state's."""
        return averaging.arrived(state, super().decode(payload, state, member), self.uplink)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects B of every layer."""
        return Manifest.of(averaging.only(state, "B"))

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the adapter of A_0 and the mean B."""
        factors = averaging.public(state)
        save_peft(folder, factors, rank=self.rank, alpha=self._alpha, rslora=self.rslora, base_model=base_model)

    @property
    def _judges(self) -> bool:
        return bool(self.krum_byzantine or self.clip_norm or self.trim)

    @property
    def _scale(self) -> float:
        return lora_scale(self.rank, self._alpha, self.rslora)

    @property
    def _alpha(self) -> float:
        return self.alpha or 2.0 * self.rank
