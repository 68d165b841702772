"""bfloat16, float16, and block quantisation to 8 and 4 bits: error bounds, exact sizes, hostile bytes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtune.codecs.blocks import BLOCK, Blocks
from fedtune.codecs.narrow import Narrow
from fedtune.errors import WireError
from fedtune.tensors import DTYPES, Manifest, TensorSpec, digest

FLOATS = ["float64", "float32", "float16", "bfloat16"]
CODECS = [Narrow(), Narrow(dtype="float16"), Blocks(bits=8), Blocks(bits=4)]


def bag(dtype, seed=1):
    rng = np.random.Generator(np.random.Philox(seed))
    shapes = [(3, 50), (), (0, 4), (1,), (64,), (129,)]
    tensors = {f"t{i}": rng.normal(size=s).astype(DTYPES[dtype]) for i, s in enumerate(shapes)}
    return tensors | {"n": np.arange(5), "z": np.zeros(70, DTYPES[dtype])}


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype_and_shape_comes_back_in_exactly_the_announced_bytes(codec, dtype):
    tensors = bag(dtype)
    manifest = Manifest.of(tensors)
    payload = b"".join(codec.encode(tensors, manifest))
    decoded = codec.decode(payload, manifest)
    assert len(payload) == codec.largest(manifest)
    assert Manifest.of(decoded) == manifest
    np.testing.assert_array_equal(decoded["n"], tensors["n"])
    np.testing.assert_array_equal(decoded["z"], tensors["z"])
    for length in (0, len(payload) - 1, len(payload) + 1):
        with pytest.raises(WireError):
            codec.decode(bytes(length), manifest)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_was_decoded_decodes_to_itself_again(codec):
    tensors = bag("float32")
    manifest = Manifest.of(tensors)
    once = codec.decode(b"".join(codec.encode(tensors, manifest)), manifest)
    if isinstance(codec, Narrow):
        assert digest(codec.decode(b"".join(codec.encode(once, manifest)), manifest)) == digest(once)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrays(np.float32, st.integers(0, 200), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    st.sampled_from([8, 4]),
    st.sampled_from([1.0, 1e-30]),
)
def test_no_value_is_further_off_than_half_a_step(values, bits, factor):
    values = (values * np.float32(factor)).astype(np.float32)
    manifest, codec = Manifest.of({"x": values}), Blocks(bits=bits)
    decoded = codec.decode(b"".join(codec.encode({"x": values}, manifest)), manifest)["x"]
    for at in range(0, values.size, BLOCK):
        block = values[at : at + BLOCK].astype(np.float64)
        step = np.abs(block).max() / (2 ** (bits - 1) - 1) * (1 + 2**-7) + 1e-38
        assert np.abs(decoded[at : at + BLOCK] - block).max() <= 0.5 * step * (1 + 1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_number_of_a_dtype_does_not_overflow(bits, dtype):
    top = ml_dtypes.finfo(DTYPES[dtype]).max
    if dtype != "float16":
        top = top * 0.98  # above, the scale times the largest code is beyond float32
    tensors = {"x": np.array([top, -top, 0, 1], DTYPES[dtype])}
    manifest, codec = Manifest.of(tensors), Blocks(bits=bits)
    decoded = codec.decode(b"".join(codec.encode(tensors, manifest)), manifest)["x"].astype(np.float64)
    assert decoded[0] == pytest.approx(float(top), rel=0.02)
    assert decoded[1] == -decoded[0]


def test_golden_bytes_of_blocks():
    x = {"x": np.array([127, -64, 1, 0], np.float32)}
    manifest = Manifest.of(x)
    assert b"".join(Blocks(bits=8).encode(x, manifest)).hex(" ") == "80 3f 7f c0 01 00"
    y = {"y": np.array([7, -7, 1], np.float32)}
    assert b"".join(Blocks(bits=4).encode(y, Manifest.of(y))).hex(" ") == "80 3f 97 01"
    np.testing.assert_array_equal(Blocks(bits=8).decode(bytes.fromhex("803f7fc00100"), manifest)["x"], x["x"])


@pytest.mark.parametrize(
    ("bits", "payload"),
    [
        (8, "803f80000000"),  # code -128
        (8, "80bf01000000"),  # scale -1
        (8, "807f01000000"),  # scale infinity
        (8, "c07f01000000"),  # scale NaN
        (4, "803f0800"),  # code -8
    ],
)
def test_bytes_that_are_never_written_are_refused(bits, payload):
    with pytest.raises(WireError):
        Blocks(bits=bits).decode(bytes.fromhex(payload), Manifest((TensorSpec("x", (4,), "float32"),)))


def test_padding_of_half_bytes_must_be_zero():
    manifest = Manifest((TensorSpec("x", (3,), "float32"),))
    assert Blocks(bits=4).decode(bytes.fromhex("803f1101"), manifest)["x"].tolist() == [1, 1, 1]
    with pytest.raises(WireError):
        Blocks(bits=4).decode(bytes.fromhex("803f1111"), manifest)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(codec, value):
    tensors = {"x": np.array([1, value], np.float32)}
    with pytest.raises(WireError, match="finite"):
        list(codec.encode(tensors, Manifest.of(tensors)))


def test_values_beyond_the_narrow_range_are_refused():
    tensors = {"x": np.array([1e30], np.float32)}
    with pytest.raises(WireError, match="finite"):
        list(Narrow(dtype="float16").encode(tensors, Manifest.of(tensors)))
    wide = {"x": np.array([1e300])}
    with pytest.raises(WireError, match="finite"):
        list(Blocks().encode(wide, Manifest.of(wide)))


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_random_bytes_of_the_right_length_decode_to_finite_values_or_are_refused(codec):
    manifest = Manifest.of(bag("float32") | bag("float16", 2))
    rng = np.random.Generator(np.random.Philox(3))
    good = b"".join(codec.encode(bag("float32") | bag("float16", 2), manifest))
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 3):
            data[at] = rng.integers(0, 256)
        try:
            decoded = codec.decode(bytes(data), manifest)
        except WireError:
            continue
        assert all(np.isfinite(a.astype(np.float64)).all() for a in decoded.values())
