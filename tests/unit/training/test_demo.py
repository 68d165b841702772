"""The real small model and the real data, from the package index. `pytest -m slow`; a few minutes on two cores."""

from collections import Counter

import pytest

from fedtune.config import parse
from fedtune.training.builtin_data import read_chitchat, read_vader
from fedtune.training.centralised import train_centralised
from fedtune.training.data import client_rows, held_out_rows
from fedtune.training.evaluate import Evaluator
from fedtune.training.models import choose_device, load_model, resolve_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_vader():
    rows = read_vader()
    assert Counter(row["domain"] for row in rows) == {
        "tweets": 4200,
        "movies": 10605,
        "products": 3708,
        "editorials": 5190,
    }
    assert {row["label"] for row in rows} == {"negative", "neutral", "positive"}
    assert not any("&amp;" in row["text"] or "&quot;" in row["text"] for row in rows)
    assert all(row["text"] for row in rows)


def test_vader_is_held_out_by_document():
    config = parse({"data": {"name": "vader"}})
    trained = {row["document"] for row in client_rows(config)}
    held = held_out_rows(config)
    assert len(held) == 200
    assert not trained & {row["document"] for row in held}


def test_chitchat_is_held_out_by_person_and_by_conversation():
    rows = read_chitchat()
    assert len({row["sender"] for row in rows}) > 1000
    config = parse({"data": {"name": "chitchat", "max_rows": 20000}})
    trained, held = client_rows(config), held_out_rows(config)
    for column in ("sender", "conversation"):
        assert not {row[column] for row in trained} & {row[column] for row in held}
    assert len(trained) > 12000


def test_smollm2_learns_sentiment():
    config = parse(
        {
            "data": {"name": "vader", "held_out_rows": 60},
            "training": {"steps": 6, "max_length": 128},
            "client": {"threads": 1, "device": "cpu"},
        }
    )
    evaluator = Evaluator.open(config)
    before = evaluator.base()
    trained = train_centralised(config)
    factors = {name: array * 2 if name.endswith("/A") else array for name, array in trained.factors.items()}
    after = evaluator.factors(factors)
    assert 2.5 < before["loss"] < 4.5
    assert after["loss"] < 0.5 * before["loss"]


def test_smollm2_reads_digits_one_by_one_and_knows_its_chat_template():
    folder = resolve_model("smollm2-135m")
    model, tokenizer = load_model(folder, "float32", choose_device("cpu"))
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    prompt = "The capital of France is"
    answer = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
