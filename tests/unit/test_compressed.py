"""Compressed folders: LoRA, IA3 and full fine-tunes go in and come back; damaged files are refused in words."""

import json
import os
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.codecs.spectral import delta_come, ere
from fedtune.codecs.ternary import Ternary
from fedtune.compressed import MAGIC, TERNARY, compress, decompress, load_weights, read, save_merged, write
from fedtune.errors import ConfigError, ModelError, WireError
from fedtune.lora import load_peft, save_peft

KEEP_ALL = Ternary(density=1, scale="least-squares", top="tensor", sigma="tensor")


def lora(folder, seed=1):
    rng = np.random.Generator(np.random.Philox(seed))
    factors = {}
    for layer in ("m.0.q", "m.0.v"):
        factors[f"{layer}/A"] = rng.uniform(-0.2, 0.2, (4, 60)).astype(np.float32)
        factors[f"{layer}/B"] = (0.01 * rng.normal(size=(50, 4))).astype(np.float32)
    save_peft(folder, factors, rank=4, alpha=8, base_model="tiny")
    return factors


def product(factors, layer):
    return factors[f"{layer}/B"] @ factors[f"{layer}/A"]


def test_a_lora_adapter_comes_back_as_one_that_loads(tmp_path):
    lora(tmp_path / "a")
    sizes = compress(tmp_path / "a", tmp_path / "small", Ternary(density=0.5, scale="least-squares"))
    decompress(tmp_path / "small", tmp_path / "back")
    assert sizes.before == 4 * sizes.values
    assert sizes.after == (tmp_path / "small" / TERNARY).stat().st_size < sizes.before / 3
    before, after = load_peft(tmp_path / "a"), load_peft(tmp_path / "back")
    assert list(before) == list(after)
    for layer in ("m.0.q", "m.0.v"):
        one, two = product(before, layer).reshape(-1), product(after, layer).reshape(-1)
        assert one @ two > 0.6 * np.linalg.norm(one) * np.linalg.norm(two)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "a" / "adapter_config.json").read_text())


def test_what_is_written_can_be_read_as_the_umask_says(tmp_path):
    lora(tmp_path / "a")
    before = os.umask(0o022)
    try:
        compress(tmp_path / "a", tmp_path / "small", Ternary())
        decompress(tmp_path / "small", tmp_path / "back")
        save_merged(tmp_path / "a", tmp_path / "merged", load_weights(tmp_path / "a"))
    finally:
        os.umask(before)
    files = [file for name in ("small", "back", "merged") for file in (tmp_path / name).iterdir()]
    assert {file.suffix for file in files} == {".json", ".ternary", ".safetensors"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_balance_saves_what_the_noise_in_a_would_drown(tmp_path):
    before = lora(tmp_path / "a")
    for name, balanced in (("yes", True), ("no", False)):
        compress(tmp_path / "a", tmp_path / name, Ternary(density=0.1), balanced=balanced)
        decompress(tmp_path / name, tmp_path / f"{name}-back")
    assert not product(load_peft(tmp_path / "no-back"), "m.0.q").any()
    assert product(load_peft(tmp_path / "yes-back"), "m.0.q").any()
    assert before


def test_ia3_is_compressed_around_one(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    name = "base_model.model.m.k_proj.ia3_l"
    save_file({name: np.array([1, 1.5, 1, 0.5, 1], np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    compress(folder, tmp_path / "small", KEEP_ALL)
    decompress(tmp_path / "small", tmp_path / "back")
    assert load_file(tmp_path / "back" / "adapter_model.safetensors")[name].tolist() == [1, 1.5, 1, 0.5, 1]


def test_a_full_fine_tune_is_compressed_against_its_base(tmp_path):
    rng = np.random.Generator(np.random.Philox(1))
    weights = {"w": rng.normal(size=(8, 8)).astype(np.float32), "b": np.zeros(3, np.float32)}
    tuned = {"w": weights["w"] + np.float32(0.25), "b": weights["b"]}
    for name, tensors in (("base", weights), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    compress(tmp_path / "tuned", tmp_path / "small", KEEP_ALL, base=tmp_path / "base")
    decompress(tmp_path / "small", tmp_path / "back", base=tmp_path / "base")
    back = load_file(tmp_path / "back" / "model.safetensors")
    np.testing.assert_allclose(back["w"], tuned["w"], atol=1e-6)
    np.testing.assert_array_equal(back["b"], tuned["b"])
    with pytest.raises(ModelError, match="--base"):
        compress(tmp_path / "tuned", tmp_path / "other", KEEP_ALL)
    with pytest.raises(ModelError, match="--base"):
        decompress(tmp_path / "small", tmp_path / "other")


@pytest.mark.parametrize("codec", [KEEP_ALL, ere(3), delta_come(3)])
def test_scalars_and_empty_tensors_of_a_fine_tune_survive(tmp_path, codec):
    for name, change in (("base", 0.0), ("tuned", 0.5)):
        (tmp_path / name).mkdir()
        weights = {"s": np.array(2 + change, np.float32), "e": np.zeros((0, 3), np.float32), "n": np.arange(3)}
        save_file(weights, tmp_path / name / "model.safetensors")
    compress(tmp_path / "tuned", tmp_path / "small", codec, base=tmp_path / "base")
    decompress(tmp_path / "small", tmp_path / "back", base=tmp_path / "base")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert (back["s"].shape, back["e"].shape) == ((), (0, 3))
    assert back["s"] == 2.5
    assert back["n"].tolist() == [0, 1, 2]


def test_values_that_are_not_finite_are_refused_before_balancing(tmp_path):
    factors = {name: np.full_like(array, np.nan) for name, array in lora(tmp_path / "a").items()}
    save_peft(tmp_path / "nan", factors, rank=4, alpha=8, base_model="tiny")
    with pytest.raises(WireError, match="finite"):
        compress(tmp_path / "nan", tmp_path / "small", Ternary())
    assert not (tmp_path / "small").exists()


def full_fine_tune(folder):
    """A base, and a fine-tune that moved its matrix along three directions."""
    rng = np.random.Generator(np.random.Philox(2))
    weights = {"w": rng.normal(size=(40, 30)).astype(np.float32), "b": np.zeros(5, np.float32)}
    change = (rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30))).astype(np.float32)
    for name, tensors in (("base", weights), ("tuned", {"w": weights["w"] + change, "b": weights["b"] + 1})):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    return weights["w"] + change


@pytest.mark.parametrize(("codec", "apart"), [(ere(3), 0.006), (delta_come(3), 0.1), (ere(30), 0.006)])
def test_a_full_fine_tune_as_singular_vectors(tmp_path, codec, apart):
    tuned = full_fine_tune(tmp_path)
    sizes = compress(tmp_path / "tuned", tmp_path / "small", codec, base=tmp_path / "base")
    assert sizes.after == (tmp_path / "small" / TERNARY).stat().st_size
    decompress(tmp_path / "small", tmp_path / "back", base=tmp_path / "base")
    back = load_file(tmp_path / "back" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert np.linalg.norm(back["w"] - tuned) < apart * np.linalg.norm(tuned - base["w"])
    np.testing.assert_allclose(back["b"], 1)


def test_singular_vectors_are_not_for_adapters(tmp_path):
    lora(tmp_path / "a")
    with pytest.raises(ConfigError, match="ternary for an adapter"):
        compress(tmp_path / "a", tmp_path / "small", ere(2))


def test_compressed_adapters_are_read_like_plain_ones(tmp_path):
    lora(tmp_path / "a")
    compress(tmp_path / "a", tmp_path / "small", KEEP_ALL)
    assert list(load_weights(tmp_path / "small")) == list(load_weights(tmp_path / "a"))


def test_mistakes_are_told_in_words(tmp_path):
    lora(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="new or empty"):
        compress(tmp_path / "a", tmp_path / "full", KEEP_ALL)
    with pytest.raises(ModelError, match="none of them"):
        compress(tmp_path / "nowhere", tmp_path / "out", KEEP_ALL)
    with pytest.raises(ModelError, match="compressed adapter"):
        decompress(tmp_path / "a", tmp_path / "out")
    with pytest.raises(ConfigError, match="--base"):
        compress(tmp_path / "a", tmp_path / "out", KEEP_ALL, base=tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(ModelError, match="LORA or IA3"):
        compress(tmp_path / "a", tmp_path / "out", KEEP_ALL)


def header(*entries, **more):
    text = zlib.compress(json.dumps({"tensors": entries, **more}).encode())
    return MAGIC + len(text).to_bytes(4, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FEDTERN2",
        MAGIC,
        MAGIC + b"\xff\xff\xff\xff",
        header(["x", "float32", [2]]),
        header(["x", "float32", [-1]]) + b"\x01\x00\x00",
        header(["x", "float32", [True]]) + b"\x01\x00\x00",
        header(["x", "complex", [1]]) + b"\x01\x00\x00",
        header(["x", ["float32"], [1]]) + b"\x01\x00\x00",
        header([1, "float32", [1]]) + b"\x01\x00\x00",
        header(["x", "float32"]) + b"\x01\x00\x00",
        header(["x", "float32", [1]], ["x", "float32", [1]]) + b"\x01\x00\x00",
        header(["x", "float32", [1, 1]], groups=[[1, 3]]) + bytes(8),
        header(["x", "float32", [1, 1]], groups=[[1 << 40, 16]]) + bytes(8),
        header(["x", "float32", [1, 1]], groups=[[True, 16]]) + bytes(8),
        header(["x", "float32", [1, 1]], groups=7) + bytes(8),
        header(["x", "float32", [1, 1]], groups=[[1, 16]]) + bytes(3),
        header(["x", "float32", [1 << 39]]) + b"\x01\x00\x00" + bytes(8),
        MAGIC + (6).to_bytes(4, "little") + zlib.compress(b"[")[:6],
    ],
)
def test_damaged_files_are_refused(data):
    with pytest.raises(WireError):
        read(data)


def test_bent_files_never_crash():
    rng = np.random.Generator(np.random.Philox(1))
    tensors = {"a": rng.normal(size=(9, 9)).astype(np.float32), "b": np.arange(4)}
    files = [write(tensors, codec) for codec in (Ternary(density=0.3), delta_come(5))]
    for number in range(3000):
        data = bytearray(files[number % 2])
        for at in rng.integers(0, len(data), 2):
            data[at] = rng.integers(0, 256)
        try:
            read(bytes(data[: int(rng.integers(0, 2 * len(data)))]))
        except WireError:
            continue
