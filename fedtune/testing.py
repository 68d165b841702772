"""A model small enough to test with, and a worker that trains without torch: real protocol, toy arithmetic.

`ToyWorker` stands where `fedtune.training.worker.TorchWorker` stands. Its "training" draws factors from a generator
keyed by seed, round and client, so every runtime must reproduce the same bits, and rounds cost next to nothing.
"""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fedtune.base import open_base
from fedtune.capability import Capability, Cost
from fedtune.config import Config, Shared
from fedtune.directions import Coefficients, Pool, layout, reference
from fedtune.errors import ProtocolError, problem
from fedtune.lora import LoraSpec, find_layers, first_factors, is_table, key_a, key_b, layers_of, overlaid
from fedtune.method import Member, Method, Part, Tail, ZeroOrder
from fedtune.rounds import job_seed, round_seed
from fedtune.sparse import Smallest
from fedtune.tensors import Array, Tensors, digest
from fedtune.worker import OnStep
from fedtune.zo import Line, PlainWalk, put_back, train


def toy_base(folder: Path, *, layers: int = 2, width: int = 16, seed: int = 0, tokens: int = 0) -> Path:
    """Writes a model folder with `q_proj` (width x width) and `v_proj` (width/2 x width) in each layer; returns it.

    With `tokens` there is an embedding of so many as well.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    weights = {}
    for i in range(layers):
        weights[f"model.layers.{i}.self_attn.q_proj.weight"] = rng.normal(size=(width, width)).astype(np.float32)
        weights[f"model.layers.{i}.self_attn.v_proj.weight"] = rng.normal(size=(width // 2, width)).astype(np.float32)
    if tokens:
        weights["model.embed_tokens.weight"] = rng.normal(size=(tokens, width)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


class ToyJob:
    """A ClientJob on numpy arrays: merging and attaching are real, training is a seeded draw."""

    def __init__(self, worker: "ToyWorker", member: Member, seed: int, round_seed: int) -> None:
        self.member = member
        self.memory = worker.memory
        self.known: dict[str, Array] = {}
        self.seed, self.round_seed = seed, round_seed
        self._worker = worker

    def merge(self, factors: Tensors) -> None:
        """Adds B A to the base weights."""
        for layer in layers_of(factors):
            product = factors[key_b(layer)].astype(np.float32) @ factors[key_a(layer)].astype(np.float32)
            weight = self._worker.weights[f"{layer}.weight"]
            self._worker.weights[f"{layer}.weight"] = weight + (product.T if is_table(layer) else product)

    def rebase(self) -> None:
        """Goes back to the weights in the file."""
        self._worker.reset()

    def attach(self, spec: LoraSpec, factors: Tensors) -> None:
        """Remembers the adapter."""
        self._worker.attached = spec, overlaid(spec, self._worker.attached, factors)

    def fresh(self, spec: LoraSpec) -> Tensors:
        """Draws A; B is zero."""
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        factors: dict[str, Array] = {}
        for layer in spec.layers:
            outputs, inputs = _features(layer, self._worker.weights)
            factors[key_a(layer)], factors[key_b(layer)] = first_factors(rng, layer, spec.rank, inputs, outputs)
        return factors

    def train_fresh(self, spec: LoraSpec) -> Tensors:
        """Draws both factors."""
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        factors: dict[str, Array] = {}
        for layer in spec.layers:
            outputs, inputs = _features(layer, self._worker.weights)
            factors[key_a(layer)] = rng.normal(0, 0.1, (spec.rank, inputs)).astype(np.float32)
            factors[key_b(layer)] = rng.normal(0, 0.1, (outputs, spec.rank)).astype(np.float32)
        self._worker.report(self.member)
        return factors

    def attached(self) -> Tensors:
        """Returns the attached factors."""
        if self._worker.attached is None:
            raise ProtocolError(problem("adapter", "one attached before training", "none"))
        return self._worker.attached[1]

    def train_attached(self, frozen: Collection[str] = (), tail: Tail | None = None) -> Tensors:
        """Adds a draw to the attached adapter, but for the frozen sides; halves what is penalised."""
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        factors = self.attached()
        self._worker.report(self.member)
        drawn = {n: rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in factors.items()}
        after = {n: a if n.rsplit("/", 1)[1] in frozen else a + drawn[n] for n, a in factors.items()}
        if tail:
            for name, array in after.items():
                last = np.s_[tail.start :] if name.endswith("/A") else np.s_[:, tail.start :]
                array[last] = factors[name][last] / 2
        return after

    def layers(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Names the layers that `targets` name."""
        return tuple(layer.name for layer in find_layers(self._worker.stored.weights, targets))

    def shift(self, change: Tensors) -> None:
        """Adds to the weights in the file."""
        self._worker.reset()
        self._worker.change = dict(change)
        for name, array in change.items():
            self._worker.weights[name] = self._worker.weights[name] + (array if array.size else np.float32(0))

    def shifted(self) -> Tensors:
        """Returns what was added."""
        return self._worker.change

    def train_weights(self) -> Tensors:
        """Draws a step for every weight that was named."""
        rng = np.random.Generator(np.random.Philox(key=self.seed))
        self._worker.report(self.member)
        shapes = {name: self._worker.weights[name].shape for name in self._worker.change}
        return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}

    def replay(self, part: Part, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Rebuilds the weights from the file, or the factors from their seed."""
        self._worker.reset()
        tuned = self._worker.tuned = self._worker.base_of(part)
        for name, first in layout({name: array.size for name, array in tuned.items()}).items():
            flat = tuned[name].reshape(-1)
            before = flat.copy()
            reference.replay(pool, coefficients, exponent, flat, first, flat)
            if part.kind == "sparse":
                put_back(flat, before, Smallest.of(before, before, part.density).left_out(0, len(flat)))
        if part.lora is None:
            self._worker.weights = tuned
        return bytes.fromhex(digest(tuned))

    def zo_steps(self, part: Part, pool: Pool, seeds: Coefficients, plan: ZeroOrder) -> Array:
        """Steps down |w - c|^2 / 2, where c is one number, the client's own."""
        base = self._worker.base_of(part)
        first = layout({name: array.size for name, array in base.items()})
        goal = np.random.Generator(np.random.Philox(key=self.seed)).normal()
        parts, looked = [], []
        for name, array in self._worker.tuned.items():
            start = base[name].reshape(-1)
            left_out = Smallest.of(start, start, part.density).left_out if part.kind == "sparse" else None
            looked.append(np.empty((1, array.size), np.float32))
            parts.append((Line(pool, reference, array.reshape(-1).copy(), first[name], left_out), looked[-1]))
        walk = PlainWalk(parts, lambda _: sum(float(((w - goal) ** 2).sum()) for w in looked) / 2)
        done = train(walk, seeds, plan)
        self._worker.report(self.member)
        return done.scalars


class ToyWorker:
    """A client's model without torch."""

    def __init__(
        self, folder: Path, seed: int = 0, examples: int = 10, delay: Callable[[], None] | None = None
    ) -> None:
        self.stored = open_base(folder)
        self.base_digest = self.stored.digest
        self.examples = examples
        self.weights: dict[str, Array] = {}
        self.attached: tuple[LoraSpec, Tensors] | None = None
        self.tuned: dict[str, Array] = {}
        self.change: Tensors = {}
        self.metrics: dict[str, float] = {}
        self.memory: dict[str, Array] = {}
        self._folder, self._seed, self._delay = folder, seed, delay
        self.reset()

    def reset(self) -> None:
        """Goes back to the base weights, with nothing attached."""
        self.attached, self.change = None, {}
        self.weights = dict(load_file(self._folder / "model.safetensors"))
        self.tuned = self.weights

    def base_of(self, part: Part) -> dict[str, Array]:
        """What a seed method starts from: the weights of the file, or an adapter drawn from its seed."""
        weights = dict(load_file(self._folder / "model.safetensors"))
        if part.lora is None:
            return weights
        rng = np.random.Generator(np.random.Philox(key=part.seed))
        factors: dict[str, Array] = {}
        for layer in part.lora.layers:
            outputs, inputs = _features(layer, weights)
            factors[key_a(layer)], factors[key_b(layer)] = first_factors(rng, layer, part.lora.rank, inputs, outputs)
        return factors

    def measure(self, method: Method, member: Member) -> Capability:
        """States what its number of examples says: the more, the slower."""
        slow = self.examples / 10
        return Capability(Cost(slow, slow, slow / 8), Cost(0.0, 1.0, 0.0), room=10.0)

    def job(self, method: Method, member: Member, round_number: int) -> ToyJob:
        """Starts one round's turn."""
        seed = job_seed(self._seed, round_number, member.id)
        return ToyJob(self, member, seed, round_seed(self._seed, round_number))

    def report(self, member: Member) -> None:
        """Sets metrics as training would."""
        if self._delay:
            self._delay()
        self.metrics = {"loss": 1.0 / (1 + len(member.id)), "steps": 1.0}


def _features(layer: str, weights: Tensors) -> tuple[int, ...]:
    """Output and input features of a layer."""
    shape = weights[f"{layer}.weight"].shape
    return shape[::-1] if is_table(layer) else shape


def open_toy(config: Config, shared: Shared, index: int | None = None, on_step: OnStep | None = None) -> ToyWorker:
    """Stands where `TorchWorker.open` stands; client `index` has 10 + 3 `index` examples."""
    return ToyWorker(Path(config.model.name), shared.seed, 10 + 3 * (index or 0))
