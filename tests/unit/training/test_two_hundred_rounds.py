"""FLoRA over many short rounds, with a real model: it goes on learning, and downloads stay within the budget."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune import history
from fedtune.base import open_base
from fedtune.lora import layers_of
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.simulation import simulate
from fedtune.training.merging import MergedBase
from fedtune.training.own import OwnWorker

ROUNDS, CLIENTS, BUDGET = 200, 3, 24
TARGETS = ("embed_tokens", "q_proj", "down_proj")


def _rows(client):
    """Sequences that count by a step of the client's own."""
    starts = torch.arange(6)[:, None] * 10 + client
    return (starts + torch.arange(16) * (2 * client + 1)) % 64


def _loss(model, rows):
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def _trainer(rows):
    def train(model, seed):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer, losses = torch.optim.AdamW(weights, lr=1e-2), []
        for _ in range(2):
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return {"loss": losses[-1]}

    return train


@pytest.fixture
def small():
    """Two layers of width 32 over 64 tokens, random weights."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fresh", "warm"])
def test_two_hundred_short_rounds_learn_and_stay_within_the_budget(start, small, tmp_path):
    """The loss of the shared model on everybody's rows, every 25 rounds: it falls, and never rises by more than 2 %."""
    small.save_pretrained(tmp_path)
    base = open_base(tmp_path)
    method = FLoRA(rank=4, start=start, rank_budget=BUDGET, energy=0.9999, target_modules=TARGETS)
    layers = layers_of(history.of_round(method.init(base, 0), 0))
    budget = sum(
        BUDGET * 4 * sum(spec.shape) for spec in base.weights.specs if spec.name.removesuffix(".weight") in layers
    )
    everything = torch.cat([_rows(client) for client in range(CLIENTS)])
    losses, bytes_down = [_loss(small, everything)], []
    merged = MergedBase(small)

    def on_round(closed):
        bytes_down.append(sum(a.nbytes for a in method.broadcast(closed.state, closed.number - 1).values()))
        if closed.number % 25 == 0:
            merged.merge(history.joined(closed.state))
            losses.append(_loss(small, everything))
            merged.reset()

    def open_worker(member):
        client = int(member.id[-1])
        return OwnWorker(copy.deepcopy(small), tmp_path, 6, _trainer(_rows(client)), seed=1)

    simulate(method, base, [Member(f"c{i}") for i in range(CLIENTS)], open_worker, ROUNDS, 1, on_round)
    assert max(bytes_down) <= budget
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.93 * losses[0]
    assert all(after < 1.02 * before for before, after in pairwise(losses))
