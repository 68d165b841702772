"""The toy worker is a real client in all but training."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.lora import LoraSpec
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.tensors import digest
from fedtune.testing import ToyWorker

Q = "model.layers.0.self_attn.q_proj"
SPEC = LoraSpec((Q, "model.layers.1.self_attn.v_proj"), 3, 6.0)


@pytest.fixture
def worker(base_folder):
    return ToyWorker(base_folder, seed=4)


def test_draws_are_a_function_of_seed_round_and_client(base_folder, worker):
    def draw(seed=4, number=1, client="a"):
        return digest(ToyWorker(base_folder, seed).job(FLoRA(), Member(client), number).train_fresh(SPEC))

    assert draw() == draw() == digest(worker.job(FLoRA(), Member("a"), 1).train_fresh(SPEC))
    assert len({draw(), draw(seed=5), draw(number=2), draw(client="b")}) == 4


def test_fresh_factors_have_the_asked_shapes(worker):
    factors = worker.job(FLoRA(), Member("a"), 1).train_fresh(SPEC)
    assert [(name, array.shape, array.dtype) for name, array in factors.items()] == [
        (f"{Q}/A", (3, 16), np.float32),
        (f"{Q}/B", (16, 3), np.float32),
        ("model.layers.1.self_attn.v_proj/A", (3, 16), np.float32),
        ("model.layers.1.self_attn.v_proj/B", (8, 3), np.float32),
    ]


def test_merge_is_real_and_reset_takes_it_back(base_folder, worker):
    base = load_file(base_folder / "model.safetensors")
    assert digest(worker.weights) == digest(base)
    job = worker.job(FLoRA(), Member("a"), 1)
    factors = job.train_fresh(SPEC)
    assert digest(worker.weights) == digest(base)
    job.merge(factors)
    change = factors[f"{Q}/B"] @ factors[f"{Q}/A"]
    assert np.array_equal(worker.weights[f"{Q}.weight"], base[f"{Q}.weight"] + change)
    assert np.array_equal(
        worker.weights["model.layers.0.self_attn.v_proj.weight"], base["model.layers.0.self_attn.v_proj.weight"]
    )
    worker.reset()
    assert digest(worker.weights) == digest(base)


def test_attached_factors_are_continued_and_not_shared(worker):
    job = worker.job(FLoRA(), Member("a"), 1)
    sent = job.train_fresh(SPEC)
    before = digest(sent)
    job.attach(SPEC, sent)
    trained = job.train_attached()
    assert digest(sent) == before
    assert list(trained) == list(sent)
    assert all(0 < np.abs(trained[name] - sent[name]).max() < 1 for name in sent)


def test_metrics_and_delay(base_folder):
    calls = []
    worker = ToyWorker(base_folder, delay=lambda: calls.append(1))
    worker.job(FLoRA(), Member("abc"), 1).train_fresh(SPEC)
    assert calls == [1]
    assert worker.metrics == {"loss": 0.25, "steps": 1.0}
