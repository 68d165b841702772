import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.config.schema import DataConfig, TrainingConfig
from fedtune.errors import ModelError
from fedtune.lora import key_a, key_b, save_peft
from fedtune.training.encoding import encode_rows
from fedtune.training.evaluate import Evaluator, Examination, evaluate
from fedtune.training.merging import MergedBase
from fedtune.training.scoring import Scorer

_CHOICE = DataConfig(prompt="q", response="a", label="a")
_PLAIN = DataConfig(prompt="q", response="a")
_ROWS = [{"q": f"colour number {i}?", "a": ("red", "blue", "yellow")[i % 3]} for i in range(20)]
_CONFIG = TrainingConfig(max_length=64, batch_size=3)


def _slow(model, tokenizer, rows) -> list[float]:
    """Negative log-likelihood of each answer, row by row, from the model's own logits."""
    sums = []
    for row in encode_rows(rows, tokenizer, _PLAIN, 64):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.ids)[None]).logits[0].double()
        chosen = torch.log_softmax(logits, -1)[torch.from_numpy(row.at), torch.from_numpy(row.targets)]
        sums.append(-float(chosen.sum()))
    return sums


@pytest.mark.parametrize("scorer", ["probed", "plain"])
@pytest.mark.parametrize("packing", [True, False])
def test_figures_are_those_of_the_slow_way(llama, tokenizer, scorer, packing):
    chosen = Scorer.probe(llama) if scorer == "probed" else Scorer(llama)
    exam = Examination.of(_ROWS, tokenizer, _CHOICE, 64)
    assert exam.choices == ("blue", "red", "yellow")
    got = evaluate(chosen, exam, replace(_CONFIG, packing=packing))
    sums = np.array([_slow(llama, tokenizer, [{**row, "a": c} for row in _ROWS]) for c in exam.choices])
    right = [exam.choices.index(row["a"]) for row in _ROWS]
    tokens = sum(len(row["a"]) + 1 for row in _ROWS)
    assert got["tokens"] == tokens
    assert got["rows"] == 20
    assert got["loss"] == pytest.approx(sum(sums[c, i] for i, c in enumerate(right)) / tokens, abs=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert got["accuracy"] == np.mean(sums.argmin(axis=0) == right)


def test_the_loss_is_the_same_with_and_without_choices(llama, tokenizer):
    with_choices = evaluate(Scorer.probe(llama), Examination.of(_ROWS, tokenizer, _CHOICE, 64), _CONFIG)
    without = evaluate(Scorer.probe(llama), Examination.of(_ROWS, tokenizer, _PLAIN, 64), _CONFIG)
    assert without["loss"] == pytest.approx(with_choices["loss"], abs=1e-6)
    assert "accuracy" not in without


def test_a_model_that_always_says_red(llama, tokenizer):
    """Accuracy is the share of red; F1 is 2 * 7 / (20 + 7) for red, 0 for the two others."""
    exam = Examination.of(_ROWS, tokenizer, _CHOICE, 64)

    class Red:
        packs, model = True, llama

        def __call__(self, batch):
            return torch.from_numpy(np.where(batch.branches == 2, 0.1, 9.0))

    got = evaluate(Red(), exam, _CONFIG)
    assert got["accuracy"] == 7 / 20
    assert got["macro_f1"] == pytest.approx(2 * 7 / 27 / 3)


def test_long_rows_are_cut_alike_for_every_choice(llama, tokenizer):
    rows = [{**row, "q": row["q"] * 9} for row in _ROWS]
    exam = Examination.of(rows, tokenizer, _CHOICE, 64)
    assert evaluate(Scorer.probe(llama), exam, _CONFIG)["rows"] == 20
    assert all(int((row.branches == 0).sum()) == 64 - len("yellow") - 1 for row in exam.rows)


def test_many_different_answers_are_no_choices(tokenizer):
    rows = [{"q": "x", "a": f"answer {i}"} for i in range(17)]
    assert Examination.of(rows, tokenizer, _CHOICE, 64).choices == ()


def test_adapters_are_measured_on_a_base_that_stays(llama, tokenizer, tmp_path):
    layer, rng = "model.layers.1.self_attn.q_proj", np.random.default_rng(0)
    factors = {key_a(layer): rng.normal(size=(2, 64)), key_b(layer): rng.normal(size=(64, 2))}
    factors = {name: array.astype(np.float32) for name, array in factors.items()}
    save_peft(tmp_path / "one", factors, rank=2, alpha=4)
    exam = Examination.of(_ROWS, tokenizer, _CHOICE, 64)
    evaluator = Evaluator(MergedBase(llama), Scorer.probe(llama), exam, _CONFIG)
    base = evaluator.base()
    adapted = evaluator.adapter(tmp_path / "one")
    assert adapted["loss"] != base["loss"]
    assert evaluator.adapter(tmp_path / "one") == adapted
    assert evaluator.base() == base
    with pytest.raises(ModelError):
        evaluator.adapter(tmp_path / "none")
