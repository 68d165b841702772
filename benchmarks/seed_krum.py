"""Is a FedKSeed update with its signs turned found by multi-Krum, when clients draw their own seeds, and the same ones?

Five clients tune all weights of the `tiny` model on rated sentences, real training. In every round each of them in turn
is the hostile one: what it sends is its honest update times -1, of the usual length. Of one in five a blind choice is
right as often. `correlation` is the mean cosine between the K-vectors of two honest clients: what Krum has to go by.

The second table is what the same seeds cost, on a quadratic in 2,000 weights with curvatures from 0.05 to 1: the loss
that is left after 20 rounds of 50 steps of five clients, in per cent of the first, at the best of four learning rates.
"""

import itertools
import os
import statistics
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _table import Row, options, report

from fedtune.config import Config, Shared, parse
from fedtune.config.members import member_config, member_ids
from fedtune.kspace import UNIT, Sum, trusted
from fedtune.method import Member
from fedtune.methods import FedKSeed
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import Tensors
from fedtune.training.worker import TorchWorker

CLIENTS = 5


@dataclass
class Count:
    """Turned updates that were left out, and the cosines between honest ones."""

    found: int = 0
    tried: int = 0
    cosines: list[float] = field(default_factory=list)


def settings(draws: str, steps: int, batch: int, partition: str) -> Config:
    """Five clients on the tiny model, with one hostile one to be looked for."""
    method = {"name": "fedkseed", "steps": steps, "learning_rate": 1e-4, "eps": 1e-3, "krum_byzantine": 1}
    return parse({
        "model": {"name": "tiny"}, "data": {"name": "vader", "held_out_rows": 200},
        "method": {**method, "draws": draws}, "training": {"batch_size": batch, "max_length": 128},
        "rounds": {"min_clients": CLIENTS},
        "simulation": {"clients": CLIENTS, "partition": partition, "concentration": 0.5},
    })  # fmt: skip


def played(config: Config, rounds: int) -> Count:
    """Plays honest rounds; in each, asks of every client whether it would be found."""
    method, shared, count = config.method, Shared.of(config), Count()
    workers: dict[str, tuple[Any, Replica]] = {}
    for index, name in enumerate(member_ids(config)):
        own = member_config(config, index, "127.0.0.1:1")
        workers[name] = TorchWorker.open(own, shared, index), Replica()
    state = method.init(next(iter(workers.values()))[0].stored, shared.seed)
    for number in range(1, rounds + 1):
        current, updates = Round(method, state, number), {}
        for name, (worker, replica) in workers.items():
            task = current.task(Member(name), replica.version)
            payload = b"".join(work(method, task, worker.job(method, Member(name), number), replica))
            current.add(Member(name), payload, 1)
            updates[name] = method.decode(payload, state, Member(name))
        judge(method, updates, count)
        state = current.close()
    return count


def judge(method: Any, updates: dict[str, Tensors], count: Count) -> None:
    """Turns one update after another, and compares the honest ones."""
    assert isinstance(method, FedKSeed)
    sums = {name: Sum.of(update, method.seeds, 1, name, 1, 0.0) for name, update in updates.items()}
    for name, update in updates.items():
        turned = {**update, "scalars": -update["scalars"]}
        kept = trusted({**sums, name: Sum.of(turned, method.seeds, 1, name, 1, 0.0)}, 1)
        count.found, count.tried = count.found + (name not in kept), count.tried + 1
    for one, other in itertools.combinations([total.mean() * UNIT for total in sums.values()], 2):
        count.cosines.append(float(one @ other / np.linalg.norm(one) / np.linalg.norm(other)))


def left(rate: float, noise: float, *, shared: bool, rounds: int) -> float:
    """Returns the loss of f(w) = w'Hw/2 that is left, a fraction; `noise` is of the slopes that batches differ by."""
    rng = np.random.default_rng(0)
    h, w = np.exp(rng.uniform(-3, 0, 2000)), rng.normal(size=2000)
    first, spread = h @ w**2, noise * np.sqrt(h @ h)
    for number in range(rounds):
        after = np.zeros_like(w)
        for client in range(CLIENTS):
            drawn = np.random.default_rng([number, 0 if shared else 1 + client])
            batches, x = np.random.default_rng([number, client, 9]), w.copy()
            for _ in range(50):
                z = 2.0 * drawn.integers(0, 2, len(x)) - 1
                x -= rate * (z @ (h * x) + spread * batches.normal()) * z
            after += x / CLIENTS
        w = after
    return float(h @ w**2 / first)


def price(rounds: int) -> list[Row]:
    """The second table."""
    rows = []
    for noise in (0.0, 1.0):
        best = [min(left(2.0**-n, noise, shared=one, rounds=rounds) for n in range(8, 12)) for one in (False, True)]
        what = f"quadratic, {'batches that differ' if noise else 'all data in a batch'}"
        rows += [Row(f"{what}, {who} seeds", 100 * x, "% left") for who, x in zip(("own", "shared"), best, strict=True)]
    return rows


def main() -> None:
    """Prints both tables."""
    arguments = options("What multi-Krum finds in K-space.")
    rows = []
    cases = [("iid", 20, 1, 1)] if arguments.quick else [("iid", 20, 1, 4), ("iid", 100, 4, 3), ("label", 100, 4, 3)]
    for partition, steps, batch, rounds in cases:
        for draws in ("own", "shared"):
            count = played(settings(draws, steps, batch, partition), rounds)
            what = f"{partition}, {steps} steps of {batch} sequences, {draws} seeds"
            note = f"correlation {statistics.mean(count.cosines):.2f}"
            rows.append(Row(what, count.found, f"found of {count.tried}", note=note))
    report("Turned updates left out", rows, arguments.json)
    report("Price of shared seeds", price(2 if arguments.quick else 20))


if __name__ == "__main__":
    main()
