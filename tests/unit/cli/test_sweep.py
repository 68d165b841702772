"""`fedtune compress --sweep`: what it can measure, on which rows, and what it refuses before it measures."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("peft")

from fedtune.base import open_base
from fedtune.cli import sweep
from fedtune.cli.main import app
from fedtune.errors import ConfigError, FedtuneError, ModelError
from fedtune.lora import find_layers, save_peft
from fedtune.training.models import resolve_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with `a` (an adapter of the tiny model), `rows.jsonl` and `c.toml`; a sweep is short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "DENSITIES", (0.05, 0.5))
    monkeypatch.setattr(sweep, "ALPHAS", (1.0,))
    base = open_base(resolve_model("tiny"))
    rng = np.random.Generator(np.random.Philox(2))
    factors = {}
    for layer in find_layers(base.weights, ["q_proj"]):
        factors[f"{layer.name}/A"] = rng.normal(size=(4, layer.inputs)).astype(np.float32)
        factors[f"{layer.name}/B"] = rng.normal(0, 0.01, (layer.outputs, 4)).astype(np.float32)
    save_peft(tmp_path / "a", factors, rank=4, alpha=8, base_model="tiny")
    rows = [{"question": f"What is {i} + 1?", "answer": str(i + 1), "note": "none"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.toml").write_text(
        '[model]\nname = "tiny"\n[data]\nname = "rows.jsonl"\nprompt = "question"\nresponse = "answer"\n'
        'held_out_name = "rows.jsonl"\n'
    )
    return tmp_path


def compress(*words):
    result = CliRunner().invoke(app, ["compress", *map(str, words)])
    if isinstance(result.exception, FedtuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def loss_as_it_is(said):
    return next(line.split()[-1] for line in said.splitlines() if "as it is" in line)


def test_a_file_of_rows_is_measured_on_the_adapters_own_base(place):
    said = compress("a", "out", "--sweep", "rows.jsonl", "--within", 10)
    assert loss_as_it_is(said) == loss_as_it_is(compress("a", "two", "--sweep", "c.toml", "--within", 10))
    other = compress("a", "three", "--sweep", "rows.jsonl", "--within", 10, "--set", "data.text=note")
    assert loss_as_it_is(other) != loss_as_it_is(said)


def test_columns_whose_names_say_nothing_are_asked_for(place):
    (place / "odd.jsonl").write_text('{"one": "x", "two": "y"}\n')
    with pytest.raises(ConfigError, match=r"odd\.jsonl.*--set data\.text=COLUMN"):
        compress("a", "out", "--sweep", "odd.jsonl")
    assert "as it is" in compress("a", "out", "--sweep", "odd.jsonl", "--within", 10, "--set", "data.text=one")


def test_an_adapter_that_names_no_base_needs_one(place):
    config = place / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": ""}))
    with pytest.raises(ModelError, match=r"--set model\.name"):
        compress("a", "out", "--sweep", "rows.jsonl")
    compress("a", "out", "--sweep", "rows.jsonl", "--within", 10, "--set", "model.name=tiny")


def test_a_compressed_adapter_is_swept_as_the_plain_one(place):
    compress("a", "small", "--density", 0.5)
    CliRunner().invoke(app, ["decompress", "small", "plain"])
    one, two = (compress(name, f"{name}-out", "--sweep", "c.toml", "--within", 10) for name in ("small", "plain"))
    assert loss_as_it_is(one) == loss_as_it_is(two)


def test_a_full_fine_tune_is_swept_on_its_base(place):
    base = resolve_model("tiny")
    shutil.copytree(base, place / "tuned")
    weights, rng = load_file(place / "tuned" / "model.safetensors"), np.random.Generator(np.random.Philox(3))
    moved = {n: (w + rng.normal(0, 0.05, w.shape)).astype(w.dtype) for n, w in weights.items()}
    save_file(moved, place / "tuned" / "model.safetensors", {"format": "pt"})
    (place / "other.toml").write_text((place / "c.toml").read_text().replace('"tiny"', '"smollm2-135m"'))
    for rows in ("rows.jsonl", "other.toml"):
        said = compress("tuned", f"out-{rows}", "--base", base, "--sweep", rows, "--within", 10)
        assert (place / f"out-{rows}" / "weights.ternary").exists()
    merged = CliRunner().invoke(
        app, ["evaluate", "c.toml", "--set", "model.name=./tuned", "--set", "run.folder=r", "--json"]
    )
    assert float(loss_as_it_is(said)) == pytest.approx(json.loads(merged.stdout)["base"]["loss"], abs=1e-3)
    with pytest.raises(ModelError, match="--base"):
        compress("tuned", "out", "--sweep", "rows.jsonl")


@pytest.fixture
def unmeasured(place, monkeypatch):
    """Nothing may come to loading a model."""

    def measured(*words):
        raise AssertionError("it was measured")

    monkeypatch.setattr("fedtune.training.evaluate.Evaluator.open", measured)
    return place


def test_a_folder_with_something_in_it_is_refused_first(unmeasured):
    (unmeasured / "out").mkdir()
    (unmeasured / "out" / "x").touch()
    with pytest.raises(ConfigError, match="new or empty"):
        compress("a", "out", "--sweep", "c.toml")


def test_ia3_is_refused_with_the_reason(unmeasured):
    (unmeasured / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    save_file({"m.ia3_l": np.ones((2, 1), np.float32)}, unmeasured / "a" / WEIGHTS)
    with pytest.raises(ModelError, match="--sweep: expected a LoRA adapter or a full fine-tune, got IA3"):
        compress("a", "out", "--sweep", "c.toml")


def test_values_that_are_not_finite_are_refused_first(unmeasured):
    weights = load_file(unmeasured / "a" / WEIGHTS)
    name = min(weights)
    save_file({**weights, name: np.full_like(weights[name], np.nan)}, unmeasured / "a" / WEIGHTS)
    with pytest.raises(FedtuneError, match=f"a: {name}.*finite"):
        compress("a", "out", "--sweep", "c.toml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sweep", "c.toml", "--density", "0.7"), "--density: expected no --sweep"),
        (("--sweep", "c.toml", "--alpha", "0.1"), "--alpha: expected no --sweep"),
        (("--within", "0.5"), "--within: expected --sweep"),
        (("--set", "model.name=tiny"), "--set: expected --sweep"),
    ],
)
def test_options_that_would_change_nothing_are_refused(unmeasured, words, says):
    with pytest.raises(ConfigError, match=says):
        compress("a", "out", *words)
