"""Error feedback: sums telescope exactly, with any codec, over any number of rounds."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.codecs import feedback
from fedtune.codecs.blocks import Blocks
from fedtune.codecs.feedback import UNIT, carry, units
from fedtune.codecs.narrow import Narrow
from fedtune.codecs.ternary import Ternary
from fedtune.errors import WireError
from fedtune.tensors import DTYPES, Manifest

CODECS = [
    Ternary(density=0.05),
    Ternary(density=0.2, scale="least-squares", sigma="tensor"),
    Ternary(density=0.0),
    Ternary(density=1.0),
    Blocks(bits=8),
    Blocks(bits=4),
    Narrow(),
]


def encode(codec, tensors, manifest, carried):
    wanted, carried = carry(codec, tensors, manifest, carried)
    return b"".join(codec.encode(wanted, manifest)), carried


def update(rng, dtype):
    """Values of very different sizes, all multiples of 2^-52."""
    wide = rng.normal(size=(40, 5)) * 2.0 ** rng.integers(-20, 3, (40, 5))
    return {
        "a": wide.astype(DTYPES[dtype]),
        "b": rng.normal(size=7).astype(np.float32),
        "n": np.arange(3, dtype=np.int32),
    }


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_that_was_sent_and_what_is_carried_is_all_that_was_wanted(codec, dtype):
    rng = np.random.Generator(np.random.Philox(1))
    carried, wanted, sent = {}, {"a": 0, "b": 0}, {"a": 0, "b": 0}
    for _ in range(8):
        tensors = update(rng, dtype)
        manifest = Manifest.of(tensors)
        payload, carried = encode(codec, tensors, manifest, carried)
        decoded = codec.decode(payload, manifest)
        np.testing.assert_array_equal(decoded["n"], tensors["n"])
        for name in wanted:
            wanted[name] = wanted[name] + units(tensors[name], name)
            sent[name] = sent[name] + units(decoded[name], name)
    for name in wanted:
        np.testing.assert_array_equal(sent[name] + carried[name], wanted[name])  # integers: exactly
    assert set(carried) == {"a", "b"}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(2.0**-29, 511, width=32) | st.just(0.0), st.booleans())
def test_units_hold_float32_exactly(value, minus):
    x = np.array([-value if minus else value], np.float32)
    assert (units(x, "x") * UNIT == x.astype(np.float64)).all()


def test_without_feedback_small_values_never_arrive_and_with_it_they_do():
    tensors = {"x": np.array([1.0, 0.3, 0.2, 0.1], np.float32)}
    manifest, codec = Manifest.of(tensors), Ternary(density=0.25, scale="least-squares")
    carried, plain, fed = {}, 0, 0
    for _ in range(200):
        plain = plain + codec.decode(b"".join(codec.encode(tensors, manifest)), manifest)["x"]
        payload, carried = encode(codec, tensors, manifest, carried)
        fed = fed + codec.decode(payload, manifest)["x"]
    assert plain[1:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(fed / 200, tensors["x"], atol=0.02)


@pytest.mark.parametrize("value", [512.0, -1e6, np.nan])
def test_a_diverged_update_is_refused(value):
    tensors = {"x": np.array([value, 1], np.float32)}
    with pytest.raises(WireError, match="x"):
        carry(Narrow(), tensors, Manifest.of(tensors), {})


def test_a_residue_that_does_not_fit_is_refused():
    tensors = {"x": np.ones(3, np.float32)}
    manifest = Manifest.of(tensors)
    for bad in (np.zeros(2, np.int64), np.zeros(3, np.float32), np.full(3, 2**61, np.int64)):
        with pytest.raises(WireError, match="carried x"):
            carry(Narrow(), tensors, manifest, {"x": bad})


def test_the_limit_leaves_no_room_for_overflow():
    assert 3 * feedback.LIMIT / UNIT < 2**63
