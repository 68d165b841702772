"""Huffman codes against the heap of the textbooks, streams against zlib, numba's words against numpy's."""

import heapq
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.codecs import huffman
from fedtune.codecs.compiled import Compiled
from fedtune.codecs.deflate import section
from fedtune.codecs.plain import Plain
from fedtune.codecs.reader import Reader

WAYS = {"numpy": Plain(np.dtype(np.float32)), "numba": Compiled(np.dtype(np.float32))}
counts = st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(lambda c: sum(map(bool, c)) > 1)


def geometric(seed, share, size):
    rng = np.random.Generator(np.random.Philox(seed))
    return np.minimum(rng.geometric(share, size) - 1, 255).astype(np.uint8)


def least_bits(counts):
    """Bits of Huffman's code: the sum of all joints."""
    heap, total = [count for count in counts if count], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joint = heapq.heappop(heap) + heapq.heappop(heap)
        total += joint
        heapq.heappush(heap, joint)
    return total


def by_zlib(data):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return deflater.compress(data.tobytes()) + deflater.flush()


@given(counts)
def test_codes_are_complete_and_the_shortest_there_are(counts):
    lengths = huffman.lengths_of(counts)
    assert [length > 0 for length in lengths] == [count > 0 for count in counts]
    assert sum(2.0**-length for length in lengths if length) == 1
    assert sum(count * length for count, length in zip(counts, lengths, strict=True)) == least_bits(counts)


def test_codes_that_would_be_too_long_are_shortened():
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    for most in (7, 15):
        lengths = huffman.lengths_of(counts, most)
        assert max(lengths) <= most
        assert sum(2.0**-length for length in lengths) == 1


def test_codes_are_those_of_the_example_in_rfc_1951():
    lengths = [3, 3, 3, 3, 3, 2, 4, 4]
    found = [f"{code:0{n}b}"[::-1] for code, n in zip(huffman.codes(lengths), lengths, strict=True)]
    assert found == ["010", "011", "100", "101", "110", "00", "1110", "1111"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=6), st.sampled_from(sorted(WAYS)))
def test_zlib_reads_what_is_written(parts, way):
    arrays = [np.frombuffer(part, np.uint8) for part in parts]
    payload, whole = section(arrays, WAYS[way]), b"".join(parts)
    reader = Reader(payload, len(payload))
    assert reader.inflate(len(whole), len(whole), "bytes") == whole
    reader.end()


CASES = {
    "geometric": [geometric(1, 0.2, 300_001)],
    "two tensors": [geometric(2, 0.02, 40_000), geometric(3, 0.4, 50_003)],
    "many small": [geometric(i, 0.01 + 0.002 * i, 700) for i in range(90)],
    "changing": [np.concatenate([geometric(i, 0.6 if i % 2 else 0.03, 1 << 15) for i in range(6)])],
    "noise": [np.random.Generator(np.random.Philox(4)).integers(0, 243, 100_003).astype(np.uint8)],
    "one value": [np.full(70_000, 7, np.uint8)],
    "skewed": [geometric(5, 0.9999, 200_002)],
    "ends": [np.array([255], np.uint8)],
}


@pytest.mark.parametrize("case", CASES)
def test_streams_are_as_short_as_zlibs_and_the_same_with_numba(case):
    parts = CASES[case]
    whole = np.concatenate(parts)
    payloads = [section(parts, way) for way in WAYS.values()]
    assert payloads[0] == payloads[1]
    stream = payloads[0][next(i for i, byte in enumerate(payloads[0]) if byte < 128) + 1 :]
    assert zlib.decompress(stream, -15) == whole.tobytes()
    assert len(stream) <= 1.001 * len(by_zlib(whole)) + 4


def test_codes_are_renewed_where_it_pays():
    changing, alike = CASES["changing"][0], np.sort(CASES["changing"][0])
    np.random.Generator(np.random.Philox(6)).shuffle(alike)
    assert len(section([changing], WAYS["numpy"])) < 0.9 * len(section([alike], WAYS["numpy"]))


def test_the_length_of_the_stream_is_right_at_every_size():
    for size in range(1, 140):
        data = geometric(size, 0.05, size)
        payload = section([data], WAYS["numpy"])
        reader = Reader(payload, len(payload))
        assert reader.inflate(size, size, "bytes") == data.tobytes()
        reader.end()
