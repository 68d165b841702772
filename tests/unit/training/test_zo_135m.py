"""A rebuilt model has one SHA-256, whoever rebuilds it: threads, order of blocks, backends, clients of a run."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.base import open_base
from fedtune.config import Shared, parse
from fedtune.directions import TILE, Pool, portable, reference
from fedtune.method import Member
from fedtune.rounds import Replica, Round, work
from fedtune.simulation import simulate
from fedtune.training import seeded
from fedtune.training.models import load_model, resolve_model
from fedtune.training.seeded import SeedModel
from fedtune.training.worker import TorchWorker

POOL = Pool("hadamard", 2026, 4096)
INTERPRETED = """
import numpy as np, torch
from fedtune.directions import Pool, gpu
base, first = np.load("base.npy"), int(open("first").read())
out = torch.empty(len(base))
gpu.replay(Pool("hadamard", 2026, 4096), np.load("c.npy"), 40, torch.from_numpy(base), first, out)
np.save("out.npy", out.numpy())
"""
INTERPRETED_MODEL = """
import numpy as np, torch
from fedtune.directions import Pool, gpu
from fedtune.training import seeded
from fedtune.training.models import load_model, resolve_model

class Interpreted:
    @staticmethod
    def replay(pool, c, exponent, base, first, out):
        gpu.replay(pool, c, exponent, torch.from_numpy(base), first, torch.from_numpy(out))

seeded.backend = lambda _: Interpreted
held = seeded.SeedModel(load_model(resolve_model("smollm2-135m"), "float32", torch.device("cpu"))[0])
print(held.replay(Pool("hadamard", 2026, 4096), np.load("c.npy"), 40).hex())
"""


def _coefficients(used=4096):
    c = np.random.default_rng(0).integers(-(2**17), 2**17, 4096).astype(np.int32)
    return np.where(np.arange(4096) % (4096 // used) == 0, c, 0).astype(np.int32)


def _base():
    return load_model(resolve_model("smollm2-135m"), "float32", torch.device("cpu"))[0]


@pytest.mark.slow
def test_one_digest_for_threads_blocks_and_backends(monkeypatch, tmp_path):
    c, before = _coefficients(), torch.get_num_threads()
    model = _base()
    held, digests = SeedModel(model), {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        digests[f"{threads} threads"] = held.replay(POOL, c, 40)
    torch.set_num_threads(before)
    line = "model.layers.7.mlp.gate_proj.weight"
    rebuilt = dict(model.named_parameters())[line].data.view(-1).numpy().copy()

    class Backwards:
        """The last block first, each on its own."""

        @staticmethod
        def replay(pool, c, exponent, base, first, out):
            for start in reversed(range(0, len(base), 256 * TILE)):
                span = slice(start, start + 256 * TILE)
                seeded.import_module("fedtune.directions.cpu").replay(
                    pool, c, exponent, base[span], first + start, out[span]
                )

    class ByTorch:
        @staticmethod
        def replay(pool, c, exponent, base, first, out):
            portable.replay(pool, c, exponent, torch.from_numpy(base), first, torch.from_numpy(out))

    for backend in (Backwards, ByTorch):
        monkeypatch.setattr(seeded, "backend", lambda _, backend=backend: backend)
        digests[backend.__name__] = held.replay(POOL, c, 40)
    assert len(set(digests.values())) == 1, digests
    assert held.digest() != SeedModel(_base()).digest()

    base, first = held._origins[line].base.view(-1).numpy()[: 2 * TILE].copy(), held._origins[line].first
    _check_two_tiles(c, base, first, rebuilt, tmp_path)


@pytest.mark.slow
def test_numpy_gives_the_digest_of_the_whole_model(monkeypatch):
    """Two seeds in use, over all 135 M weights: the reference walks over the weights once for each."""
    held, c = SeedModel(_base()), _coefficients(2)
    want = held.replay(POOL, c, 40)

    class ByNumpy:
        """A few tiles at a time: the reference computes four words a weight, as int64."""

        @staticmethod
        def replay(pool, c, exponent, base, first, out):
            for start in range(0, len(base), 16 * TILE):
                span = slice(start, start + 16 * TILE)
                reference.replay(pool, c, exponent, base[span], first + start, out[span])

    held.reset()
    base = held.digest()
    monkeypatch.setattr(seeded, "backend", lambda _: ByNumpy)
    assert held.replay(POOL, c, 40) == want != base


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_triton_interpreted_gives_the_digest_of_the_whole_model(tmp_path):
    """Every tile of 135 M weights with all 4,096 seeds in use: half an hour."""
    pytest.importorskip("triton")
    c = _coefficients()
    np.save(tmp_path / "c.npy", c)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    told = subprocess.run(
        [sys.executable, "-c", INTERPRETED_MODEL], cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE
    )
    held = SeedModel(_base())
    base = held.digest()
    assert told.stdout.decode().split()[-1] == held.replay(POOL, c, 40).hex() != base.hex()


def _check_two_tiles(c, base, first, rebuilt, tmp_path):
    """numpy with all seeds and Triton's interpreter are too slow for 135 M weights: two tiles of one tensor."""
    want = np.empty_like(base)
    reference.replay(POOL, c, 40, base, first, want)
    assert want.tobytes() == rebuilt[: 2 * TILE].tobytes()
    if find_spec("triton"):
        np.save(tmp_path / "base.npy", base)
        np.save(tmp_path / "c.npy", c)
        (tmp_path / "first").write_text(str(first))
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        subprocess.run([sys.executable, "-c", INTERPRETED], cwd=tmp_path, env=environment, check=True, timeout=280)
        assert np.load(tmp_path / "out.npy").tobytes() == want.tobytes()


def _federated(model: str, folder: Path, low_memory: str = "", **options) -> list[str]:
    """A run, after which every client, and one that comes late, rebuilds the model and says what it has.

    Returns the digest of each round. Clients in `low_memory` hold no copy of the weights.
    """
    config = parse(
        {
            "run": {"folder": str(folder), "seed": 4},
            "model": {"name": model},
            "data": {"name": str(folder / "data.csv"), "text": "text"},
            "method": {"name": "fedkseed", "steps": 2, "learning_rate": 1e-5, "pro": True, **options},
            "training": {"batch_size": 1, "max_length": 32},
        }
    )
    (folder / "data.csv").write_text("text\n" + "".join(f"row {i} says a few words\n" for i in range(30)))
    shared, base = Shared.of(config), open_base(resolve_model(model))
    own = {name: replace(config, client=replace(config.client, low_memory=name in low_memory)) for name in "abc"}
    workers = {name: TorchWorker.open(own[name], shared) for name in "abc"}
    members = [Member("a"), Member("b")]
    result = simulate(shared.method, base, members, lambda m: workers[m.id], 2, shared.seed)
    assert [closed.notes for closed in result.rounds] == [{}, {}]  # nobody disagreed on the way
    digests = set()
    for name, worker in workers.items():
        task = Round(shared.method, result.state, 3).task(Member(name))
        update = b"".join(work(shared.method, task, worker.job(shared.method, Member(name), 3), Replica()))
        digests.add(update[-32:])
    assert len(digests) == 1
    assert digests != {SeedModel(load_model(resolve_model(model), "float32", torch.device("cpu"))[0]).digest()}
    return [closed.digest for closed in result.rounds]


@pytest.mark.parametrize("train", ["all", "sparse", "lora"])
def test_after_a_run_every_client_has_the_same_model(tmp_path, train):
    _federated("tiny", tmp_path, train=train)


@pytest.mark.parametrize("train", ["all", "sparse"])
def test_clients_with_little_memory_change_no_bit_of_a_run(tmp_path, train):
    """Beside others, and alone: the coordinator's state is the same, so are the models."""
    runs = [_federated("tiny", tmp_path, low_memory, train=train) for low_memory in ("", "bc", "abc")]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
def test_after_a_run_every_client_has_the_same_135m_model(tmp_path):
    _federated("smollm2-135m", tmp_path)
