"""Which layers carry an adapter of some depth: those of the last blocks, by their numbers, not by their names."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.depth import blocks, carried
from fedtune.errors import ProtocolError
from fedtune.lora import layers_of
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.rounds import admit


def factors(layers):
    return {f"{layer}/{side}": np.zeros((1, 1)) for layer in layers for side in "AB"}


@given(st.integers(1, 30), st.integers(1, 3), st.integers(0, 40), st.randoms())
def test_the_last_blocks_carry_it(count, each, depth, random):
    layers = [f"model.layers.{i}.mlp.{name}" for i in range(count) for name in "abc"[:each]]
    random.shuffle(layers)
    got = layers_of(carried(factors(layers), depth))
    least = 0 if depth == 0 else max(0, count - depth)
    assert got == [layer for layer in layers if int(layer.split(".")[2]) >= least]
    assert [len(block) for block in blocks(layers)] == [each] * count


def test_an_embedding_is_in_the_first_block_and_a_head_in_the_last():
    layers = ["lm_head", "model.embed_tokens", "model.layers.3.q", "model.layers.4.q"]
    assert blocks(layers) == [["model.embed_tokens", "model.layers.3.q"], ["lm_head", "model.layers.4.q"]]
    assert layers_of(carried(factors(layers), 1)) == ["lm_head", "model.layers.4.q"]


def test_blocks_are_in_the_order_of_their_numbers():
    assert blocks(["h.10.c_attn", "h.9.c_attn", "h.9.c_fc", "h.2.c_attn"]) == [
        ["h.2.c_attn"], ["h.9.c_attn", "h.9.c_fc"], ["h.10.c_attn"],
    ]  # fmt: skip


def test_an_output_head_goes_with_the_last_block():
    assert blocks(["lm_head", "layers.0.q", "layers.1.q"]) == [["layers.0.q"], ["lm_head", "layers.1.q"]]
    assert blocks(["lm_head"]) == [["lm_head"]]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_who_takes_a_depth_says_so_and_the_others_say_why(name):
    method = METHODS[name]()
    if method.takes_depth:
        assert admit(method, Member("a", depth=3)).depth == 3
    else:
        with pytest.raises(ProtocolError, match=r"depth of a: expected 0.*flora"):
            admit(method, Member("a", depth=3))
    assert admit(method, Member("a")).depth == 0
