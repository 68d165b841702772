"""Waits between tries."""

import random

import grpc
from fedtune_client.retry import Backoff, error_of
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import UnavailableError


@given(st.integers(0, 2**32), st.floats(0.1, 60), st.integers(1, 60))
def test_waits_grow_to_the_cap_and_no_further(seed, cap_s, tries):
    backoff = Backoff(cap_s, 0.1, random.Random(seed))
    waits = [backoff.next_s() for _ in range(tries)]
    assert all(0 <= wait <= min(cap_s, 0.1 * 2**n) for n, wait in enumerate(waits))


def test_waits_are_spread_over_the_whole_range():
    waits = [Backoff(5.0, 4.0, random.Random(seed)).next_s() for seed in range(200)]
    assert min(waits) < 0.5
    assert max(waits) > 3.5


def test_many_tries_do_not_overflow():
    backoff = Backoff(5.0, tries=10**6)
    assert backoff.next_s() <= 5.0


def test_reset_starts_anew():
    backoff = Backoff(5.0, tries=9)
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_an_error_without_a_status_is_worth_another_try():
    assert isinstance(error_of(grpc.RpcError("odd")), UnavailableError)
