"""`fedtune merge` as a user types it: what it refuses, and that adapters come out as their kinds mean them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("peft")

from fedtune.cli.main import app
from fedtune.errors import ConfigError, FedtuneError, ModelError, StorageError
from fedtune.lora import load_peft, save_peft

WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.m.q.lora_A.weight"


@pytest.fixture
def one(tmp_path, monkeypatch):
    """Folder of an adapter, below the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.Generator(np.random.Philox(1))
    shapes = {"m.q/A": (4, 6), "m.q/B": (5, 4)}
    factors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_peft(tmp_path / "one", factors, rank=4, alpha=8, base_model="tiny")
    return tmp_path / "one"


def edited(folder, **tensors):
    """Replaces tensors of an adapter, or adds them."""
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


def merge(*words):
    result = CliRunner().invoke(app, ["merge", *words, "--out", "out"])
    if isinstance(result.exception, FedtuneError):
        raise result.exception
    assert result.exit_code == 0, result.output


def test_an_adapter_averaged_with_itself_is_itself(one, tmp_path):
    merge("one", "one", "--method", "average")
    for name, array in load_peft(one).items():
        np.testing.assert_allclose(load_peft(tmp_path / "out")[name], array, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "writer"), [("stack", "fedtune.lora.save_weights"), ("average", "fedtune.compressed.save_weights")]
)
def test_what_cannot_be_written_leaves_nothing(one, tmp_path, monkeypatch, method, writer):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, full)
    with pytest.raises(StorageError, match="No space left"):
        merge("one", "one", "--method", method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_vectors_of_ia3_are_averaged(one, tmp_path):
    (one / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    vectors = np.array([[0.5], [3.0]], np.float32)
    save_file({"m.ia3_l": vectors}, one / WEIGHTS)
    merge("one", "one", "--method", "average")
    np.testing.assert_allclose(load_file(tmp_path / "out" / WEIGHTS)["m.ia3_l"], vectors)


@pytest.mark.parametrize("method", ["stack", "average", "ties"])
def test_factors_of_two_ranks_are_refused(one, tmp_path, method):
    edited(one, **{Q: np.ones((3, 6), np.float32)})
    with pytest.raises(ModelError, match=r"q\.lora_A\.weight of shape \(3, 6\) and .*q\.lora_B\.weight of shape"):
        merge("one", "one", "--method", method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base_model.model.m.q.lora_magnitude_vector", "base_model.model.lm_head.weight"])
def test_whole_tensors_are_averaged_and_never_added(one, tmp_path, name):
    edited(one, **{name: np.full(5, 3, np.float32)})
    for method in ("stack", "task-arithmetic"):
        with pytest.raises(ModelError, match=f"{name}.*--method average"):
            merge("one", "one", "--method", method)
    merge("one", "one", "--method", "average")
    np.testing.assert_allclose(load_file(tmp_path / "out" / WEIGHTS)[name], 3)


@pytest.mark.parametrize("method", ["stack", "average"])
def test_what_is_not_finite_is_named_and_refused(one, method):
    edited(one, **{Q: np.full((4, 6), np.nan, np.float32)})
    with pytest.raises(FedtuneError, match=f"one: {Q}.*finite"):
        merge("one", "one", "--method", method)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("method", ["stack", "task-arithmetic"])
def test_weights_that_leave_the_range_write_nothing(one, tmp_path, method):
    with pytest.raises(FedtuneError, match="weights too large"):
        merge("one", "one", "--method", method, "--weights", "1e80,1")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused_first(one, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ConfigError, match="new or empty"):
        merge("one", "nowhere")
