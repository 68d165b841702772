"""`fedtune compress`, `decompress` and `merge` as a user types them."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fedtune.base import open_base
from fedtune.cli.main import app
from fedtune.errors import ConfigError, FedtuneError, ModelError, WireError
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
        (("compress", "a", "out", "--rank", "32"), ConfigError, "--rank: expected --codec delta-come or ere"),
        (("compress", "a", "out", "--base", "b", "--no-balance"), ConfigError, "--balance: .* --base b"),
        *(
            (("compress", "a", "out", "--base", "b", "--codec", codec, *words), ConfigError, f"{words[0]}: .* {codec}")
            for codec in ("ere", "delta-come")
            for words in (("--density", "0.1"), ("--alpha", "1"), ("--scale", "std"), ("--per", "vector"))
        ),
        (("decompress", "a", "out", "--max-gb", "1"), ModelError, "compressed adapter"),
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


def save_tiny_adapter(folder, deviation):
    """An adapter of the built-in model; B is drawn with this standard deviation."""
    models = pytest.importorskip("fedtune.training.models")
    base = open_base(models.resolve_model("tiny"))
    rng = np.random.Generator(np.random.Philox(2))
    factors = {}
    for layer in find_layers(base.weights, ["q_proj"]):
        factors[f"{layer.name}/A"] = rng.normal(size=(4, layer.inputs)).astype(np.float32)
        factors[f"{layer.name}/B"] = rng.normal(0, deviation, (layer.outputs, 4)).astype(np.float32)
    save_peft(folder, factors, rank=4, alpha=8, base_model="tiny")


def test_a_sweep_scores_densities_and_takes_the_smallest_that_loses_little(tmp_path):
    save_tiny_adapter(tmp_path / "a", 0.01)
    config = tmp_path / "c.toml"
    config.write_text('[model]\nname = "tiny"\n[data]\nname = "topics"\nheld_out_rows = 4\n')
    said = fedtune("compress", tmp_path / "a", tmp_path / "small", "--sweep", config, "--within", 10)
    assert "as it is" in said
    assert "(density 0.05, alpha" in said
    with pytest.raises(ConfigError, match="--within"):
        fedtune("compress", tmp_path / "a", tmp_path / "none", "--sweep", config, "--within", -10)
    assert not (tmp_path / "none").exists()


def product(folder):
    factors = load_peft(folder)
    return factors["m.q/B"].astype(np.float64) @ factors["m.q/A"]


def test_stacking_is_the_exact_sum_whatever_the_ranks_and_scales(adapters):
    pytest.importorskip("peft")
    rng = np.random.Generator(np.random.Philox(5))
    factors = {"m.q/A": rng.normal(size=(9, 60)), "m.q/B": rng.normal(size=(50, 9)), "m.k/A": np.ones((2, 3))}
    factors = {name: array.astype(np.float32) for name, array in (factors | {"m.k/B": np.ones((4, 2))}).items()}
    save_peft(adapters / "c", factors, rank=9, alpha=3, base_model="tiny")
    fedtune("compress", adapters / "b", adapters / "small", "--density", 0.5)
    fedtune("decompress", adapters / "small", adapters / "plain")
    words = ("--out", adapters / "m", "--method", "stack", "--weights", "1,-0.5,2")
    fedtune("merge", adapters / "a", adapters / "small", adapters / "c", *words)
    want = product(adapters / "a") - 0.5 * product(adapters / "plain") + 2 * product(adapters / "c")
    np.testing.assert_allclose(product(adapters / "m"), want, rtol=1e-4, atol=1e-4)
    merged = load_peft(adapters / "m")
    assert merged["m.q/A"].shape == (17, 60)
    np.testing.assert_allclose(merged["m.k/B"] @ merged["m.k/A"], np.full((4, 3), 2 * 2 * 3 / 2), rtol=1e-5)


def test_other_ranks_are_refused_with_the_way_to_go(adapters):
    pytest.importorskip("peft")
    factors = {"m.q/A": np.ones((9, 60), np.float32), "m.q/B": np.ones((50, 9), np.float32)}
    save_peft(adapters / "c", factors, rank=9, alpha=18, base_model="tiny")
    with pytest.raises(ModelError, match="--method stack"):
        fedtune("merge", adapters / "a", adapters / "c", "--out", adapters / "m")


def test_an_average_takes_no_negative_weight_and_a_task_vector_may(adapters):
    pytest.importorskip("peft")
    words = ("merge", adapters / "a", adapters / "a", "--weights", "2,-1", "--out", adapters / "m", "--method")
    with pytest.raises(ConfigError, match="task-arithmetic"):
        fedtune(*words, "average")
    fedtune(*words, "task-arithmetic")
    assert np.isfinite(product(adapters / "m")).all()


def test_run_folders_and_compressed_folders_serve_wherever_an_adapter_does(adapters):
    pytest.importorskip("peft")
    (adapters / "run").mkdir()
    (adapters / "a").rename(adapters / "run" / "final")
    fedtune("compress", adapters / "run", adapters / "small", "--density", 0.5)
    fedtune("export", adapters / "small", adapters / "exported")
    fedtune("decompress", adapters / "small", adapters / "plain")
    np.testing.assert_array_equal(product(adapters / "exported"), product(adapters / "plain"))
    fedtune("merge", adapters / "run", adapters / "small", "--out", adapters / "m", "--method", "average")
    assert product(adapters / "m").shape == (50, 60)


def test_a_compressed_adapter_is_evaluated_as_the_plain_one(tmp_path):
    save_tiny_adapter(tmp_path / "a", 1.0)
    fedtune("compress", tmp_path / "a", tmp_path / "small")
    fedtune("decompress", tmp_path / "small", tmp_path / "plain")
    config = tmp_path / "c.toml"
    config.write_text(
        f'[run]\nfolder = "{tmp_path / "run"}"\n[model]\nname = "tiny"\n[data]\nname = "topics"\nheld_out_rows = 4\n'
    )
    small, plain = tmp_path / "small", tmp_path / "plain"
    said = fedtune("evaluate", config, "--no-base", "--adapter", small, "--adapter", plain, "--json")
    losses = json.loads(said)
    assert losses[str(small)] == losses[str(plain)]


def test_how_much_a_small_file_may_come_to_is_the_users_to_say(adapters):
    fedtune("compress", adapters / "a", adapters / "small")
    with pytest.raises(WireError, match="--max-gb 1"):
        fedtune("decompress", adapters / "small", adapters / "plain", "--max-gb", 1e-6)
    assert not (adapters / "plain").exists()
    fedtune("decompress", adapters / "small", adapters / "plain", "--max-gb", 1e-5)


def test_a_sweep_takes_a_compressed_adapter(tmp_path):
    save_tiny_adapter(tmp_path / "a", 0.01)
    fedtune("compress", tmp_path / "a", tmp_path / "small", "--density", 0.5)
    config = tmp_path / "c.toml"
    config.write_text('[model]\nname = "tiny"\n[data]\nname = "topics"\nheld_out_rows = 4\n')
    said = fedtune("compress", tmp_path / "small", tmp_path / "smaller", "--sweep", config, "--within", 10)
    assert "(density 0.05, alpha" in said
