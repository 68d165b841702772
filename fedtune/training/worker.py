"""A client's model, data and hyper-parameters in memory, ready for one round after another."""

from collections.abc import Collection, Sequence
from functools import partial

import torch

from fedtune.base import open_base
from fedtune.capability import Capability
from fedtune.config import Config, Shared
from fedtune.directions import Coefficients, Pool
from fedtune.lora import LoraSpec, layers_of
from fedtune.method import BaseModel, Member, Method, Part, Tail, ZeroOrder
from fedtune.rounds import job_seed, round_seed
from fedtune.tensors import Array, Tensors
from fedtune.training.adapt import Bench, fit_adapter, fit_weights
from fedtune.training.data import client_rows, own_split, with_columns
from fedtune.training.encoding import Row, encode_rows
from fedtune.training.evaluate import Examination, evaluate
from fedtune.training.job import TorchJob
from fedtune.training.merging import MergedBase
from fedtune.training.models import choose_device, load_model, resolve_model
from fedtune.training.probe import probe
from fedtune.training.scoring import Scorer
from fedtune.training.seeded import Seeded
from fedtune.training.shifting import ShiftedBase
from fedtune.training.zo import fit_seeds, seeded
from fedtune.worker import OnStep


class TorchWorker:
    """Holds what a client trains with.

    Attributes:
        stored: the base model on disk.
        base_digest: fingerprint of its weights.
        examples: rows this client trains on.
        metrics: of the last training.
        base: the model, with what has been merged into it.
        shifted: the model, with how far its own weights are from the base's.
        attached: adapter a method has attached, and its factors.
        memory: what the client keeps between rounds.
    """

    def __init__(self, bench: Bench, stored: BaseModel, seed: int, low_memory: bool = False) -> None:
        self.stored, self.base_digest = stored, stored.digest
        self.examples = len(bench.rows)
        self.metrics: dict[str, float] = {}
        self.base = MergedBase(bench.scorer.model)
        self.shifted = ShiftedBase(bench.scorer.model)
        self.attached: tuple[LoraSpec, Tensors] | None = None
        self.memory: dict[str, Array] = {}
        self._replayed: tuple[Part, Seeded] | None = None
        self._low_memory = low_memory
        self._bench = bench
        self._seed = seed

    @classmethod
    def open(
        cls,
        config: Config,
        shared: Shared,
        index: int | None = None,
        on_step: OnStep | None = None,
        rows: Sequence[Row] | None = None,
    ) -> "TorchWorker":
        """Loads model and data.

        Args:
            config: this machine's data, device and threads.
            shared: model, training and seed as the coordinator gave them.
            index: which part of `[simulation]`'s partition is this client's; None means all of its data.
            on_step: told of every training step.
            rows: take the place of the configured data.

        Raises:
            FedtuneError: model or data are missing or unusable.
        """
        if config.client.threads:
            torch.set_num_threads(config.client.threads)
        rows = client_rows(config, index) if rows is None else rows
        folder = resolve_model(shared.model.name, shared.model.revision)
        stored = open_base(folder)
        model, tokenizer = load_model(folder, shared.model.dtype, choose_device(config.client.device))
        data, length = with_columns(config.data), shared.training.max_length
        learned, held = own_split(rows, config)
        encoded, scorer = encode_rows(learned, tokenizer, data, length), Scorer.probe(model)
        exam = Examination.of(held, tokenizer, data, length) if held else None
        measure = partial(evaluate, scorer, exam, shared.training) if exam else None
        bench = Bench(scorer, tokenizer, encoded, shared.training, on_step, measure)
        return cls(bench, stored, shared.seed, config.client.low_memory)

    def reset(self) -> None:
        """Goes back to the base weights, with nothing attached."""
        self.base.reset()
        self.shifted.reset()
        if self._replayed is not None:
            self._replayed[1].reset()
        self.attached = None

    def measure(self, method: Method, member: Member) -> Capability:
        """Trains for a few steps and forgets them."""
        layers = layers_of(method.template(method.init(self.stored, self._seed), member).names)
        return probe(self._bench, layers, member.rank)

    def job(self, method: Method, member: Member, round_number: int) -> TorchJob:
        """Starts one round's turn."""
        seed = job_seed(self._seed, round_number, member.id)
        return TorchJob(self, member, seed, round_seed(self._seed, round_number))

    def fit(
        self, spec: LoraSpec, factors: Tensors, seed: int, frozen: Collection[str] = (), tail: Tail | None = None
    ) -> Tensors:
        """Trains an adapter and remembers the metrics."""
        trained, self.metrics = fit_adapter(self._bench, spec, factors, seed, frozen, tail)
        return trained

    def fit_weights(self, seed: int) -> Tensors:
        """Trains the weights that `shifted` names and remembers the metrics."""
        moved, self.metrics = fit_weights(self._bench, self.shifted, seed)
        return moved

    def replay(self, part: Part, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Rebuilds what `part` names from the base, and returns its digest."""
        return self._held(part).replay(pool, coefficients, exponent)

    def fit_seeds(self, part: Part, pool: Pool, seeds: Coefficients, plan: ZeroOrder, seed: int) -> Array:
        """Trains `part` along `seeds` and remembers the metrics."""
        scalars, self.metrics = fit_seeds(self._bench, self._held(part), pool, seeds, plan, seed)
        return scalars

    def _held(self, part: Part) -> Seeded:
        if self._replayed is None or self._replayed[0] != part:
            self._replayed = part, seeded(self.base.model, part, self._low_memory)
        return self._replayed[1]
