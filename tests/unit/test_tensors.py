"""Digests are part of the protocol: the literals here must hold on every machine and for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.tensors import DTYPES, Manifest, TensorSpec, as_bytes, check, check_finite, digest, dtype_name, leaf_digest

GOLDEN = {
    "float64": "937d5861baed3d04ad3dba97e5d9a19a91bfc32c1118b72da80606b46ced5301",
    "float32": "58d52d5ba949246a35c9e4d7e7c8ff8030cf149bd749cca18cbc00c9fbde3cb2",
    "float16": "5d755d0974b5b9e23834007bfc926cd291ddf75bbaadd785326f26e09a4ef183",
    "bfloat16": "0cbcb36d2273c9b85a034e379866d91520f9dfa944c7422ee968a9ccf24eb5eb",
    "int64": "c8db42fdec1b99d3650c7f80d2ac5312e47f27364a9445897556173ea657add7",
    "int32": "c82a7c3fed7f71282b8b909417313156a1deefb1faa39033c8f5c13c95bd93f2",
    "uint8": "2e54faa821b620f0e83886cb5bf4b68381a7c1a62096f2e7fa1804eda421d5cb",
}


def _six(dtype):
    return (np.arange(6).reshape(2, 3) - (0 if dtype == "uint8" else 2)).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_of_each_dtype_is_the_golden_one(dtype):
    assert digest({"x": _six(dtype)}) == GOLDEN[dtype]


def test_digest_of_nothing_and_of_a_mixed_bag_are_the_golden_ones():
    assert digest({}) == "6aff420b904fb94bf3cafe7dd417c297b0f60713428abf832a081f66a421f4ed"
    bag = {"b": np.zeros((0, 4), np.float32), "a": np.array(1.5), "é": np.arange(3, dtype=np.int64)}
    assert digest(bag) == "62ac9df1c2b84997f36691378ccd34529ba14bc698e9623ea47f01b1275cf9e3"


@settings(deadline=None)
@given(st.permutations([f"layer.{i}" for i in range(12)]), st.integers(1, 5))
def test_digest_knows_neither_order_nor_threads(names, threads):
    bag = {name: np.full((2, int(name[6:])), float(name[6:]), np.float32) for name in names}
    assert digest(bag, threads) == digest({name: bag[name] for name in sorted(bag)})


def test_digest_knows_neither_strides_nor_byte_layout_in_memory():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert digest({"x": x}) == digest({"x": np.asfortranarray(x)}) == digest({"x": np.repeat(x, 2, axis=1)[:, ::2]})


def test_digest_tells_every_difference():
    x = np.zeros((2, 3), np.float32)
    flipped = x.copy()
    flipped[1, 2] = -0.0
    bags = [
        {"x": x},
        {"y": x},
        {"x": x.reshape(3, 2)},
        {"x": x.reshape(6)},
        {"x": x.reshape(1, 2, 3)},
        {"x": x.view(np.int32)},
        {"x": flipped},
        {"x": x, "y": np.zeros(0, np.float32)},
        {"x": x[:1], "y": x[1:]},
        {"x": np.zeros((0, 3), np.float32)},
        {"x": np.zeros((3, 0), np.float32)},
        {"x": np.zeros((), np.float32)},
        {"x": np.zeros(1, np.float32)},
        {"x\0float32\0": x},
        {},
    ]
    assert len({digest(bag) for bag in bags}) == len(bags)


def test_values_cannot_move_between_names():
    a, b = np.ones(2, np.float32), np.zeros(2, np.float32)
    assert digest({"a": a, "b": b}) != digest({"a": b, "b": a})
    assert leaf_digest("a", a) != leaf_digest("b", a)


@pytest.mark.parametrize("array", [np.zeros(2, bool), np.zeros(2, ">f4"), np.zeros(2, np.complex64), np.array(["a"])])
def test_a_dtype_that_does_not_travel_is_refused(array):
    with pytest.raises(WireError, match="dtype: expected one of float64"):
        dtype_name(array)


def test_as_bytes_copies_nothing_that_is_contiguous():
    x = np.zeros((3, 4), np.float32)
    as_bytes(x)[0] = 255
    assert x.view(np.uint8)[0, 0] == 255


def test_manifest_counts_bytes():
    bag = {dtype: _six(dtype) for dtype in DTYPES}
    manifest = Manifest.of(bag)
    assert manifest.nbytes == sum(x.nbytes for x in bag.values()) == 6 * (8 + 4 + 2 + 2 + 8 + 4 + 1)
    assert manifest.names == list(DTYPES)
    assert TensorSpec("x", (), "float64").nbytes == 8
    assert TensorSpec("x", (5, 0), "float64").nbytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"a": t["a"]}, "names: expected the 2 of the manifest, got .'b'."),
        (lambda t: {**t, "c": t["a"]}, "names"),
        (lambda t: {"b": t["b"], "a": t["a"]}, "another order"),
        (lambda t: {**t, "b": t["b"].T}, r"shape of b: expected \(2, 3\), got \(3, 2\)"),
        (lambda t: {**t, "b": t["b"].astype(np.float64)}, "dtype of b: expected float32, got float64"),
        (lambda t: {**t, "b": np.full((2, 3), np.inf, np.float32)}, r"b: expected finite values, got inf at \(0, 0\)"),
    ],
)
def test_check_names_what_is_wrong(change, message):
    good = {"a": np.zeros(2, np.float32), "b": np.zeros((2, 3), np.float32)}
    manifest = Manifest.of(good)
    check(good, manifest)
    with pytest.raises(WireError, match=message):
        check(change(good), manifest, "update")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_finite_finds_one_bad_value_anywhere(dtype, bad):
    for at in [(0, 0), (1, 2), (3, 4)]:
        x = np.ones((4, 5), DTYPES[dtype])
        check_finite(x, "x")
        x[at] = bad
        with pytest.raises(WireError, match=rf"got -?(nan|inf) at \({at[0]}, {at[1]}\)"):
            check_finite(x, "x")


def test_integers_are_always_finite():
    check_finite(np.array([-(2**63), 2**63 - 1]), "x")
