"""FedAvg of whole models: clients train the weights themselves (McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

    client k    w_k <- E epochs of local training that start at w        sends w_k - w
    server      w <- w + sum_k p_k (w_k - w)                             p_k = n_k / sum_j n_j

The base stays as it is on every machine: the state is the change since then, w - w_0 in float32, and w is w_0 plus
that, rounded once. Differences are summed exactly, so a compressed one loses what its codec leaves out and no more.

Until the first round closes a tensor of the state has one axis more, of length 0: its shape without its zeros.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from fedtune import averaging, downlink
from fedtune.codecs.compression import Compression, Link
from fedtune.errors import ConfigError, ProtocolError, problem
from fedtune.method import BaseModel, ClientJob, Member, Method
from fedtune.outer import Outer, ServerOptimizer
from fedtune.tensors import Array, Manifest, Tensors, TensorSpec
from fedtune.weights import save_weights

ALL = "all"
FILE = "change.safetensors"
_FLOATING = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class FedAvg(Method):
    """FedAvg of the weights themselves.

    Attributes:
        target_modules: last parts of the names of modules or weights that are trained (`q_proj`, `layers.3.mlp`,
            `norm`), or `all`.
        uplink: how far the weights moved, as it travels: the name of a codec, or a table of the keys below.
        downlink: how the mean travels, likewise. The coordinator itself takes the step that it sends.
        server_optimizer: what the coordinator does with the mean: `none`, `momentum`, `nesterov`, `adam` or `yogi`, or
            a table of the keys below.
    """

    name: ClassVar[str] = "fedavg"
    unused: ClassVar[tuple[str, ...]] = ("lora_plus",)

    target_modules: tuple[str, ...] = Field(default=(ALL,), min_length=1)
    uplink: Link = Compression()
    downlink: Link = Compression()
    server_optimizer: Outer = ServerOptimizer()

    def init(self, base: BaseModel, seed: int) -> Tensors:
        """Starts at the base: nothing has changed."""
        specs = chosen(base.weights, self.target_modules)
        return {spec.name: np.zeros((0, *spec.shape), np.float32) for spec in specs}

    def admit(self, member: Member) -> Member:
        """Takes every client that brings no rank of its own: there is no adapter."""
        if member.rank or member.alpha:
            got = f"rank {member.rank}, alpha {member.alpha:g}"
            raise ProtocolError(problem(f"client {member.id}", "no rank and no alpha: fedavg has no adapter", got))
        return member

    def broadcast(self, state: Tensors, since: int) -> Tensors:
        """Sends the whole change, or its last step if that is compressed."""
        return downlink.lacking(state, since)

    def fold(self, total: averaging.Total | None, update: Tensors, member: Member, weight: int) -> averaging.Total:
        """Adds weight * difference as integers, into `total` itself; a value too large changes nothing."""
        return averaging.add(total, update, member, weight)

    def take(self, total: Any, payload: memoryview | bytes, state: Tensors, member: Member, weight: int) -> Any:
        """Folds ternary codes as they are: only the kept values are touched."""
        if self.uplink.codec != "ternary":
            return super().take(total, payload, state, member, weight)
        return averaging.add_codes(total, self.uplink.codes(payload, self.template(state, member)), member, weight)

    def finish(self, state: Tensors, total: averaging.Total, weight: int) -> Tensors:
        """Adds the mean difference, as the server optimiser says."""
        before = {**state, **filled(averaging.public(state))}
        mean = {n: before[n] + d.mean(weight, np.dtype(np.float64)) for n, d in total.items()}
        return downlink.taken(before, averaging.closed(before, mean, self.server_optimizer), self.downlink)

    def unpacked(self, job: ClientJob, received: Tensors) -> Tensors:
        """Adds a compressed step to the change this client holds."""
        return downlink.stepped(filled(job.shifted()), received, self.downlink) if received else received

    def install(self, job: ClientJob, received: Tensors) -> None:
        """Sets the weights to base + change."""
        job.shift(received)

    def client_update(self, job: ClientJob, expected: Manifest) -> Tensors:
        """Trains the weights, and returns how far they moved."""
        return self.uplink.carry(averaging.as_sent(job.train_weights(), expected), expected, job.memory)

    def template(self, state: Tensors, member: Member) -> Manifest:
        """Expects a difference for each tensor that is trained."""
        shapes = {n: a.shape if a.size else a.shape[1:] for n, a in averaging.public(state).items()}
        return Manifest(tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items()))

    def export(self, state: Tensors, folder: Path, base_model: str) -> None:
        """Writes the change; `fedtune export` makes a full model of it."""
        save_change(folder, filled(averaging.public(state)), base_model)


def chosen(weights: Manifest, targets: Sequence[str]) -> list[TensorSpec]:
    """Lists the weights that `targets` name, in the base's order.

    Raises:
        ConfigError: a target fits no weight.
    """
    specs = [spec for spec in weights.specs if spec.dtype in _FLOATING and spec.nbytes]
    if ALL in targets:
        return specs
    for target in targets:
        if not any(_fits(spec.name, target) for spec in specs):
            choices = sorted({part for spec in specs for part in spec.name.split(".") if not part.isdigit()})
            raise ConfigError(problem("method.target_modules", f"names such as {choices[:20]}, or {ALL}", repr(target)))
    return [spec for spec in specs if any(_fits(spec.name, target) for target in targets)]


def filled(change: Tensors) -> dict[str, Array]:
    """Puts zeros where nothing has changed yet."""
    return {n: a if a.size else np.zeros(a.shape[1:], np.float32) for n, a in change.items()}


def save_change(folder: Path, change: Tensors, base_model: str) -> None:
    """Writes how far a model's weights are from its base's."""
    save_weights(folder / FILE, change, {"base": base_model})


def _fits(name: str, target: str) -> bool:
    """Whether `target` is a run of whole parts of a weight's name."""
    return f".{target}." in f".{name}."
