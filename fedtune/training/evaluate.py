"""How well a model does on rows it was not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from fedtune.config import Config
from fedtune.config.schema import DataConfig, TrainingConfig
from fedtune.lora import load_peft
from fedtune.methods import fedavg
from fedtune.methods.fedkseed import FILE
from fedtune.tensors import Tensors
from fedtune.training.data import held_out_rows, with_columns
from fedtune.training.encoding import Encoded, Row, encode_rows, fork
from fedtune.training.loop import autocast
from fedtune.training.merging import MergedBase
from fedtune.training.models import choose_device, load_model, resolve_model
from fedtune.training.packing import Plan
from fedtune.training.scoring import Scorer
from fedtune.training.seeded import SeedAdapter
from fedtune.training.shifting import ShiftedBase, load_change
from fedtune.training.zo import rebuilt

MAX_CHOICES = 16


@dataclass(frozen=True)
class Examination:
    """Rows made ready to be scored, once for any number of models that share a tokenizer.

    Attributes:
        rows: encoded rows; with `choices`, each has a branch per possible answer.
        answers: number of the right choice of each row; empty without choices.
        choices: the possible answers.
    """

    rows: tuple[Encoded, ...]
    answers: tuple[int, ...] = ()
    choices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataConfig, max_length: int
    ) -> "Examination":
        """Encodes rows; with a label and few different responses, the response becomes a choice among them."""
        choices = sorted({str(row[data.response]) for row in rows}) if data.label and data.response else []
        if not 2 <= len(choices) <= MAX_CHOICES:
            return cls(tuple(encode_rows(rows, tokenizer, data, max_length)))
        each = [
            encode_rows([{**row, data.response: choice} for row in rows], tokenizer, data, max_length)
            for choice in choices
        ]
        answers = tuple(choices.index(str(row[data.response])) for row in rows)
        return cls(tuple(fork(options) for options in zip(*each, strict=True)), answers, tuple(choices))


def evaluate(scorer: Scorer, exam: Examination, config: TrainingConfig) -> dict[str, float]:
    """Scores a model.

    Returns:
        `loss` in nats an answer token, `perplexity`, `tokens` (of answers) and `rows`; and with choices, `accuracy`
        and `macro_f1` of taking the likeliest answer.
    """
    sums, counts = _sums(scorer, exam, config)
    right = np.array(exam.answers, np.int64) if exam.choices else np.zeros(len(exam.rows), np.int64)
    line = np.arange(len(exam.rows))
    tokens = counts[line, right].sum()
    loss = float(sums[line, right].sum() / tokens)
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": float(tokens),
        "rows": float(len(exam.rows)),
    }
    if exam.choices:
        chosen = sums.argmin(axis=1)
        result["accuracy"] = float((chosen == right).mean())
        result["macro_f1"] = _macro_f1(chosen, right)
    return result


@dataclass(frozen=True)
class Evaluator:
    """A base model with held-out rows, against which adapters are measured one after another."""

    merged: MergedBase
    scorer: Scorer
    exam: Examination
    config: TrainingConfig

    @classmethod
    def open(cls, config: Config, rows: Sequence[Row] | None = None) -> "Evaluator":
        """Loads the model and the held-out rows of a configuration; `rows` takes their place.

        Raises:
            FedtuneError: model or data are missing or unusable.
        """
        held = held_out_rows(config) if rows is None else rows
        if config.client.threads:
            torch.set_num_threads(config.client.threads)
        folder = resolve_model(config.model.name, config.model.revision)
        model, tokenizer = load_model(folder, config.model.dtype, choose_device(config.client.device))
        exam = Examination.of(held, tokenizer, with_columns(config.data), config.training.max_length)
        return cls(MergedBase(model), Scorer.probe(model), exam, config.training)

    def base(self) -> dict[str, float]:
        """Measures the base model."""
        return self.factors({})

    def adapter(self, folder: Path) -> dict[str, float]:
        """Measures the base with what a run made: a PEFT directory, or the file of FedKSeed or FedAvg.

        Raises:
            ModelError: it does not fit.
        """
        if (folder / FILE).exists():
            return self.seeds(folder)
        if (folder / fedavg.FILE).exists():
            return self.change(load_change(folder))
        return self.factors(load_peft(folder))

    def seeds(self, folder: Path) -> dict[str, float]:
        """Measures the model that a FedKSeed run tuned; the base is put back afterwards."""
        held = rebuilt(self.merged.model, folder)
        try:
            if isinstance(held, SeedAdapter):
                return self.factors(held.scaled())
            return evaluate(self.scorer, self.exam, self.config)
        finally:
            held.reset()

    def change(self, change: Tensors) -> dict[str, float]:
        """Measures the base with its own weights changed; the base is put back afterwards."""
        shifted = ShiftedBase(self.merged.model)
        try:
            shifted.shift(change)
            return evaluate(self.scorer, self.exam, self.config)
        finally:
            shifted.reset()

    def factors(self, factors: Tensors) -> dict[str, float]:
        """Measures the base with B A of `factors` (`layer/A`, `layer/B`) added; the base is put back afterwards."""
        try:
            self.merged.merge(factors)
            return evaluate(self.scorer, self.exam, self.config)
        finally:
            self.merged.reset()


def _sums(
    scorer: Scorer, exam: Examination, config: TrainingConfig
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Negative log-likelihood and number of tokens of every choice of every row (rows, choices)."""
    shape = len(exam.rows), max(1, len(exam.choices))
    sums, counts = np.zeros(shape), np.zeros(shape, np.int64)
    # Where rows cannot share a sequence, neither can branches: then each choice is a row of its own.
    rows, owners = (exam.rows, None) if scorer.packs or not exam.choices else _apart(exam)
    plan = Plan(rows, config.max_length, config.packing and scorer.packs, config.batch_size, 0)
    with torch.no_grad(), autocast(config, scorer.model.device):
        for batch in plan.once():
            losses = scorer(batch).double().cpu().numpy()
            row, choice = (batch.rows, np.maximum(batch.branches - 1, 0)) if owners is None else owners[:, batch.rows]
            np.add.at(sums, (row, choice), losses)
            np.add.at(counts, (row, choice), 1)
    return sums, counts


def _apart(exam: Examination) -> tuple[tuple[Encoded, ...], npt.NDArray[np.int64]]:
    """Cuts forked rows into one row a choice; returns them with their row and choice (2, rows)."""
    rows, owners = [], []
    for number, row in enumerate(exam.rows):
        for choice in range(len(exam.choices)):
            rows.append(_branch(row, choice + 1))
            owners.append((number, choice))
    return tuple(rows), np.array(owners, np.int64).T


def _branch(row: Encoded, branch: int) -> Encoded:
    kept = (row.branches == 0) | (row.branches == branch)
    mine = row.target_branches == branch
    place = np.cumsum(kept) - 1
    trunk = np.zeros(int(kept.sum()), np.int64)
    return replace(
        row,
        ids=row.ids[kept],
        positions=row.positions[kept],
        branches=trunk,
        at=place[row.at[mine]],
        targets=row.targets[mine],
        target_branches=trunk[: int(mine.sum())],
    )


def _macro_f1(chosen: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> float:
    """Mean over the choices of 2 TP / (2 TP + FP + FN), of those that occur."""
    scores = []
    for choice in np.union1d(chosen, right):
        hits = int(((chosen == choice) & (right == choice)).sum())
        scores.append(2 * hits / (int((chosen == choice).sum()) + int((right == choice).sum())))
    return float(np.mean(scores))
