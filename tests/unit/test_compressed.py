"""Compressed folders: LoRA, IA3 and full fine-tunes go in and come back; damaged files are refused in words."""

import json
import os
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.codecs.spectral import delta_come, ere
from fedtune.codecs.ternary import Ternary
from fedtune.compressed import MAGIC, TERNARY, compress, decompress, load_weights, read, save_merged, write
from fedtune.errors import ConfigError, ModelError, StorageError, WireError
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
        header(["x", "float32", [1 << 28]]) + b"\x01\x00\x00" + bytes(8),
        header(["x", "float32", [0, (1 << 40) - 1, (1 << 40) - 1]]) + b"\x01\x00\x00" + bytes(8),
        header(["x", "int64", [0, (1 << 40) - 1, (1 << 40) - 1]]) + b"\x01\x00" + bytes(8),
        header(["x", "float32", [0, (1 << 40) - 1, (1 << 40) - 1]], groups=[[1, 16]]),
        header(["\ud800", "float32", [1]]) + b"\x01\x00\x00" + bytes(8),
        header(["__metadata__", "float32", [1]]) + b"\x01\x00\x00" + bytes(8),
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


def test_a_small_file_that_announces_much_is_a_question():
    data = header(["x", "float32", [300 << 20]]) + b"\x01\x00\x00" + bytes(8)
    with pytest.raises(WireError, match=r"at most 1 GB, got 1\.258 GB in a file of \d+ bytes.*--max-gb 2"):
        read(data)
    data = header(["x", "float32", [1000]]) + b"\x01\x00\x00" + bytes(8)
    with pytest.raises(WireError, match="--max-gb 1"):
        read(data, most=3999)
    assert read(data, most=4000)["x"].nbytes == read(data)["x"].nbytes == 4000


def test_what_a_fine_tune_may_announce_is_its_base(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / TERNARY).write_bytes(header(["w", "float32", [1 << 39]]) + b"\x01\x00\x00" + bytes(8))
    (tmp_path / "base").mkdir()
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ModelError, match="w: expected shape"):
        decompress(tmp_path / "small", tmp_path / "out", base=tmp_path / "base")


def test_integers_of_a_fine_tune_come_back_to_the_last_digit(tmp_path):
    kinds = {"n": np.array([5, -(1 << 62)]), "u": np.array(7, np.uint8), "f": np.array([1.5]), "b": np.array([True])}
    tuned = {
        "n": np.array([(1 << 60) + 3, 1 << 62]),
        "u": np.array(2, np.uint8),
        "f": np.array([9]),
        "b": np.array([3]),
    }
    for name, weights in (("base", kinds), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    for number, codec in enumerate((KEEP_ALL, ere(1))):
        compress(tmp_path / "tuned", tmp_path / f"small{number}", codec, base=tmp_path / "base")
        decompress(tmp_path / f"small{number}", tmp_path / f"back{number}", base=tmp_path / "base")
        back = load_file(tmp_path / f"back{number}" / "model.safetensors")
        assert {name: array.tolist() for name, array in back.items()} == {n: a.tolist() for n, a in tuned.items()}


def test_a_rank_beyond_the_matrices_is_theirs(tmp_path):
    full_fine_tune(tmp_path)
    for rank in (30, 20_000_000):
        compress(tmp_path / "tuned", tmp_path / f"{rank}", delta_come(rank), base=tmp_path / "base")
    assert (tmp_path / "30" / TERNARY).read_bytes() == (tmp_path / "20000000" / TERNARY).read_bytes()
    decompress(tmp_path / "20000000", tmp_path / "back", base=tmp_path / "base")


def test_a_compressed_adapter_is_compressed_again_and_a_compressed_model_is_not(tmp_path):
    lora(tmp_path / "a")
    compress(tmp_path / "a", tmp_path / "small", Ternary(density=0.5, scale="least-squares"))
    compress(tmp_path / "small", tmp_path / "smaller", Ternary(density=0.1, scale="least-squares"))
    assert list(load_weights(tmp_path / "smaller")) == list(load_weights(tmp_path / "a"))
    full_fine_tune(tmp_path)
    compress(tmp_path / "tuned", tmp_path / "model", KEEP_ALL, base=tmp_path / "base")
    with pytest.raises(ModelError, match=r"compressed already.*decompress it with --base"):
        compress(tmp_path / "model", tmp_path / "again", KEEP_ALL, base=tmp_path / "base")


@contextmanager
def small_files():
    """Files of this process may have 4,000 bytes, as if the disk were full; pytest's own output, too."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def large(tmp_path):
    """An adapter of more bytes than that, also compressed."""
    noise = np.random.Generator(np.random.Philox(1)).normal(size=(2, 200, 200)).astype(np.float32)
    save_peft(tmp_path / "a", {"m.q/A": noise[0], "m.q/B": noise[1]}, rank=200, alpha=8, base_model="tiny")
    compress(tmp_path / "a", tmp_path / "small", KEEP_ALL)
    return tmp_path


def test_a_full_disk_is_told_in_words_and_leaves_nothing(large):
    before = sorted(large.iterdir())
    with small_files(), pytest.raises(StorageError, match=r"/cc: .*too large.*Make room"):
        compress(large / "a", large / "cc", KEEP_ALL)
    with small_files(), pytest.raises(StorageError, match=r"/dd: .*too large.*Make room"):
        decompress(large / "small", large / "dd")
    with small_files(), pytest.raises(StorageError, match="/mm: "):
        save_merged(large / "a", large / "mm", load_weights(large / "a"))
    assert sorted(large.iterdir()) == before
