import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedtune.config.schema import DataConfig, TrainingConfig
from fedtune.errors import TrainingError
from fedtune.lora import LoraSpec
from fedtune.method import Tail
from fedtune.training.adapt import Bench, fit_adapter
from fedtune.training.encoding import encode_rows
from fedtune.training.loop import rate
from fedtune.training.lora import fresh_factors, injected
from fedtune.training.models import load_model
from fedtune.training.scoring import Scorer

_SPEC = LoraSpec(("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"), 4, 8)
_ROWS = [{"q": f"say {word}", "a": word} for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
_CONFIG = TrainingConfig(steps=6, batch_size=2, learning_rate=1e-2, max_length=64)


def _bench(model, tokenizer, config: TrainingConfig = _CONFIG, on_step=None) -> Bench:
    rows = encode_rows(_ROWS, tokenizer, DataConfig(prompt="q", response="a"), config.max_length)
    return Bench(Scorer.probe(model), tokenizer, rows, config, on_step)


def _fit(model, tokenizer, config=_CONFIG, spec=_SPEC, seed=3, on_step=None):
    return fit_adapter(_bench(model, tokenizer, config, on_step), spec, fresh_factors(model, spec, seed), seed)


def _distance(one, two) -> float:
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def test_the_loss_falls(tiny_folder):
    model, tokenizer = load_model(tiny_folder, "float32", torch.device("cpu"))
    layers = tuple(f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn.v_proj", "mlp.up_proj"))
    _, metrics = _fit(model, tokenizer, replace(_CONFIG, steps=40, batch_size=4), LoraSpec(layers, 8, 16))
    assert metrics["loss_last"] < 0.85 * metrics["loss_first"]
    assert metrics["steps"] == 40


def test_the_same_seed_gives_the_same_bits_with_dropout_too(gpt2, tokenizer):
    spec = LoraSpec(("transformer.h.0.attn.c_attn",), 4, 8, dropout=0.2)
    torch.manual_seed(1)
    one, _ = _fit(gpt2, tokenizer, spec=spec)
    torch.manual_seed(2)
    two, _ = _fit(gpt2, tokenizer, spec=spec)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    other, _ = _fit(gpt2, tokenizer, spec=spec, seed=4)
    assert _distance(one, other) > 0


def test_the_process_keeps_its_random_state_and_the_model_its_mode(llama, tokenizer):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _fit(llama, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert not llama.training


def test_parts_of_a_batch_give_the_gradients_of_the_whole(llama, tokenizer):
    for packing in (True, False):
        config = replace(_CONFIG, steps=1, batch_size=4, packing=packing, max_length=40)
        whole, _ = _fit(llama, tokenizer, config)
        parts, _ = _fit(llama, tokenizer, replace(config, accumulate=3))
        assert _distance(whole, parts) < 1e-5


def test_checkpointing_changes_no_number(llama, tokenizer):
    plain, _ = _fit(llama, tokenizer)
    saved, _ = _fit(llama, tokenizer, replace(_CONFIG, checkpointing=True))
    assert _distance(plain, saved) < 1e-6
    assert not llama.is_gradient_checkpointing


def test_every_step_is_reported(llama, tokenizer):
    told = []
    _, metrics = _fit(llama, tokenizer, on_step=lambda *step: told.append(step))
    assert [(number, steps) for number, steps, _ in told] == [(i, 6) for i in range(1, 7)]
    assert metrics["loss_first"] == told[0][2]
    assert metrics["loss_last"] == told[-1][2]
    assert metrics["loss"] == pytest.approx(np.mean([loss for *_, loss in told]))
    assert metrics["answer_tokens"] < metrics["tokens"]


def test_an_error_of_the_listener_ends_training_and_leaves_the_model(llama, tokenizer):
    def stop(step: int, steps: int, loss: float) -> None:
        raise InterruptedError

    ids = torch.arange(9)[None]
    before = llama(input_ids=ids).logits
    with pytest.raises(InterruptedError):
        _fit(llama, tokenizer, on_step=stop)
    assert torch.equal(llama(input_ids=ids).logits, before)
    assert not llama.training


def test_divergence_is_an_error(llama, tokenizer):
    with pytest.raises(TrainingError, match=r"trained .*/B: expected magnitudes below 2048"):
        _fit(llama, tokenizer, replace(_CONFIG, learning_rate=1e30))


def test_a_loss_that_is_not_a_number_is_an_error(llama, tokenizer):
    bench = _bench(llama, tokenizer)
    llama.get_submodule("model.norm").weight.data[3] = float("nan")
    with pytest.raises(TrainingError, match="loss of step 1: expected a finite number, got nan"):
        fit_adapter(bench, _SPEC, fresh_factors(llama, _SPEC, 1), 1)


def test_an_update_that_changes_nothing_is_an_error(llama, tokenizer):
    with pytest.raises(TrainingError, match="learning_rate"):
        _fit(llama, tokenizer, replace(_CONFIG, learning_rate=1e-60))


def test_clipping_bounds_the_first_step_of_a_large_loss(llama, tokenizer):
    free, _ = _fit(llama, tokenizer, replace(_CONFIG, steps=2, clip_norm=0.0))
    bound, _ = _fit(llama, tokenizer, replace(_CONFIG, steps=2, clip_norm=1e-9))
    assert _distance(free, bound) > 0


def test_rates():
    cosine = TrainingConfig(schedule="cosine", warmup_steps=2)
    rates = [rate(cosine, step, 12) for step in range(12)]
    assert rates[:3] == [1 / 3, 2 / 3, 1.0]
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[7] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.05
    assert [rate(TrainingConfig(), step, 3) for step in range(3)] == [1.0, 1.0, 1.0]
    assert math.isfinite(rate(TrainingConfig(schedule="cosine", warmup_steps=5), 5, 5))


def test_bfloat16_arithmetic_stays_close(llama, tokenizer):
    _, exact = _fit(llama, tokenizer)
    _, rough = _fit(llama, tokenizer, replace(_CONFIG, autocast="on"))
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert rough["loss"] != exact["loss"]


def test_no_prox_is_the_plain_loop_bit_for_bit(llama, tokenizer):
    plain, _ = _fit(llama, tokenizer)
    none, _ = _fit(llama, tokenizer, replace(_CONFIG, prox_mu=0.0))
    assert all(np.array_equal(plain[name], none[name]) for name in plain)


def test_prox_steps_are_those_of_the_written_out_loss(llama, tokenizer):
    """The oracle differentiates loss + mu/2 |w - w0|^2 as it stands, with an AdamW of its own."""
    mu, config = 3.0, replace(_CONFIG, steps=4, clip_norm=0.0, prox_mu=3.0)
    got, _ = _fit(llama, tokenizer, config)
    bench, start = _bench(llama, tokenizer, config), fresh_factors(llama, _SPEC, 3)
    with injected(llama, _SPEC, start) as adapter:
        weights = adapter.trained()
        w0 = [weight.detach().clone() for weight in weights]
        adam = torch.optim.AdamW(weights, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
        for parts in bench.plan().batches(3)[1]:
            loss = sum(bench.scorer(part).sum() for part in parts) / sum(len(part.at) for part in parts)
            loss = loss + mu / 2 * sum(((w - start) ** 2).sum() for w, start in zip(weights, w0, strict=True))
            adam.zero_grad()
            loss.backward()
            adam.step()
        want = adapter.factors()
    assert _distance(got, want) < 1e-5
    assert _distance(got, _fit(llama, tokenizer, replace(config, prox_mu=0.0))[0]) > 1e-3


def test_lora_plus_steps_are_those_of_one_adamw_a_side(llama, tokenizer):
    """The oracle trains A and B with an AdamW each, B's at eight times the rate of A's."""
    config = replace(_CONFIG, steps=4, lora_plus=8.0)
    got, _ = _fit(llama, tokenizer, config)
    bench, start = _bench(llama, tokenizer, config), fresh_factors(llama, _SPEC, 3)
    with injected(llama, _SPEC, start) as adapter:
        weights, lr = adapter.trained(), config.learning_rate
        sides = [
            torch.optim.AdamW(weights[i::2], lr=f * lr, weight_decay=config.weight_decay) for i, f in ((0, 1), (1, 8))
        ]
        for parts in bench.plan().batches(3)[1]:
            loss = sum(bench.scorer(part).sum() for part in parts) / sum(len(part.at) for part in parts)
            for side in sides:
                side.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)
            for side in sides:
                side.step()
        want = adapter.factors()
    assert _distance(got, want) < 1e-5
    assert _distance(got, _fit(llama, tokenizer, replace(config, lora_plus=1.0))[0]) > 1e-3


def test_lora_plus_where_only_b_learns_is_that_rate(llama, tokenizer):
    start = fresh_factors(llama, _SPEC, 3)
    for frozen, same in (("A", 8 * _CONFIG.learning_rate), ("B", _CONFIG.learning_rate)):
        begin = start if frozen == "A" else {n: np.full_like(a, 0.1) for n, a in start.items()}
        plus = _bench(llama, tokenizer, replace(_CONFIG, lora_plus=8.0))
        plain = _bench(llama, tokenizer, replace(_CONFIG, learning_rate=same))
        got, want = (fit_adapter(bench, _SPEC, begin, 3, (frozen,))[0] for bench in (plus, plain))
        assert all(np.array_equal(got[name], want[name]) for name in got)


def test_a_penalty_on_the_last_components_is_that_of_the_written_out_loss(llama, tokenizer):
    """The oracle differentiates loss + 0.3 sum |B[:, 1:]| |A[1:]| as it stands, with an AdamW of its own."""
    config, rng = replace(_CONFIG, steps=4, clip_norm=0.0), np.random.Generator(np.random.Philox(key=1))
    start = {n: rng.normal(0, 0.1, a.shape).astype(np.float32) for n, a in fresh_factors(llama, _SPEC, 3).items()}
    bench = _bench(llama, tokenizer, config)
    got, _ = fit_adapter(bench, _SPEC, start, 3, tail=Tail(1, 0.3))
    with injected(llama, _SPEC, start) as adapter:
        weights = adapter.trained()
        adam = torch.optim.AdamW(weights, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
        for parts in bench.plan().batches(3)[1]:
            loss = sum(bench.scorer(part).sum() for part in parts) / sum(len(part.at) for part in parts)
            for a, b in zip(weights[::2], weights[1::2], strict=True):
                loss = loss + 0.3 * (b[:, 1:] ** 2).sum().sqrt() * (a[1:] ** 2).sum().sqrt()
            adam.zero_grad()
            loss.backward()
            adam.step()
        want = adapter.factors()
    assert _distance(got, want) < 1e-5
    assert _distance(got, fit_adapter(bench, _SPEC, start, 3)[0]) > 1e-3


def test_a_penalty_begins_where_b_is_zero(llama, tokenizer):
    after, _ = fit_adapter(_bench(llama, tokenizer, _CONFIG), _SPEC, fresh_factors(llama, _SPEC, 3), 3, tail=Tail(1, 1))
    assert all(np.isfinite(array).all() for array in after.values())


def test_a_strong_pull_stays_near_the_start(llama, tokenizer):
    start = fresh_factors(llama, _SPEC, 3)
    far, near = (
        sum(float(((a - start[n]) ** 2).sum()) for n, a in _fit(llama, tokenizer, config)[0].items())
        for config in (replace(_CONFIG, steps=30), replace(_CONFIG, steps=30, prox_mu=100.0))
    )
    assert near < 0.5 * far


@pytest.mark.parametrize(("frozen", "trained"), [("A", "B"), ("B", "A")])
def test_a_frozen_side_comes_back_bit_for_bit_and_the_other_has_learned(llama, tokenizer, frozen, trained):
    rng = np.random.Generator(np.random.Philox(key=1))
    drawn = fresh_factors(llama, _SPEC, 3)
    start = {name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in drawn.items()}
    after, _ = fit_adapter(_bench(llama, tokenizer, replace(_CONFIG, weight_decay=0.1)), _SPEC, start, 3, (frozen,))
    assert all(np.array_equal(after[name], start[name]) == name.endswith(f"/{frozen}") for name in start)
    assert all(np.any(after[name] != start[name]) for name in start if name.endswith(f"/{trained}"))
