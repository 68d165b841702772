"""What a client measures of itself: three points give the line they lie on, and the model is as it was."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.capability import Cost
from fedtune.config.schema import TrainingConfig
from fedtune.depth import blocks
from fedtune.lora import LoraSpec
from fedtune.training.adapt import Bench
from fedtune.training.encoding import Encoded
from fedtune.training.lora import fresh_factors, injected
from fedtune.training.probe import _memory, line, probe
from fedtune.training.scoring import Scorer

LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "v_proj")]
PARTS = st.floats(0, 100)


@pytest.fixture
def bench(llama, tokenizer):
    rng = np.random.default_rng(0)
    rows = [Encoded.plain(rng.integers(3, 250, 30).tolist(), [True] * 30) for _ in range(12)]
    config = TrainingConfig(steps=5, batch_size=2, max_length=32)
    return Bench(Scorer.probe(llama), tokenizer, rows, config)


@given(PARTS, PARTS, PARTS, st.integers(2, 40), st.integers(2, 64))
def test_three_points_give_the_line_they_lie_on(fixed, block, rank_part, deepest, rank):
    cost = Cost(fixed, block, rank_part)
    found = line([cost.of(1, rank), cost.of(deepest, rank), cost.of(deepest, 1)], deepest, rank)
    scale = cost.of(deepest, rank)
    for k, r in ((1, 1), (1, rank), (deepest, 1), (deepest, rank), ((1 + deepest) // 2, (1 + rank) // 2)):
        assert found.of(k, r) == pytest.approx(cost.of(k, r), rel=1e-9, abs=1e-9 * scale)


@given(st.lists(PARTS, min_size=3, max_size=3), st.integers(1, 40), st.integers(1, 64))
def test_noise_makes_no_part_negative(values, deepest, rank):
    assert min(astuple(line(values, deepest, rank))) >= -1e-9
    assert line(values, deepest, rank).of(deepest, rank) >= values[1] * (1 - 1e-9)


def test_memory_is_nearly_a_line_and_the_model_is_left_alone(bench, llama):
    before = {name: weight.clone() for name, weight in llama.state_dict().items()}
    able = probe(bench, LAYERS, 8)
    assert min(astuple(able.seconds)) >= 0
    assert able.seconds.of(4, 8) > 0
    assert able.room > 1e6
    for k in (1, 2, 3, 4):
        for r in (1, 4, 8):
            spec = LoraSpec(tuple(x for block in blocks(LAYERS)[-k:] for x in block), r, 2.0 * r)
            with injected(llama, spec, fresh_factors(llama, spec, 0)) as adapter:
                assert able.memory.of(k, r) == pytest.approx(_memory(bench, adapter), rel=0.1)
    assert able.memory.of(4, 8) > 1.5 * able.memory.of(1, 8)
    after = llama.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_keeps_no_activations_below_the_lowest_adapter(bench, llama):
    """That is why depth saves memory: one block of four keeps far less than all."""
    kept = []
    for k in (1, 4):
        spec = LoraSpec(tuple(x for block in blocks(LAYERS)[-k:] for x in block), 1, 2.0)
        with injected(llama, spec, fresh_factors(llama, spec, 0)) as adapter:
            kept.append(_memory(bench, adapter))
    assert kept[1] > 2 * kept[0]
