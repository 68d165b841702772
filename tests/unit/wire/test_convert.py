"""Manifests over the wire: what goes in comes out, and nothing else gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.tensors import DTYPES, Manifest, TensorSpec
from fedtune.wire import convert
from fedtune.wire.v1 import coordinator_pb2 as pb

specs = st.builds(
    TensorSpec,
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.lists(st.integers(0, 100), max_size=4).map(tuple),
    st.sampled_from(sorted(DTYPES)),
)


@given(st.lists(specs, max_size=6, unique_by=lambda spec: spec.name))
def test_roundtrip(items):
    manifest = Manifest(tuple(items))
    assert convert.manifest_from_proto(convert.manifest_to_proto(manifest)) == manifest


def test_every_dtype_has_a_number_and_every_number_a_dtype():
    numbers = set(pb.DType.values()) - {pb.DTYPE_UNSPECIFIED}
    assert set(convert.DTYPE_OF_PROTO) == numbers
    assert sorted(convert.DTYPE_OF_PROTO.values()) == sorted(DTYPES)
    for number, name in convert.DTYPE_OF_PROTO.items():
        assert pb.DType.Name(number) == f"DTYPE_{name.upper()}"


def spec(**fields):
    return pb.TensorSpec(**{"name": "a", "shape": [2], "dtype": pb.DTYPE_FLOAT32, **fields})


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ([spec(dtype=0)], "dtype of a"),
        ([spec(dtype=99)], "dtype of a"),
        ([spec(name="")], "name"),
        ([spec(name="x" * 257)], "name"),
        ([spec(shape=[1] * 9)], "shape of a"),
        ([spec(shape=[2**41])], "shape of a"),
        ([spec(shape=[2**39, 2**39])], "bytes"),
        ([spec(), spec(name="b"), spec()], "a twice"),
    ],
)
def test_refuses(bad, word):
    with pytest.raises(WireError, match=word):
        convert.manifest_from_proto(pb.Manifest(specs=bad))


def test_refuses_more_bytes_than_the_caller_allows():
    with pytest.raises(WireError, match="at most 7 bytes"):
        convert.manifest_from_proto(pb.Manifest(specs=[spec()]), max_bytes=7)


def test_never_sends_what_it_would_refuse():
    with pytest.raises(WireError, match="name"):
        convert.manifest_to_proto(Manifest((TensorSpec("x" * 300, (1,), "uint8"),)))


def test_bytes_that_are_no_message():
    with pytest.raises(WireError, match="SubmitHeader"):
        convert.parse(pb.SubmitHeader, b"\xff\xff\xff")


@given(st.binary(max_size=60))
def test_no_bytes_break_the_parser(data):
    try:
        convert.manifest_from_proto(convert.parse(pb.Manifest, data))
    except WireError:
        return
