"""Training in one place (`fedtune train`), by the very steps that a federation of one client takes in one round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.base import open_base
from fedtune.config import Config, Shared
from fedtune.config.members import member_config, member_ids, member_of
from fedtune.errors import ProtocolError, problem
from fedtune.lora import key_b, layers_of, save_peft
from fedtune.method import BaseModel, Member
from fedtune.methods.fedavg import FedAvg, save_change
from fedtune.rounds import Replica, Round, admit
from fedtune.tensors import Tensors
from fedtune.training.encoding import Row
from fedtune.training.models import resolve_model
from fedtune.training.worker import TorchWorker
from fedtune.worker import OnStep


@dataclass(frozen=True)
class Trained:
    """An adapter (`layer/A`, `layer/B`), or how far weights moved; whose training it was, and its metrics."""

    factors: Tensors
    member: Member
    metrics: dict[str, float]

    def save(self, config: Config, folder: Path) -> None:
        """Writes the adapter as a PEFT directory, with its own rank and alpha; or the change of the weights."""
        if isinstance(config.method, FedAvg):
            folder.mkdir(parents=True, exist_ok=True)
            save_change(folder, self.factors, config.model.name)
            return
        save_peft(
            folder,
            self.factors,
            rank=self.member.rank,
            alpha=self.member.alpha,
            rslora=bool(getattr(config.method, "rslora", False)),
            base_model=config.model.name,
        )


def train_centralised(
    config: Config, rows: Sequence[Row] | None = None, on_step: OnStep | None = None, index: int | None = None
) -> Trained:
    """Trains one adapter for one round: `training.steps` or `training.epochs`, from `run.seed`.

    Guarantees: the factors are bit for bit those of the only client of a federation after its first round, on the same
    kind of machine with the same number of arithmetic threads (`client.threads`, or else `simulation.threads`).

    Args:
        config: the run.
        rows: what to train on; None means the configured data.
        on_step: told of every step.
        index: train as this client of the simulation: on its part of the data, with its rank and alpha.

    Raises:
        FedtuneError: model or data are missing or unusable, or training fails.
    """
    if index is None:
        threads = config.client.threads or config.simulation.threads
        config = replace(config, client=replace(config.client, threads=threads))
    else:
        config = member_config(config, index, config.client.address)
    worker = TorchWorker.open(config, Shared.of(config), index, on_step, rows)
    base = open_base(resolve_model(config.model.name, config.model.revision), config.model.name)
    return train_with(worker, config, base, index or 0)


def train_with(worker: TorchWorker, config: Config, base: BaseModel, index: int = 0) -> Trained:
    """Trains an opened worker for one round, as simulated client `index` would be.

    Raises:
        ProtocolError: the method's update is no whole adapter.
        TrainingError: training fails.
    """
    stated = replace(member_of(config.client), id=member_ids(config)[index])
    member = admit(config.method, stated)
    first = Round(config.method, config.method.init(base, config.run.seed), 1)
    task, job = first.task(member), worker.job(config.method, member, 1)
    Replica().install(config.method, task, job)
    update = config.method.client_update(job, task.update)
    layers = layers_of(update)
    if isinstance(config.method, FedAvg):
        return Trained(update, member, worker.metrics)
    if not layers or not all(key_b(layer) in update for layer in layers):
        want, remedy = (
            "a method whose update is a LoRA adapter or how far weights moved",
            "Set method.name to flora, to compare with any of them",
        )
        raise ProtocolError(problem("method.name", want, config.method.name, remedy))
    return Trained(update, member, worker.metrics)
