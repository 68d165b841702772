"""The central abstraction: a federated method is two halves and the bytes between them.

coordinator (no torch)                                             client (torch)
state -broadcast(since)-> Tensors == bytes ==> install, client_update -> Tensors
  ^                                                                        |
  '-- finish <- total <- fold <- Tensors <- decode <== bytes == encode ----'
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from fedtune.codecs.compression import Compression
from fedtune.directions import Coefficients, Pool
from fedtune.lora import LoraSpec
from fedtune.tensors import Array, Manifest, Tensors


@dataclass(frozen=True, slots=True)
class Member:
    """What the coordinator knows of one client. `rank` and `alpha` of 0 mean: the method's own.

    `depth` is how many transformer blocks, counted from the output, carry its adapter; 0 means all.
    """

    id: str
    rank: int = 0
    alpha: float = 0.0
    depth: int = 0

    def described(self) -> dict[str, str | int | float]:
        """Returns what a record of the run says of this client."""
        return {"client": self.id, "rank": self.rank, "alpha": self.alpha, "depth": self.depth}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The pretrained model as the coordinator sees it: names and shapes of the weights, never their values.

    `transposed` says that linear weights are stored I x O (Conv1D of GPT-2); `digest` is the SHA-256 of the weights.
    """

    name: str
    weights: Manifest
    digest: str
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class ZeroOrder:
    """Local training without gradients: `steps` steps, each along `directions` directions, with perturbations `eps`.

    `optimizer` is `sgd`, `sign` or `conservative`. A step whose two losses differ by more than `loss_clip` is skipped
    (0: by anything), and so is one whose scalar would not be finite or below `fedtune.kspace.LIMIT`.
    """

    steps: int
    directions: int
    eps: float
    learning_rate: float
    optimizer: str = "sgd"
    loss_clip: float = 0.0


@dataclass(frozen=True, slots=True)
class Part:
    """Which weights a seed method tunes.

    `all` of the model's own; the `sparse` ones, a fraction `density` of each tensor, those smallest in the base; or
    the factors of the adapter `lora` on it, whose A is drawn from `seed`.
    """

    kind: Literal["all", "sparse", "lora"] = "all"
    density: float = 1.0
    lora: LoraSpec | None = None
    seed: int = 0

    def to_text(self) -> dict[str, str]:
        """Writes it down, for the head of a file."""
        about = {"train": self.kind, "density": repr(self.density), "part_seed": str(self.seed)}
        if self.lora is None:
            return about
        layers = "\n".join(self.lora.layers)
        return {**about, "layers": layers, "rank": str(self.lora.rank), "alpha": repr(self.lora.alpha)}

    @classmethod
    def from_text(cls, about: Mapping[str, str]) -> "Part":
        """Reads what `to_text` wrote; raises KeyError or ValueError for anything else."""
        kind = about["train"]
        if kind == "lora":
            spec = LoraSpec(tuple(about["layers"].split("\n")), int(about["rank"]), float(about["alpha"]))
            return cls("lora", lora=spec, seed=int(about["part_seed"]))
        if kind not in ("all", "sparse"):
            raise ValueError(kind)
        return cls("all" if kind == "all" else "sparse", float(about["density"]))


@dataclass(frozen=True, slots=True)
class Tail:
    """A penalty on an adapter's last components: weight * sum over its layers of |B[:, start:]| |A[start:]|."""

    start: int
    weight: float


class ClientJob(Protocol):
    """What a method may ask of a client's model. Implemented with torch in `fedtune.training.job`.

    `memory` is kept by the client between rounds: what a turn leaves in it is there in the next one if the turn's
    update became part of its round, and otherwise never was. `known` is what `Method.install` has noted about the state
    that the model was brought to: it lasts exactly as long as the model keeps that state. `seed` is of what this client
    draws in this turn, `round_seed` of what all clients of the round draw alike.
    """

    member: Member
    memory: dict[str, Array]
    known: dict[str, Array]
    seed: int
    round_seed: int

    def merge(self, factors: Tensors) -> None:
        """Adds B A of each layer to the base weights; `factors` hold `layer/A` (R, I), `layer/B` (O, R)."""

    def rebase(self) -> None:
        """Goes back to the base as it was before anything was merged, bit for bit, with no adapter attached."""

    def attach(self, spec: LoraSpec, factors: Tensors) -> None:
        """Puts a LoRA adapter beside the base; factors that are left out stay those attached before."""

    def fresh(self, spec: LoraSpec) -> Tensors:
        """Draws a new adapter without training it: A from the job's seed, B zero; float32."""

    def train_fresh(self, spec: LoraSpec) -> Tensors:
        """Trains a new adapter (A drawn from the job's seed, B zero) on local data and returns its factors, float32.

        The model is left as it was before.
        """

    def attached(self) -> Tensors:
        """Returns the factors of the attached adapter, as they were attached; float32."""

    def train_attached(self, frozen: Collection[str] = (), tail: Tail | None = None) -> Tensors:
        """Trains the attached adapter on local data and returns its new factors, float32.

        The sides named in `frozen` (`A`, `B`) stay as they are, in every layer; `tail` is added to each step's loss.
        """

    def layers(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Names the layers of the base that `targets` name, as `fedtune.lora.find_layers` finds them."""

    def shift(self, change: Tensors) -> None:
        """Sets each weight that `change` names to base + change, in one rounding; `change` is kept for `shifted`.

        A tensor that has not changed yet has one axis more, of length 0.
        """

    def shifted(self) -> Tensors:
        """Returns the last change that `shift` was given; nothing before that."""

    def train_weights(self) -> Tensors:
        """Trains the weights that `shift` named on local data, and returns how far they moved, float32.

        The model is left as it was before.
        """

    def replay(self, part: Part, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Sets what `part` names to base + 2**-exponent * sum_k c_k z_k; returns the SHA-256 of it (32 bytes)."""

    def zo_steps(self, part: Part, pool: Pool, seeds: Coefficients, plan: ZeroOrder) -> Array:
        """Trains `part` along `seeds` (one a direction), and returns each one's scalar; NaN where it was skipped.

        The model is left as it was before.
        """


class Method(ABC):
    """A federated fine-tuning method.

    A subclass is a frozen dataclass of hyper-parameters: no I/O, clock, thread or global RNG. Its fields are its
    configuration (`[method]` in the TOML) and enter the settings digest of the handshake.

    Guarantees asked of a subclass: `fold` and `finish` give the same bits in whatever order clients arrive; `decode`
    raises WireError on any bytes that are not exactly what `template` announces.
    """

    name: ClassVar[str]
    takes_depth: ClassVar[bool] = False
    """Whether a client's adapter may be in part of the blocks only (`Member.depth`)."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Keys of `[training]` that have no effect on the method."""
    uplink: Compression = Compression()
    """How updates travel. A method that ships tensors has a field of this name (type `codecs.compression.Link`)."""

    @property
    def least_updates(self) -> int:
        """How many updates a round needs at least; `rounds.min_clients` may not be below."""
        return 1

    # coordinator: needs no model, holds one partial sum
    @abstractmethod
    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Returns the shared state of version 0."""

    def admit(self, member: Member) -> Member:
        """Fills in a client's defaults; raises ProtocolError when the method cannot take this client."""
        return member

    @abstractmethod
    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Returns what brings a client from version `since` to `state`; -1 is a client with only the base."""

    @abstractmethod
    def fold(self, total: Any, update: Tensors, member: Member, weight: int) -> Any:
        """Adds one update to the running total (None at first), which may be changed in place; order must not matter.

        What raises must leave the total as it was.
        """

    def take(self, total: Any, payload: memoryview | bytes, state: Tensors, member: Member, weight: int) -> Any:
        """Decodes and folds one encoded update; raises WireError on what `decode` would refuse.

        A method may override it to fold an update without making dense arrays of it: the total must be the same.
        """
        return self.fold(total, self.decode(payload, state, member), member, weight)

    @abstractmethod
    def finish(self, state: Tensors, total: Any, weight: int) -> Tensors:
        """Returns the next version of the state from a total of summed `weight`."""

    def notes(self, state: Tensors, total: Any) -> dict[str, list[str]]:
        """Says what `finish` made of a total that a round's record should tell: by a word, ids of clients or figures.

        `state` is what it returned.
        """
        return {}

    # client: works through the verbs of the job, so this file never imports torch
    def replaces(self, received: Tensors) -> bool:
        """Whether a broadcast takes the place of all that the client has received before, instead of adding to it."""
        return False

    def unpacked(self, job: ClientJob, received: Tensors) -> Tensors:
        """Returns the parts of the state that `broadcast` described; the digest that replicas report is of these."""
        return received

    @abstractmethod
    def install(self, job: ClientJob, received: Tensors) -> None:
        """Brings the client's model to the version that `broadcast` described."""

    @abstractmethod
    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains on local data and returns the update; `expected` is the template the coordinator issued."""

    # wire: decode is the trust boundary
    @abstractmethod
    def template(self, state: Tensors, member: Member) -> Manifest:
        """Returns the manifest an update of `member` must fit."""

    def encode(self, update: Tensors, manifest: Manifest) -> Iterable[memoryview | bytes]:
        """Yields the bytes of an update; `manifest` is the template the coordinator issued."""
        return self.uplink.coder.encode(update, manifest)

    def decode(self, payload: memoryview | bytes, state: Tensors, member: Member) -> Tensors:
        """Reads an update; raises WireError unless it is exactly what `template` announces, and finite."""
        return self.uplink.coder.decode(payload, self.template(state, member))

    def sizes(self, state: Tensors, member: Member) -> tuple[int, int]:
        """Returns the fewest and the most bytes an update of `member` can have."""
        most = self.uplink.coder.largest(self.template(state, member))
        return (most if self.uplink.exact else 1), most

    # use: what people take home
    @abstractmethod
    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes `state` as a PEFT adapter directory."""


def links(method: Method) -> dict[str, Compression]:
    """Returns how a method's tensors travel: its `uplink`, and its `downlink` if it has one."""
    found = {name: getattr(method, name, None) for name in ("uplink", "downlink")}
    return {name: link for name, link in found.items() if isinstance(link, Compression)}
