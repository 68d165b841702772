"""Frames: cut and put together again, and the first byte too many refused."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.wire import MAX_FRAME
from fedtune.wire.frames import Assembler, cut, sha256


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 17))
def test_cut_keeps_bytes_and_order_in_frames_of_one_size(buffers, size):
    frames = list(cut(buffers, size))
    assert b"".join(frames) == b"".join(buffers)
    assert all(len(frame) == size for frame in frames[:-1])
    assert all(1 <= len(frame) <= size for frame in frames)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8))
def test_assembler_passes_on_exactly_what_was_announced(frames):
    whole, out = b"".join(frames), bytearray()
    assembler = Assembler(len(whole), sha256(frames), out.extend)
    for frame in frames:
        assembler.add(frame)
    assembler.finish()
    assert bytes(out) == whole


def test_too_many_bytes_never_reach_the_sink():
    out = bytearray()
    assembler = Assembler(4, "0" * 64, out.extend)
    assembler.add(b"abc")
    with pytest.raises(WireError, match="exactly 4 bytes"):
        assembler.add(b"de")
    assert bytes(out) == b"abc"


@pytest.mark.parametrize("frame", [b"", bytes(MAX_FRAME + 1)])
def test_frame_of_a_wrong_size(frame):
    with pytest.raises(WireError, match="frame"):
        Assembler(2**30, "0" * 64, lambda _: None).add(frame)


def test_missing_bytes():
    with pytest.raises(WireError, match="exactly 1 bytes, got 0 bytes"):
        Assembler(1, "0" * 64, lambda _: None).finish()


def test_other_bytes():
    assembler = Assembler(3, hashlib.sha256(b"abc").hexdigest(), lambda _: None)
    assembler.add(b"abd")
    with pytest.raises(WireError, match="SHA-256"):
        assembler.finish()
