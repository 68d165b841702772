"""Files of weights have the mode of any new file."""

import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.weights import make_all_readable, save_weights


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_is_what_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "new.safetensors", {"a": np.zeros(2)})
        (tmp_path / "old.safetensors").touch(0o600)
        make_all_readable(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "new.safetensors": mode,
        "old.safetensors": mode,
    }


def test_values_come_back_whatever_their_layout(tmp_path):
    arrays = {"t": np.arange(6.0).reshape(2, 3).T, "b": np.ones((2, 2), ml_dtypes.bfloat16), "e": np.zeros((0, 3))}
    arrays["scalar"] = np.array(3.0)
    save_weights(tmp_path / "w.safetensors", arrays, {"format": "pt"})
    back = load_file(tmp_path / "w.safetensors")
    assert {name: array.shape for name, array in back.items()} == {name: array.shape for name, array in arrays.items()}
    assert all(np.array_equal(back[name], array) for name, array in arrays.items())
