"""FedAvg-LoRA, also called FedIT: clients' A and B are averaged separately (Zhang et al. 2023, arXiv 2305.05644).

    A = sum_k p_k A_k,  B = sum_k p_k B_k        p_k = n_k / sum_j n_j

It is the baseline that most frameworks ship. B A is not the mean of the B_k A_k, and all ranks must be equal.
The state is the averaged adapter, which every client continues to train. Factors that `personal` names stay with their
client (`fedtune.personal`).
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fedtune import averaging, downlink, personal, trust
from fedtune.codecs.compression import Compression, Link
from fedtune.lora import LoraSpec, layers_of, lora_scale, save_peft
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.outer import Outer, ServerOptimizer
from fedtune.tensors import Manifest, Tensors


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FedAvgLoRA(Method):
    """FedAvg of LoRA factors.

    Attributes:
        rank: of the one adapter all share.
        alpha: LoRA alpha; 0 means 2 r.
        target_modules: last parts of the names of adapted modules, or `all-linear`.
        dropout: LoRA dropout while training.
        rslora: scale by alpha / sqrt(r) instead of alpha / r.
        dtype: of the factors in the state, and on the wire while nothing compresses them.
        personal: layers or factors that every client keeps to itself: globs such as `layers.3.*` or `lora_B`.
        uplink: how updates travel: the name of a codec, or a table of the keys below. All but `raw` send how far the
            factors moved.
        downlink: how the averaged adapter travels, likewise. The coordinator itself takes the step that it sends.
        server_optimizer: what the coordinator does with the means: `none` (they are the next factors), `momentum`,
            `nesterov`, `adam` or `yogi`, or a table of the keys below.
        krum_byzantine: f, clients a round that may be hostile: multi-Krum leaves out the f whose products B A are
            farthest from the others'. Rounds need 2 f + 3 updates.
        clip_norm: longest change of B A by a client, all layers together; longer ones are shortened; 0 shortens none.
    """

    name: ClassVar[str] = "fedavg-lora"

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rslora: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    personal: tuple[str, ...] = ()
    uplink: Link = Compression()
    downlink: Link = Compression()
    server_optimizer: Outer = ServerOptimizer()
    krum_byzantine: int = Field(default=0, ge=0, le=1000)
    clip_norm: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "FedAvgLoRA":
        if self._judges and self.personal:
            raise ValueError("krum_byzantine and clip_norm need the whole product B A: no factor may be personal")
        return self

    @property
    def least_updates(self) -> int:
        """What robust folding needs to tell the few from the many."""
        return 2 * self.krum_byzantine + 3 if self.krum_byzantine else 1

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Draws A as PEFT does, from `seed`; B is zero."""
        drawn = averaging.drawn(base, self.target_modules, self.rank, self.dtype, seed)
        return personal.withheld(drawn, self.personal) if self.personal else drawn

    def admit(self, member: Member) -> Member:
        """Takes only clients of the shared rank and alpha."""
        return averaging.same_for_all(member, self.rank, self._alpha, "Averaging A and B needs equal shapes")

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the whole adapter, or its last step if that is compressed."""
        return downlink.lacking(state, since)

    def fold(self, total: Any, update: Tensors, member: Member, weight: int) -> averaging.Total | averaging.Kept:
        """Adds weight * A and weight * B as integers, into `total` itself; a value too large changes nothing.

        Robust folding compares clients, so it keeps what each has sent.
        """
        return (averaging.keep if self._judges else averaging.add)(total, update, member, weight)

    def take(self, total: Any, payload: memoryview | bytes, state: Tensors, member: Member, weight: int) -> Any:
        """Folds ternary codes as they are: only the kept values are touched."""
        if self.uplink.codec != "ternary" or self._judges:
            return super().take(total, payload, state, member, weight)
        return averaging.add_codes(total, self.uplink.codes(payload, self.template(state, member)), member, weight)

    def finish(self, state: Tensors, total: Any, weight: int) -> Tensors:
        """Divides by the summed weight, and takes the server optimiser's step.

        Raises:
            RoundError: too few updates for multi-Krum.
        """
        if not self._judges:
            mean = averaging.onward(state, averaging.exact_means(total, weight), self.uplink)
            after = averaging.closed(state, mean, self.server_optimizer)
        else:
            judged = trust.averaged(state, total, self._scale, self.krum_byzantine, self.clip_norm)
            after = averaging.closed(state, judged.means, self.server_optimizer)
            after |= trust.noted(judged.left_out, judged.clipped)
        return downlink.taken(state, after, self.downlink)

    def notes(self, state: Tensors, total: Any) -> dict[str, list[str]]:
        """Names whom multi-Krum left out and whose change was shortened."""
        return trust.notes(state)

    def unpacked(self, job: ClientJob, received: Tensors) -> Tensors:
        """Adds a compressed step to the adapter this client holds."""
        return downlink.unpacked(job, received, self.downlink, self.dtype, self.personal)

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Attaches the averaged adapter, with the client's own factors where it has some."""
        spec = self._spec(received)
        job.attach(spec, personal.completed(job, spec, received))

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Continues to train the attached adapter."""
        trained = job.train_attached()
        personal.keep(job, trained, expected)
        return averaging.moved(job, averaging.as_sent(trained, expected), expected, self.uplink)

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads a client's factors, or, where they are compressed, how far they moved."""
        update = super().decode(payload, state, member)
        return averaging.arrived(state, update, self.uplink) if self._judges else update

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects what was sent."""
        return personal.shared(averaging.public(state))

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the averaged adapter, with zeros in place of personal factors (`fedtune.personal`)."""
        factors = personal.exported(averaging.public(state), self.rank)
        save_peft(folder, factors, rank=self.rank, alpha=self._alpha, rslora=self.rslora, base_model=base_model)

    @property
    def _alpha(self) -> float:
        return self.alpha or 2.0 * self.rank

    @property
    def _scale(self) -> float:
        return lora_scale(self.rank, self._alpha, self.rslora)

    @property
    def _judges(self) -> bool:
        return bool(self.krum_byzantine or self.clip_norm)

    def _spec(self, factors: Tensors) -> LoraSpec:
        return LoraSpec(tuple(layers_of(factors)), self.rank, self._alpha, self.dropout, self.rslora)
