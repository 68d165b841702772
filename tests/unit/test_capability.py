"""Plans from what clients measured: bounded, monotone, and as long as was asked for, to within a block."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.capability import Capability, Cost, plan, planned
from fedtune.config import parse
from fedtune.errors import ConfigError, WireError
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.wire.convert import capability_from_proto, capability_to_proto

PARTS = st.floats(0, 100)
COSTS = st.builds(Cost, PARTS, PARTS, PARTS)
ABLE = st.builds(Capability, COSTS, COSTS, st.floats(0, 1e4))
DEEPEST, RANK, SECONDS = st.integers(1, 40), st.integers(1, 64), st.floats(0, 5000)


@given(ABLE, DEEPEST, RANK, SECONDS)
def test_a_plan_is_the_deepest_that_fits_and_then_the_highest_rank(able, deepest, rank, seconds):
    """The slow oracle tries them all."""
    fit = [(k, r) for k in range(1, deepest + 1) for r in range(1, rank + 1) if able.fits(k, r, seconds)]
    whole = [k for k, r in fit if r == rank]
    want = (max(whole), rank) if whole else (1, max((r for k, r in fit if k == 1), default=1))
    assert plan(able, deepest, rank, seconds) == want


@given(ABLE, DEEPEST, RANK, SECONDS, st.floats(1, 3), st.sampled_from(["seconds", "room", "faster", "smaller"]))
def test_who_can_do_more_is_given_no_less(able, deepest, rank, seconds, factor, what):
    more, longer = able, seconds
    if what == "seconds":
        longer = seconds * factor
    elif what == "room":
        more = Capability(able.seconds, able.memory, able.room * factor)
    elif what == "faster":
        s = able.seconds
        more = Capability(Cost(s.fixed / factor, s.block / factor, s.rank / factor), able.memory, able.room)
    else:
        m = able.memory
        more = Capability(able.seconds, Cost(m.fixed / factor, m.block / factor, m.rank / factor), able.room)
    assert plan(more, deepest, rank, longer) >= plan(able, deepest, rank, seconds)


@given(st.lists(ABLE, min_size=2, max_size=6), DEEPEST, RANK, SECONDS)
def test_predicted_times_agree_to_within_a_block_or_are_at_a_bound(clients, deepest, rank, seconds):
    for able in clients:
        depth, low = plan(able, deepest, rank, seconds)
        assert 1 <= depth <= deepest
        assert 1 <= low <= rank
        predicted, block = able.seconds.of(depth, low), able.seconds.of(depth + 1, low) - able.seconds.of(depth, low)
        memory_is_full = able.memory.of(depth, low) > able.room or able.memory.of(depth + 1, low) > able.room
        above = predicted > seconds * (1 + 1e-9)
        below = predicted + block < seconds * (1 - 1e-9)
        assert not above or (depth, low) == (1, 1)
        assert not below or depth == deepest or memory_is_full or low < rank


def test_a_plan_fills_in_what_the_client_has_not_set(base):
    method = FLoRA(rank=8, alpha=12.0)
    state = method.init(base, 0)
    slow = Capability(Cost(1.0, 4.0, 0.0), Cost(0.0, 0.0, 0.0), 1.0)
    tiny = Capability(Cost(0.0, 0.0, 1.0), Cost(0.0, 0.0, 0.0), 1.0)
    assert planned(method, state, Member("a"), slow, 6.0) == Member("a", 8, 12.0, 1)
    assert planned(method, state, Member("a"), slow, 9.0) == Member("a", 8, 12.0, 2)
    assert planned(method, state, Member("a"), tiny, 3.0) == Member("a", 3, 12.0, 1)
    assert planned(method, state, Member("a", 5, 2.0), tiny, 3.0) == Member("a", 5, 2.0, 1)
    assert planned(method, state, Member("a", depth=2), slow, 1.0) == Member("a", 8, 12.0, 2)


@pytest.mark.parametrize("method", ["fedavg-lora", "hetlora", "fedkseed"])
def test_planning_needs_a_method_that_takes_any_depth(method):
    with pytest.raises(ConfigError, match=r"rounds.plan_s: .*depth of client: expected 0.*flora"):
        parse({"method": {"name": method}, "rounds": {"plan_s": 5.0}})
    with pytest.raises(ConfigError, match="krum_byzantine"):
        parse({"method": {"krum_byzantine": 1}, "rounds": {"plan_s": 5.0, "min_clients": 5}})


@given(ABLE)
def test_the_wire_keeps_every_bit(able):
    assert capability_from_proto(capability_to_proto(able)) == able


@pytest.mark.parametrize("number", [-1.0, np.inf, np.nan])
@pytest.mark.parametrize("where", ["seconds", "memory", "room"])
def test_numbers_that_are_none_are_refused(where, number):
    message = capability_to_proto(Capability(Cost(1, 1, 1), Cost(1, 1, 1), 1.0))
    if where == "room":
        message.room = number
    else:
        getattr(message, where).rank = number
    with pytest.raises(WireError, match="capability: expected finite numbers"):
        capability_from_proto(message)
