"""The plain loop that all runtimes are compared with."""

from dataclasses import replace

import pytest

from fedtune.errors import ModelError
from fedtune.method import Member
from fedtune.methods import METHODS, FLoRA
from fedtune.simulation import simulate
from fedtune.tensors import digest
from fedtune.testing import ToyWorker

MEMBERS = [Member("a"), Member("b"), Member("c")]
SMALL = {"fedkseed": {"seeds": 128, "steps": 4, "learning_rate": 1e-4, "eps": 1e-2}, "fedavg": {}}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_order_of_members_does_not_matter(name, base, base_folder):
    method = METHODS[name](**SMALL.get(name, {"rank": 2}))
    runs = [
        simulate(method, base, members, lambda m: ToyWorker(base_folder, 3, 5 + ord(m.id)), 3, 3)
        for members in (MEMBERS, MEMBERS[::-1])
    ]
    assert [r.digest for r in runs[0].rounds] == [r.digest for r in runs[1].rounds]
    assert len({r.digest for r in runs[0].rounds}) == 3


def test_every_round_is_reported(base, base_folder):
    told = []
    result = simulate(FLoRA(rank=2), base, MEMBERS, lambda m: ToyWorker(base_folder), 2, 0, told.append)
    assert tuple(told) == result.rounds
    assert [r.number for r in told] == [1, 2]
    assert told[1].digest == digest(told[1].state) == result.digest
    assert told[0].weight == 30
    assert sorted(told[0].metrics) == ["a", "b", "c"]
    update = 2 * 2 * ((16 + 16) + (16 + 8)) * 4
    assert told[0].bytes_up == 3 * update
    assert (told[0].bytes_down, told[1].bytes_down) == (0, 3 * 3 * update)


def test_a_worker_with_another_base_is_refused(base, base_folder):
    with pytest.raises(ModelError, match="base model of a"):
        simulate(FLoRA(rank=2), replace(base, digest="0"), MEMBERS, lambda m: ToyWorker(base_folder), 1, 0)


def test_no_rounds_leave_the_first_state(base, base_folder):
    result = simulate(FLoRA(rank=2), base, MEMBERS, lambda m: ToyWorker(base_folder), 0, 0)
    assert result.digest == digest(FLoRA(rank=2).init(base, 0))
