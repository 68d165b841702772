"""The plain codec is the trust boundary: exact bytes, or WireError."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.codecs import raw
from fedtune.errors import WireError
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA, FLoRA
from fedtune.rounds import Round
from fedtune.tensors import DTYPES, Manifest, TensorSpec, digest

FLOATS = ["float64", "float32", "float16", "bfloat16"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


def _finite(bits, spec):
    """Any bit pattern, with NaN and infinities put to 1."""
    array = bits[: spec.nbytes].copy().view(DTYPES[spec.dtype]).reshape(spec.shape)
    if array.dtype.kind in "iub":
        return array
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(array), array, array.dtype.type(1))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(list(DTYPES))), max_size=6), st.integers(0, 2**32))
def test_round_trip_returns_the_same_bits(kinds, seed):
    rng = np.random.Generator(np.random.Philox(key=seed))
    specs = [TensorSpec(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(kinds)]
    bag = {spec.name: _finite(rng.integers(0, 256, spec.nbytes, np.uint8), spec) for spec in specs}
    payload = b"".join(raw.encode(bag, Manifest(tuple(specs))))
    assert len(payload) == Manifest(tuple(specs)).nbytes
    back = raw.decode(payload, Manifest(tuple(specs)))
    assert list(back) == list(bag)
    assert digest(back) == digest(bag)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0), (1,), (1, 1), (3, 2)])
def test_every_dtype_and_odd_shape(dtype, shape):
    bag = {"x": np.ones(shape, DTYPES[dtype]), "y": np.arange(3).astype(DTYPES[dtype])}
    for payload in (
        b"".join(raw.encode(bag, Manifest.of(bag))),
        bytearray(b"".join(raw.encode(bag, Manifest.of(bag)))),
    ):
        back = raw.decode(payload, Manifest.of(bag))
        assert back["x"].shape == shape
        assert back["x"].dtype == DTYPES[dtype]
        assert digest(back) == digest(bag)


def test_bytes_are_little_endian_in_manifest_order_with_nothing_between():
    bag = {"b": np.array([1, 2], np.int32), "a": np.array(1.0, np.float32)}
    payload = b"".join(raw.encode(bag, Manifest.of(bag)))
    assert payload == bytes.fromhex("01000000020000000000803f")


def test_encode_copies_nothing():
    x = np.zeros((4, 4), np.float32)
    (chunk,) = raw.encode({"x": x}, Manifest.of({"x": x}))
    assert np.shares_memory(np.frombuffer(chunk, np.uint8), x)


def test_views_are_read_only_and_share_the_payload():
    payload = bytearray(32)
    manifest = Manifest((TensorSpec("x", (2,), "float32"), TensorSpec("y", (3, 2), "float32")))
    for array in raw.decode(payload, manifest).values():
        assert np.shares_memory(array, np.frombuffer(payload, np.uint8))
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


def test_every_truncation_and_extension_is_refused():
    manifest = Manifest(
        (TensorSpec("x", (3, 2), "float32"), TensorSpec("y", (0, 9), "float16"), TensorSpec("z", (5,), "uint8"))
    )
    for length in range(manifest.nbytes + 20):
        if length == manifest.nbytes:
            raw.decode(bytes(length), manifest)
        else:
            with pytest.raises(WireError, match=f"exactly {manifest.nbytes} bytes, got {length} bytes"):
                raw.decode(bytes(length), manifest)
    with pytest.raises(WireError):
        raw.decode(b"x", Manifest(()))
    assert raw.decode(b"", Manifest(())) == {}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_nan_and_infinity_are_refused_both_ways(dtype, bad, at):
    x = np.ones((2, 3), DTYPES[dtype])
    x.reshape(-1)[at] = bad
    manifest = Manifest.of({"x": x})
    with pytest.raises(WireError, match="update: x: expected finite values"):
        list(raw.encode({"x": x}, manifest))
    with pytest.raises(WireError, match="payload: x: expected finite values"):
        raw.decode(x.tobytes(), manifest)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_bit_patterns_of_narrow_floats(dtype):
    manifest = Manifest((TensorSpec("x", (1,), dtype),))
    mantissa = 10 if dtype == "float16" else 7
    exponent = (2**15 - 1) >> mantissa << mantissa
    refused = 0
    for pattern in range(2**16):
        payload = pattern.to_bytes(2, "little")
        if pattern & exponent == exponent:
            refused += 1
            with pytest.raises(WireError):
                raw.decode(payload, manifest)
        else:
            assert raw.decode(payload, manifest)["x"].tobytes() == payload
    assert refused == 2 ** (mantissa + 1)


@pytest.mark.parametrize(
    "other",
    [
        {"y": np.zeros(2, np.float32)},
        {"x": np.zeros(3, np.float32)},
        {"x": np.zeros((2, 1), np.float32)},
        {"x": np.zeros(2, np.float64)},
        {"x": np.zeros(2, ">f4")},
        {},
    ],
)
def test_encode_refuses_what_the_manifest_does_not_say(other):
    with pytest.raises(WireError):
        list(raw.encode(other, Manifest((TensorSpec("x", (2,), "float32"),))))


def _mutate(rng, payload):
    """Cuts, grows, flips bits of, overwrites, splices or keeps a payload."""
    kind, data = rng.integers(7), bytearray(payload)
    at = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return bytes(data) + rng.bytes(int(rng.integers(1, 64)))
    if kind == 2:
        for _ in range(int(rng.integers(1, 9))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        data[at : at + 4] = rng.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\xff\xff\x7f\x7f"]
        )
    elif kind == 4:
        data[:] = rng.bytes(len(data))
    elif kind == 5:
        data[at:] = data[at:][::-1]
    return bytes(data)


def _fuzz(make, tries, seed):
    """Feeds mutated replies to rounds: each is taken whole, or refused with WireError and nothing changed."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    state, member = make()
    method = state[0]
    manifest = method.template(state[1], member)
    good = {s.name: rng.normal(0, 0.1, s.shape).astype(DTYPES[s.dtype]) for s in manifest.specs}
    payload = b"".join(method.encode(good, manifest))
    first = Member("first", member.rank, member.alpha)
    taken = refused = 0
    current = _round(method, state[1], first, payload)
    before = digest(current.close())
    for _ in range(tries):
        total, weight, members = current.total, current.weight, list(current.members)
        try:
            current.add(member, _mutate(rng, payload), 3)
        except WireError:
            refused += 1
            assert current.total is total
            assert (current.weight, current.members) == (weight, members)
            if refused % 100 == 0:
                assert digest(current.close()) == before
        else:
            taken += 1
            current = _round(method, state[1], first, payload)
    assert digest(current.close()) == before
    return taken, refused


def _round(method, state, member, payload):
    current = Round(method, state, 1)
    current.add(member, payload, 5)
    return current


def _flora(base):
    method = FLoRA(rank=2)
    return (method, method.init(base, 0)), method.admit(Member("b", 3))


def _fedavg(base):
    method = FedAvgLoRA(rank=2, dtype="bfloat16")
    return (method, method.init(base, 0)), method.admit(Member("b"))


@pytest.mark.parametrize("make", [_flora, _fedavg])
def test_mutated_replies_never_raise_anything_else_nor_change_the_round(make, base):
    taken, refused = _fuzz(lambda: make(base), 20_000, seed=1)
    assert taken > 500
    assert refused > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("make", [_flora, _fedavg])
def test_a_million_mutated_replies(make, base):
    assert sum(_fuzz(lambda: make(base), 500_000, seed=2)) == 500_000


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_decoded_or_refused(payload):
    manifest = Manifest((TensorSpec("x", (2, 3), "float32"), TensorSpec("y", (4,), "float16")))
    try:
        back = raw.decode(payload, manifest)
    except WireError:
        return
    assert b"".join(raw.encode(back, manifest)) == payload
