"""`fedtune compress`, `decompress` and `merge` as a user types them."""

import numpy as np
import pytest
from typer.testing import CliRunner

from fedtune.base import open_base
from fedtune.cli.main import app
from fedtune.errors import ConfigError, FedtuneError, ModelError
from fedtune.lora import find_layers, load_peft, save_peft


@pytest.fixture
def adapters(tmp_path):
    rng = np.random.Generator(np.random.Philox(1))
    for name in ("a", "b"):
        shapes = {"m.q/A": (4, 60), "m.q/B": (50, 4)}
        factors = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        save_peft(tmp_path / name, factors, rank=4, alpha=8, base_model="tiny")
    return tmp_path


def fedtune(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, FedtuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_compress_and_decompress(adapters):
    said = fedtune("compress", adapters / "a", adapters / "small", "--density", 0.1)
    assert "times smaller (density 0.1, alpha 1)" in said
    fedtune("decompress", adapters / "small", adapters / "back")
    assert list(load_peft(adapters / "back")) == ["m.q/A", "m.q/B"]


def test_merge_takes_plain_and_compressed_adapters(adapters):
    pytest.importorskip("peft")
    fedtune("compress", adapters / "b", adapters / "small", "--density", 0.5)
    fedtune(
        "merge", adapters / "a", adapters / "small", "--out", adapters / "m", "--method", "average", "--weights", "1,0"
    )
    one, merged = load_peft(adapters / "a"), load_peft(adapters / "m")
    np.testing.assert_allclose(merged["m.q/B"] @ merged["m.q/A"], one["m.q/B"] @ one["m.q/A"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("compress", "a", "out", "--scale", "max"), ConfigError, "--scale"),
        (("compress", "a", "out", "--per", "row"), ConfigError, "--per"),
        (("compress", "a", "out", "--density", "2"), ConfigError, "density"),
        (("compress", "none", "out"), ModelError, "none"),
        (("merge", "a", "--out", "out"), ConfigError, "two or more"),
        (("merge", "a", "none", "--out", "out"), ModelError, "none"),
        (("merge", "a", "b", "--out", "out", "--weights", "x"), ConfigError, "--weights"),
        (("merge", "a", "b", "--out", "out", "--method", "soup"), ConfigError, "--method"),
    ],
)
def test_mistakes_are_told_in_words(adapters, monkeypatch, words, error, says):
    monkeypatch.chdir(adapters)
    with pytest.raises(error, match=says):
        fedtune(*words)


def test_adapters_that_scale_differently_are_not_merged(adapters):
    save_peft(adapters / "c", load_peft(adapters / "a"), rank=4, alpha=4, base_model="tiny")
    with pytest.raises(ModelError, match="lora_alpha"):
        fedtune("merge", adapters / "a", adapters / "c", "--out", adapters / "m")


def test_a_sweep_scores_densities_and_takes_the_smallest_that_loses_little(tmp_path):
    models = pytest.importorskip("fedtune.training.models")
    base = open_base(models.resolve_model("tiny"))
    rng = np.random.Generator(np.random.Philox(2))
    factors = {}
    for layer in find_layers(base.weights, ["q_proj"]):
        factors[f"{layer.name}/A"] = rng.normal(size=(4, layer.inputs)).astype(np.float32)
        factors[f"{layer.name}/B"] = rng.normal(0, 0.01, (layer.outputs, 4)).astype(np.float32)
    save_peft(tmp_path / "a", factors, rank=4, alpha=8, base_model="tiny")
    config = tmp_path / "c.toml"
    config.write_text('[model]\nname = "tiny"\n[data]\nname = "topics"\nheld_out_rows = 4\n')
    said = fedtune("compress", tmp_path / "a", tmp_path / "small", "--sweep", config, "--within", 10)
    assert "as it is" in said
    assert "(density 0.05, alpha" in said
    with pytest.raises(ConfigError, match="--within"):
        fedtune("compress", tmp_path / "a", tmp_path / "none", "--sweep", config, "--within", -10)
    assert not (tmp_path / "none").exists()
