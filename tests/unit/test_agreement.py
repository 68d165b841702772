"""Who counts of a round, against the rule written as a search."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedtune.agreement import folded, judged
from fedtune.kspace import Sum


def _total(models, values=None, byzantine=1):
    total = None
    for i, model in enumerate(models):
        update = {"seeds": np.zeros(1, np.int32), "scalars": np.full(1, values[i] if values else 1.0, np.float32)}
        mine = Sum.of(update, 2, 1, f"c{i:02}", 1, 0.0)
        total = folded(total, bytes([model]), f"c{i:02}" if byzantine else "", mine)
    return total


@given(st.lists(st.integers(0, 3), min_size=1, max_size=14), st.integers(1, 5))
def test_krum_looks_for_as_many_as_those_that_agree_allow(models, f):
    """Never an error; never fewer than f, those that disagree among them."""
    verdict = judged(_total(models), f)
    most = max(set(models), key=models.count)
    agree, apart = models.count(most), len(models) - models.count(most)
    possible = [g for g in range(f + 1) if agree >= 2 * g + 3 and g + apart >= f]
    if 2 * agree <= len(models) or not possible:
        assert verdict.used is None
        assert list(verdict.notes) == ["unchanged"]
        return
    assert verdict.model == bytes([most])
    assert len(verdict.used.members) == agree - max(possible)
    assert verdict.notes.get("krum_byzantine") == ([f"{max(possible)} of {f}"] if max(possible) < f else None)
    assert len(verdict.notes.get("disagreed", [])) == apart


@given(st.integers(1, 6), st.data())
def test_a_round_of_enough_clients_closes_while_a_majority_agrees(f, data):
    apart = data.draw(st.integers(0, f + 1))
    assert judged(_total([0] * (2 * f + 3 - apart) + [1] * apart), f).used is not None


def test_the_far_one_is_left_out_beside_one_that_disagrees():
    models, values = [0, 0, 0, 0, 0, 0, 0, 1], [1.0, 1.1, 0.9, -50.0, 1.0, 1.2, 1.0, 1.0]
    verdict = judged(_total(models, values), 2)
    assert "c03" not in verdict.used.members
    assert verdict.notes == {"disagreed": ["c07"], "left_out": verdict.notes["left_out"]}
    assert "c03" in verdict.notes["left_out"]


def test_without_hostile_clients_the_larger_weight_decides_and_all_of_it_counts():
    verdict = judged(_total([0, 0, 1, 1, 1], byzantine=0), 0)
    assert (verdict.model, verdict.used.weight) == (b"\1", 3)
    assert verdict.notes == {"disagreed": ["c00", "c01"]}
