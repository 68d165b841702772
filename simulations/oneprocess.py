"""A study's arms in one process: the plain loop of `fedtune.simulation`, whose bits are those of the real programs.

Models, data and encoded rows are kept from arm to arm, so an arm costs its training and nothing else. What is written
has the form of `fedtune simulate`'s and `fedtune train`'s reports, as far as a study reads them; `seconds` are of
training and of the coordinator's arithmetic, without starting programs, sockets and disks, and bytes are of payloads
alone, without the messages around them.
"""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fedtune.base import open_base
from fedtune.config import Config
from fedtune.config.members import member_config, member_ids, member_of
from fedtune.config.schema import DataConfig, ModelConfig, RunConfig, SimulationConfig
from fedtune.report.own import own_figures
from fedtune.simulation import RoundResult, simulate
from fedtune.training.adapt import Bench
from fedtune.training.centralised import train_with
from fedtune.training.data import all_client_rows, client_rows, own_split, with_columns
from fedtune.training.encoding import encode_rows
from fedtune.training.evaluate import Evaluator, Examination, evaluate
from fedtune.training.models import choose_device, load_model, resolve_model
from fedtune.training.scoring import Scorer
from fedtune.training.worker import TorchWorker


@dataclass(frozen=True)
class Dealt:
    """What decides a client's rows."""

    run: RunConfig
    data: DataConfig
    simulation: SimulationConfig
    model: ModelConfig
    length: int

    @classmethod
    def of(cls, config: Config) -> "Dealt":
        """Leaves out what differs between arms with the same rows."""
        simulation = replace(config.simulation, ranks=(), alphas=())
        data = replace(config.data, held_out_rows=1)
        return cls(RunConfig(seed=config.run.seed), data, simulation, config.model, config.training.max_length)

    def config(self) -> Config:
        """A configuration that deals the same rows."""
        return Config(run=self.run, data=self.data, simulation=self.simulation, model=self.model)


@cache
def parts(dealt: Dealt) -> list[list[dict[str, Any]]]:
    """All clients' rows, and last those of all of them together."""
    return [*all_client_rows(dealt.config()), client_rows(dealt.config())]


@cache
def scorer(model: ModelConfig, device: str, index: int) -> tuple[Scorer, Any]:
    """The model of client `index` and its tokenizer."""
    folder = resolve_model(model.name, model.revision)
    loaded, tokenizer = load_model(folder, model.dtype, choose_device(device))
    return Scorer.probe(loaded), tokenizer


@cache
def rows_of(dealt: Dealt, device: str, index: int) -> tuple[Any, Examination | None]:
    """The encoded rows of client `index` (-1: of all together), and those it measures its own model on."""
    config, (_, tokenizer) = dealt.config(), scorer(dealt.model, device, max(index, 0))
    learned, held = own_split(parts(dealt)[index], config)
    data = with_columns(dealt.data)
    exam = Examination.of(held, tokenizer, data, dealt.length) if held else None
    return encode_rows(learned, tokenizer, data, dealt.length), exam


@cache
def base_of(model: ModelConfig) -> Any:
    """The base as the coordinator sees it."""
    return open_base(resolve_model(model.name, model.revision), model.name)


@cache
def evaluator(data: DataConfig, seed: int, model: ModelConfig, length: int, device: str) -> Evaluator:
    """Held-out rows with a model to measure on."""
    config = Config(run=RunConfig(seed=seed), data=data, model=model)
    config = replace(config, training=replace(config.training, max_length=length))
    return Evaluator.open(
        replace(config, client=replace(config.client, device=device, threads=torch.get_num_threads()))
    )


@cache
def base_figures(*evaluated: Any) -> dict[str, float]:
    """Held-out figures of the base: the same for all arms."""
    return evaluator(*evaluated).base()


def measure(config: Config, folder: Path | None) -> dict[str, float]:
    """Held-out figures of an adapter, or of the base."""
    evaluated = config.data, config.run.seed, config.model, config.training.max_length, config.client.device
    return base_figures(*evaluated) if folder is None else evaluator(*evaluated).adapter(folder)


def worker(config: Config, index: int) -> TorchWorker:
    """The worker of client `index`; -1 has the rows of all."""
    device = config.client.device
    held, tokenizer = scorer(config.model, device, max(index, 0))
    encoded, exam = rows_of(Dealt.of(config), device, index)
    own = partial(evaluate, held, exam, config.training) if exam else None
    bench = Bench(held, tokenizer, encoded, config.training, None, own)
    return TorchWorker(bench, base_of(config.model), config.run.seed)


def federate(config: Config, out: Path) -> dict[str, Any]:
    """Runs a federation; writes its final adapter to `out` and returns its report."""
    ids, rounds = member_ids(config), []
    own = [member_config(config, i, config.client.address).client for i in range(len(ids))]
    workers = {name: worker(config, i) for i, name in enumerate(ids)}
    began = [time.monotonic()]

    def closed(result: RoundResult) -> None:
        seconds = time.monotonic() - began[0]
        with tempfile.TemporaryDirectory() as folder:
            config.method.export(result.state, Path(folder), config.model.name)
            figures = measure(config, Path(folder))
        rounds.append(
            {
                "held_out": figures,
                "bytes_up": result.bytes_up,
                "bytes_down": result.bytes_down,
                "seconds": seconds,
                "own": own_figures(result.metrics),
            }
        )
        began[0] = time.monotonic()

    members = [member_of(client) for client in own]
    try:
        result = simulate(
            config.method, base_of(config.model), members, lambda m: workers[m.id], config.rounds.count,
            config.run.seed, closed,
        )  # fmt: skip
    finally:
        for held in workers.values():
            held.reset()
    config.method.export(result.state, out, config.model.name)
    return {"rounds": rounds, "held_out": {"base": measure(config, None)}, "digest": result.digest}


def train(config: Config, index: int, out: Path) -> dict[str, Any]:
    """Trains in one place, on all rows (-1) or one client's; writes the adapter to `out` and returns the report."""
    if index >= 0:
        config = member_config(config, index, config.client.address)
    held = worker(config, index)
    try:
        trained = train_with(held, config, base_of(config.model), max(index, 0))
    finally:
        held.reset()
    trained.save(config, out)
    figures = {"base": measure(config, None), "final": measure(config, out)}
    return {"training": trained.metrics, "held_out": figures}


def run(config: Config, command: str, index: int, out: Path, result: Path, rows: int) -> None:
    """Does what a study's command does, and writes what it leaves behind: the report, and the last measurement."""
    torch.set_num_threads(config.client.threads or config.simulation.threads)
    adapter = out / "final"
    adapter.mkdir(parents=True, exist_ok=True)
    report = federate(config, adapter) if command == "simulate" else train(config, index, adapter)
    many = replace(config, data=replace(config.data, held_out_rows=rows))
    final = {"base": measure(many, None), "final": measure(many, adapter)}
    result.with_name(f"{result.stem}.final.json").write_text(json.dumps(final, indent=2) + "\n")
    result.write_text(json.dumps(report, indent=2) + "\n")
