"""Versions of the state: read back bit for bit, and only what changed is written."""

import ml_dtypes
import numpy as np
import pytest
from fedtune_server.blobs import Blobs
from fedtune_server.records import VersionRow
from fedtune_server.versions import load_version, save_version
from safetensors.numpy import load_file

from fedtune.errors import StorageError
from fedtune.tensors import digest


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path)


STATE = {
    "000000/x/A": np.zeros((0, 5), ml_dtypes.bfloat16),
    "000000/x/B": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.float16([1.5, -0.0]),
    "wide": np.float64([[np.pi]]),
    "bf": np.ones((3, 2), ml_dtypes.bfloat16),
    "count": np.int64([-1, 2**62]),
    "small": np.int32([-7]),
    "bytes": np.uint8([0, 255]),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def test_every_dtype_and_shape_comes_back(blobs):
    saved = save_version(blobs, 0, STATE, None)
    loaded = load_version(blobs, saved.row)
    assert list(loaded.state) == list(STATE)
    for name, array in STATE.items():
        assert loaded.state[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.state[name], array)
    assert digest(loaded.state) == saved.digest == digest(STATE)


def test_only_changed_tensors_are_written(blobs):
    first = save_version(blobs, 0, {"a": np.ones(1000, np.float32), "b": np.ones(10, np.float32)}, None)
    before = {path.name for path in blobs.folder.iterdir()}
    state = {**first.state, "b": np.zeros(10, np.float32), "c": np.zeros(3, np.float32)}
    second = save_version(blobs, 1, state, first)
    [new] = {path.name for path in blobs.folder.iterdir()} - before
    assert (blobs.folder / new).stat().st_size < 1000
    assert digest(load_version(blobs, second.row).state) == digest(state)


def test_tensor_that_is_not_the_recorded_one_is_named(blobs):
    row = save_version(blobs, 0, {"a": np.ones(3, np.float32)}, None).row
    blob, _ = row.tensors["a"]
    with pytest.raises(StorageError, match="a of version 0"):
        load_version(blobs, VersionRow(0, row.digest, {"a": (blob, "0" * 64)}))
    with pytest.raises(StorageError, match="b of version 0"):
        load_version(blobs, VersionRow(0, row.digest, {"b": row.tensors["a"]}))


def test_blob_that_is_no_safetensors_is_named(blobs):
    digest_of_junk = blobs.put([b"junk"])
    with pytest.raises(StorageError, match=digest_of_junk):
        load_version(blobs, VersionRow(0, "", {"a": (digest_of_junk, "0" * 64)}))


def test_blob_is_a_safetensors_file_that_others_read(blobs):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.int64([5])}
    row = save_version(blobs, 0, state, None).row
    loaded = load_file(blobs.folder / row.tensors["a"][0])
    assert sorted(loaded) == ["a", "b"]
    np.testing.assert_array_equal(loaded["a"], state["a"])
