"""Fingerprints of base models, and every way a model folder can be broken."""

import contextlib
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedtune.base import open_base
from fedtune.errors import ModelError
from fedtune.lora import find_layers
from fedtune.testing import toy_base

GOLDEN = "29d7a6bc3d18ff3602863220f42b909aaf03a186c6c60aa321a9511de95522e7"


def _folder(path, config=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return path


def _write(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_the_golden_fingerprint(tmp_path):
    weights = {name: np.arange(6, dtype=kind).reshape(2, 3) for name, kind in (("b.weight", "f4"), ("é.weight", "i8"))}
    save_file(weights, _folder(tmp_path) / "model.safetensors")
    assert open_base(tmp_path).digest == GOLDEN


def test_names_are_the_models_own(base, base_folder):
    assert base.name == str(base_folder)
    assert not base.transposed
    assert open_base(base_folder, "org/toy").name == "org/toy"
    assert base.weights.names == sorted(load_file(base_folder / "model.safetensors"))


def test_sharded_and_single_file_have_the_same_fingerprint(base, base_folder, tmp_path):
    weights = load_file(base_folder / "model.safetensors")
    names = sorted(weights, reverse=True)
    shards = {f"model-{i:05d}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for listed in (False, True):
        folder = _folder(tmp_path / str(listed))
        for file, part in shards.items():
            save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        if listed:
            index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            # Files that are not the model's: other frameworks' copies of it, an adapter.
            save_file({"other": np.zeros(3, np.float32)}, folder / "consolidated.safetensors")
        sharded = open_base(folder)
        assert sharded.digest == base.digest
        assert sharded.weights == base.weights


def test_one_file_is_preferred_over_its_neighbours(base, base_folder, tmp_path):
    folder = _folder(tmp_path)
    (folder / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes())
    save_file({"other": np.zeros(3, np.float32)}, folder / "adapter_model.safetensors")
    assert open_base(folder).digest == base.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {**w, "model.extra.weight": np.zeros(1, np.float32)},
        lambda w: dict(list(w.items())[1:]),
        lambda w: {("model.x" if i == 0 else n): a for i, (n, a) in enumerate(w.items())},
        lambda w: {n: (a.reshape(-1) if i == 0 else a) for i, (n, a) in enumerate(w.items())},
        lambda w: {n: (a.view(np.int32) if i == 0 else a) for i, (n, a) in enumerate(w.items())},
        lambda w: {n: np.nextafter(a, 9) if i == 3 else a for i, (n, a) in enumerate(w.items())},
    ],
)
def test_every_change_of_the_weights_changes_the_fingerprint(base, base_folder, tmp_path, change):
    folder = _folder(tmp_path)
    save_file(change(load_file(base_folder / "model.safetensors")), folder / "model.safetensors")
    assert open_base(folder).digest != base.digest


def test_file_metadata_does_not_change_the_fingerprint(base, base_folder, tmp_path):
    folder = _folder(tmp_path)
    save_file(load_file(base_folder / "model.safetensors"), folder / "model.safetensors", metadata={"by": "me"})
    assert open_base(folder).digest == base.digest


def test_gpt2_gets_its_prefix_and_is_transposed(tmp_path):
    weights = {"h.0.attn.c_attn.weight": np.ones((4, 12), np.float32), "wte.weight": np.ones((9, 4), np.float32)}
    plain, prefixed = _folder(tmp_path / "a", {"model_type": "gpt2"}), _folder(tmp_path / "b", {"model_type": "gpt2"})
    save_file(weights, plain / "model.safetensors")
    save_file({f"transformer.{n}": a for n, a in weights.items()}, prefixed / "model.safetensors")
    for folder in (plain, prefixed):
        base = open_base(folder)
        assert base.transposed
        assert base.weights.names == ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"]
        (layer,) = find_layers(base.weights, ["c_attn"], base.transposed)
        assert (layer.inputs, layer.outputs) == (4, 12)


def test_odd_tensors_are_read(tmp_path):
    folder = _folder(tmp_path)
    save_file(
        {"a": np.zeros((0, 3), np.float32), "b": np.array(2.0), "c": np.zeros((2, 0), np.int64)},
        folder / "x.safetensors",
    )
    assert [spec.shape for spec in open_base(folder).weights.specs] == [(0, 3), (), (2, 0)]


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        (b"5", b""),
        (b'"text"', b""),
        (b"[]", b""),
        ({"a": 5}, b""),
        ({"a": {}}, b""),
        ({"a": ENTRY}, b"\0" * 15),
        ({"a": ENTRY}, b"\0" * 17),
        ({"a": ENTRY, "b": ENTRY}, b"\0" * 16),
        ({"a": {**ENTRY, "shape": [2, 3]}}, b"\0" * 16),
        ({"a": {**ENTRY, "shape": [-2, -2]}}, b"\0" * 16),
        ({"a": {**ENTRY, "shape": [2.0, 2]}}, b"\0" * 16),
        ({"a": {**ENTRY, "shape": "22"}}, b"\0" * 16),
        ({"a": {**ENTRY, "shape": [2**40, 2**40]}}, b"\0" * 16),
        ({"a": {**ENTRY, "data_offsets": [-16, 0]}}, b"\0" * 16),
        ({"a": {**ENTRY, "data_offsets": [16, 0]}}, b"\0" * 16),
        ({"a": {**ENTRY, "data_offsets": [0]}}, b"\0" * 16),
        ({"a": {**ENTRY, "dtype": "F31"}}, b"\0" * 16),
        ({"a": {**ENTRY, "dtype": []}}, b"\0" * 16),
    ],
)
def test_a_damaged_file_is_a_model_error(tmp_path, header, data):
    _write(_folder(tmp_path) / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=r"model.safetensors: expected a safetensors file"):
        open_base(tmp_path)


def test_a_dtype_that_is_not_carried_is_named(tmp_path):
    _write(_folder(tmp_path) / "m.safetensors", {"a": {"dtype": "BOOL", "shape": [16], "data_offsets": [0, 16]}})
    with pytest.raises(ModelError, match=r"expected tensors of F64, F32, .* got 'BOOL'"):
        open_base(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200 * 2**20, 1000])
def test_a_huge_header_length_is_refused_before_it_is_read(tmp_path, length):
    (_folder(tmp_path) / "m.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ModelError):
        open_base(tmp_path)


def test_every_truncation_is_refused(base_folder, tmp_path):
    whole = (base_folder / "model.safetensors").read_bytes()
    folder = _folder(tmp_path)
    for length in [*range(0, 600, 7), len(whole) - 1, len(whole) // 2]:
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            open_base(folder)


def test_a_flipped_bit_is_refused_or_changes_the_fingerprint(base, base_folder, tmp_path):
    whole = (base_folder / "model.safetensors").read_bytes()
    folder = _folder(tmp_path)
    rng = np.random.Generator(np.random.Philox(key=3))
    for at in rng.integers(0, len(whole), 400):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        (folder / "model.safetensors").write_bytes(broken)
        with contextlib.suppress(ModelError):
            assert open_base(folder).digest != base.digest


@pytest.mark.parametrize("config", ["{", "[]", "[1]", "5", "null", "[" * 100_000, "\ud800"])
def test_a_bad_config_is_a_model_error(base_folder, tmp_path, config):
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogatepass"))
    (tmp_path / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"config\.json"):
        open_base(tmp_path)


def test_an_odd_model_type_is_only_another_model(base, base_folder, tmp_path):
    _folder(tmp_path, {"model_type": ["gpt2"]})
    (tmp_path / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes())
    assert open_base(tmp_path).digest == base.digest


def test_missing_things_are_named(base_folder, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere: expected a model folder with config\.json"):
        open_base(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"expected \*\.safetensors files, got none. Other formats"):
        open_base(_folder(tmp_path / "empty"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=r"config\.json"):
        open_base(tmp_path / "weights")


def test_a_missing_shard_is_named(tmp_path):
    folder = _folder(tmp_path)
    save_file({"a": np.zeros(2, np.float32)}, folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-2\.safetensors"):
        open_base(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 5}}'])
def test_a_bad_index_is_a_model_error(tmp_path, text):
    (_folder(tmp_path) / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json: expected an index"):
        open_base(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = _folder(tmp_path)
    for file in ("one", "two"):
        save_file({"a": np.zeros(2, np.float32)}, folder / f"{file}.safetensors")
    with pytest.raises(ModelError, match=r"two\.safetensors: expected tensors that one\.safetensors lacks, got a"):
        open_base(folder)


def test_toy_base_is_a_function_of_its_arguments(base, tmp_path):
    assert open_base(toy_base(tmp_path / "a")).digest == base.digest
    assert open_base(toy_base(tmp_path / "b", seed=1)).digest != base.digest
    wide = open_base(toy_base(tmp_path / "c", layers=3, width=32))
    assert [spec.shape for spec in wide.weights.specs] == [(32, 32), (16, 32)] * 3
