"""The draw: repeatable, independent of order, fair."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fedtune.selection import asked, select

ids = st.lists(st.from_regex(r"[a-z]{1,4}", fullmatch=True), unique=True, max_size=12)


@given(ids, st.integers(0, 12), st.randoms())
def test_order_of_arrival_does_not_matter(clients, count, random):
    drawn = select(1, 2, 3, clients, count)
    random.shuffle(clients)
    assert select(1, 2, 3, clients, count) == drawn
    assert len(drawn) == min(count, len(clients))
    assert list(drawn) == sorted(set(drawn) & set(clients))


@given(ids, st.integers(1, 5))
def test_one_more_client_replaces_at_most_one(clients, count):
    before = set(select(0, 1, 1, clients, count))
    after = set(select(0, 1, 1, [*clients, "zzzzz"], count))
    assert len(before - after) <= 1


def test_seed_round_and_attempt_each_change_the_draw():
    clients = [f"c{i}" for i in range(50)]
    draws = {select(*key, clients, 5) for key in ((0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2))}
    assert len(draws) == 4


def test_every_client_is_drawn_about_equally_often():
    clients = [f"c{i}" for i in range(10)]
    counts = Counter(client for number in range(2000) for client in select(7, number, 1, clients, 3))
    assert all(500 < counts[client] < 700 for client in clients)  # 600 expected, sigma 20


def test_over_selection_rounds_up_and_not_by_float_noise():
    assert [asked(10, 1.3), asked(3, 1.1), asked(10, 1.0), asked(100, 1.1)] == [13, 4, 10, 110]
