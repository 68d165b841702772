"""numba's loops against numpy: each on a block, and whole payloads byte for byte."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtune.codecs.backend import LEAST, using, work
from fedtune.codecs.compiled import Compiled
from fedtune.codecs.plain import BLOCK, Plain
from fedtune.codecs.ternary import Ternary
from fedtune.tensors import Manifest

TINY = float(np.float32(1e-45))  # the smallest denormal
WHAT = [-0.0, 0.0, TINY, -TINY, 1e-40, 0.5, -0.5, 1.0, -1.0, 3.4e38]
BLOCKS = st.one_of(
    arrays(np.float32, st.integers(1, 200), elements=st.sampled_from(WHAT)),
    arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    arrays(np.float64, st.integers(1, 200), elements=st.sampled_from([*WHAT, 5e-324, 1e300])),
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def both(dtype):
    return Plain(dtype), Compiled(dtype)


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@quick
@given(BLOCKS, st.data())
def test_every_step_on_a_block_is_the_same(block, data):
    low, high = sorted(np.abs(data.draw(st.sampled_from(block.tolist()))) for _ in range(2))
    low, high = block.dtype.type(low), block.dtype.type(high)
    limit = max(high, np.nextafter(block.dtype.type(0), block.dtype.type(1)))
    found = []
    for how in both(block.dtype):
        above, inside = how.inside(block, low, high)
        positions, signs = np.empty(block.size + 1, np.int32), np.empty(block.size + 1, np.int8)
        count = how.keep(block, limit, 7, positions, signs)
        dense = np.empty(block.size, np.int8)
        how.signs(block, limit, dense)
        total = np.full(block.size + 3, 2, np.uint8)
        how.pack(dense, total)
        found.append((above, inside, positions[:count], signs[:count], dense, total))
    same(*found)
    above, inside, positions, signs, dense, _ = found[0]
    magnitudes = np.abs(block)
    assert above == np.count_nonzero(magnitudes > high)
    np.testing.assert_array_equal(inside, magnitudes[(magnitudes >= low) & (magnitudes <= high)])
    np.testing.assert_array_equal(positions - 7, np.flatnonzero(magnitudes >= limit))
    np.testing.assert_array_equal(signs, np.sign(block[positions - 7]))
    np.testing.assert_array_equal(dense, np.where(magnitudes >= limit, np.sign(block), 0))


@quick
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60), st.integers(0, 4))
def test_gaps_are_the_same_bytes_with_escapes_too(gaps, shift):
    for kind in (np.int32, np.int64):
        places = (np.cumsum(np.array(gaps, kind) + 1) - 1).astype(kind)
        same(*([how.quotients(places, -1, shift)] for how in both(np.dtype(np.float32))))


@quick
@given(BLOCKS, st.floats(0, 1), st.sampled_from(["vector", "tensor"]), st.sampled_from(["std", "least-squares"]))
def test_payloads_are_the_same_bytes(block, density, per, scale):
    block = np.clip(block, -1e30, 1e30)
    bag = {"x": block[: block.size // 3], "y": block[block.size // 3 :]}
    codec = Ternary(density=density, top=per, sigma=per, scale=scale)
    payloads = []
    for way in ("numpy", "numba"):
        with using(way):
            payloads.append(b"".join(codec.encode(bag, Manifest.of(bag))))
    assert payloads[0] == payloads[1]


@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.2, 0.29, 0.31, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_large_payloads_are_the_same_bytes(density, rounded):
    x = np.random.Generator(np.random.Philox(2)).standard_normal(3 * BLOCK + 17, np.float32)
    bag = {"x": np.round(x) if rounded else x}
    codec, payloads = Ternary(density=density), []
    for way in ("numpy", "numba"):
        with using(way):
            payloads.append(b"".join(codec.encode(bag, Manifest.of(bag))))
    assert payloads[0] == payloads[1]


def test_only_large_vectors_use_numba():
    assert isinstance(work(LEAST - 1), Plain)
    assert isinstance(work(LEAST), Compiled)
    with using("numpy"):
        assert isinstance(work(LEAST), Plain)


def test_numba_is_not_imported_for_a_small_one():
    code = (
        "import sys, numpy as np; from fedtune.codecs.ternary import Ternary; from fedtune.tensors import Manifest\n"
        "x = {'x': np.ones(1000, np.float32)}; b''.join(Ternary().encode(x, Manifest.of(x)))\n"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
