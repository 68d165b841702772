"""All clients of a measured run: the real client runtime, and a worker that trains nothing."""

import os
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np
from fedtune_client.hosting import host

from fedtune.base import open_base
from fedtune.config import Config, Shared, load
from fedtune.locate import locate_model
from fedtune.lora import LoraSpec, key_a, key_b
from fedtune.method import Member, Method
from fedtune.tensors import Array, Tensors
from fedtune.worker import OnStep


class NoJob:
    """Keeps what it received and gives it back, moved by a constant of this client's own."""

    def __init__(self, worker: "NoWorker", member: Member) -> None:
        self.member, self.memory = member, {}
        self._worker = worker

    def merge(self, factors: Tensors) -> None:
        """There is no model to merge into."""

    def attach(self, spec: LoraSpec, factors: Tensors) -> None:
        self._worker.attached = factors

    def train_fresh(self, spec: LoraSpec) -> Tensors:
        factors: dict[str, Array] = {}
        for layer in spec.layers:
            outputs, inputs = self._worker.shapes[layer]
            factors[key_a(layer)] = np.full((spec.rank, inputs), self._worker.shift, np.float32)
            factors[key_b(layer)] = np.full((outputs, spec.rank), self._worker.shift, np.float32)
        return factors

    def train_attached(self) -> Tensors:
        return {name: array + self._worker.shift for name, array in self._worker.attached.items()}


class NoWorker:
    """A base that is only looked at."""

    def __init__(self, folder: Path, index: int) -> None:
        base = open_base(folder)
        self.base_digest, self.examples, self.metrics = base.digest, 10, {"loss": 0.1}
        self.shapes = {s.name.removesuffix(".weight"): s.shape for s in base.weights.specs}
        self.shift = np.float32(1e-3 * (1 + index))
        self.attached: Tensors = {}

    def reset(self) -> None:
        self.attached = {}

    def job(self, method: Method, member: Member, round_number: int) -> NoJob:
        return NoJob(self, member)


def open_worker(config: Config, shared: Shared, index: int | None, on_step: OnStep | None) -> NoWorker:
    return NoWorker(locate_model(shared.model.name), index or 0)


if __name__ == "__main__":
    sys.exit(host(load(Path(sys.argv[1])), sys.argv[2], open_worker))
