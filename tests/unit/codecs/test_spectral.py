"""Singular vectors in mixed precision: against the SVD itself, against plain rounding, and against hostile bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.codecs.blocks import Blocks
from fedtune.codecs.spectral import Spectral, delta_come, ere
from fedtune.errors import ConfigError, WireError
from fedtune.tensors import DTYPES, Manifest

SPECTRAL = [ere(4), delta_come(1), delta_come(8), Spectral(groups=((1, 16), (2, 8), (50, 4)))]


def fine_tune(rows=24, columns=40, rank=24, seed=0, dtype="float32"):
    """A change whose singular values fall by half each time, a bias, and an index."""
    rng = np.random.Generator(np.random.Philox(seed))
    u, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    v, _ = np.linalg.qr(rng.normal(size=(columns, columns)))
    k = min(rows, columns, rank)
    matrix = (u[:, :k] * 0.5 ** np.arange(k)) @ v[:k]
    return {
        "w": matrix.astype(DTYPES[dtype]),
        "bias": rng.normal(size=rows).astype(np.float32),
        "index": np.arange(5, dtype=np.int64),
    }


def round_trip(codec, tensors):
    manifest = Manifest.of(tensors)
    payload = b"".join(codec.encode(tensors, manifest))
    assert len(payload) == codec.largest(manifest)
    return payload, codec.decode(payload, manifest)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_ere_is_the_truncated_svd(rank):
    tensors = fine_tune()
    _, back = round_trip(ere(rank), tensors)
    u, s, v = np.linalg.svd(tensors["w"].astype(np.float64))
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(back["w"], best, atol=0.01)  # bfloat16 has three digits
    np.testing.assert_allclose(back["bias"], tensors["bias"], rtol=0.004)
    np.testing.assert_array_equal(back["index"], tensors["index"])


def test_every_group_is_rounded_as_its_codec_rounds():
    """The plain restatement: an SVD, each group through its codec, a product."""
    tensors = fine_tune()
    _, back = round_trip(delta_come(6), tensors)
    u, s, v = np.linalg.svd(tensors["w"].astype(np.float64), full_matrices=False)
    want = np.zeros((24, 40))
    for part, bits in ((slice(0, 2), 8), (slice(2, 6), 4)):
        pair = {
            "a": (np.sqrt(s)[:, None] * v)[part].astype(np.float32),
            "b": (u * np.sqrt(s)).T[part].astype(np.float32),
        }
        manifest = Manifest.of(pair)
        seen = Blocks(bits=bits).decode(b"".join(Blocks(bits=bits).encode(pair, manifest)), manifest)
        want += seen["b"].astype(np.float64).T @ seen["a"].astype(np.float64)
    np.testing.assert_allclose(back["w"], want, atol=1e-6)


def test_at_equal_bytes_mixed_precision_comes_nearer_than_sixteen_bits():
    tensors = {
        "w": fine_tune(96, 128, 96)["w"] + 0.001 * np.random.Generator(np.random.Philox(9)).normal(size=(96, 128))
    }
    tensors["w"] = tensors["w"].astype(np.float32)
    apart = {}
    for codec in (ere(4), delta_come(13)):
        payload, back = round_trip(codec, tensors)
        apart[codec] = (len(payload), float(np.linalg.norm(back["w"] - tensors["w"])))
    (plain, far), (mixed, near) = apart.values()
    assert mixed <= plain
    assert near < far


def test_full_rank_leaves_only_rounding():
    tensors = fine_tune()
    _, back = round_trip(ere(24), tensors)
    assert np.linalg.norm(back["w"] - tensors["w"]) < 0.004 * np.linalg.norm(tensors["w"])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECTRAL),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["float64", "float32", "bfloat16", "float16"]),
)
def test_any_shape_and_dtype_come_back_as_they_were(codec, rows, columns, dtype):
    rng = np.random.Generator(np.random.Philox(1))
    tensors = {
        "w": rng.normal(size=(rows, columns)).astype(DTYPES[dtype]),
        "t": rng.normal(size=(2, 3, 4)).astype(np.float32),
    }
    _, back = round_trip(codec, tensors)
    assert {n: (a.shape, a.dtype) for n, a in back.items()} == {n: (a.shape, a.dtype) for n, a in tensors.items()}


def test_a_change_of_nothing_is_nothing():
    assert not round_trip(delta_come(4), {"w": np.zeros((5, 6), np.float32)})[1]["w"].any()


@pytest.mark.parametrize("groups", [(), ((0, 8),), ((2, 3),), ((2, 8), (-1, 4))])
def test_groups_that_make_no_sense_are_refused(groups):
    with pytest.raises(ConfigError, match="groups"):
        Spectral(groups=groups)


@pytest.mark.parametrize("bend", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b"", lambda p: b"\xff" * len(p)])
def test_bytes_that_are_no_payload_are_refused(bend):
    tensors = fine_tune()
    payload, _ = round_trip(delta_come(4), tensors)
    with pytest.raises(WireError):
        delta_come(4).decode(bend(payload), Manifest.of(tensors))


def test_values_that_are_not_finite_are_refused():
    tensors = {"w": np.full((3, 3), np.nan, np.float32)}
    with pytest.raises(WireError):
        list(ere(1).encode(tensors, Manifest.of(tensors)))


def test_decoding_is_addition_in_one_order_so_that_every_machine_has_the_same_bits():
    """Not a matrix product, which sums in an order of the library's own."""
    tensors = fine_tune(rows=37, columns=29)
    codec = delta_come(6)
    parts = {}
    payload, back = round_trip(codec, tensors)
    at = memoryview(payload)
    for coder, part in codec._parts(Manifest.of(tensors)):
        parts |= coder.decode(at[: coder.largest(part)], part)
        at = at[coder.largest(part) :]
    want = np.zeros((37, 29))
    for i in range(37):
        for j in range(29):
            for first in (0, 2):
                for a, b in zip(parts[f"w/A{first}"], parts[f"w/B{first}"], strict=True):
                    want[i, j] += float(b[i]) * float(a[j])
    assert back["w"].tobytes() == want.astype(np.float32).tobytes()
