"""A compressed broadcast: replicas follow the coordinator bit for bit, and nothing that was left out is lost."""

import numpy as np
import pytest

from fedtune.codecs.compression import RESIDUAL, Compression
from fedtune.codecs.feedback import units
from fedtune.downlink import STEP, lacking, taken
from fedtune.errors import WireError
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA
from fedtune.rounds import Replica, Round, Task, work
from fedtune.tensors import PRIVATE, Manifest, digest
from fedtune.testing import ToyWorker

MEMBERS = [Member(name, 3, 6.0) for name in "abc"]
LINKS = [
    Compression(codec="bf16"),
    Compression(codec="int8", feedback=True),
    Compression(codec="ternary", density=0.1),
    Compression(codec="ternary", density=0.1, feedback=True),
    Compression(codec="ternary", budget_kb=0.6, feedback=True),
]


def play(method, base, base_folder, rounds=4, absent=lambda number, index: False):
    """Yields state, tasks of the round and what each client's replica reports."""
    state = method.init(base, 0)
    workers, replicas = [ToyWorker(base_folder) for _ in MEMBERS], [Replica() for _ in MEMBERS]
    for number in range(1, rounds + 1):
        current, tasks = Round(method, state, number), []
        for i, member in enumerate(MEMBERS):
            if not absent(number, i):
                tasks.append(current.task(member, replicas[i].version))
                job = workers[i].job(method, member, number)
                current.add(member, b"".join(work(method, tasks[-1], job, replicas[i])), 4 + i)
                assert replicas[i].digest == digest(state)
        yield state, tasks
        state = current.close()
    yield state, []


@pytest.mark.parametrize("link", LINKS, ids=repr)
@pytest.mark.parametrize("personal", [(), ("v_proj",), ("lora_B",)])
def test_replicas_follow_and_later_rounds_bring_the_step_alone(base, base_folder, link, personal):
    method = FedAvgLoRA(rank=3, downlink=link, uplink=Compression(codec="int4"), personal=personal)
    whole = Manifest.of(lacking(method.init(base, 0), -1)).nbytes
    for number, (_, tasks) in enumerate(play(method, base, base_folder), 1):
        for task in tasks:
            assert list(task.payload) == [STEP] if number > 1 else STEP not in task.payload
            assert number == 1 or task.broadcast.nbytes < 0.55 * whole


def test_who_missed_a_round_receives_the_whole_state(base, base_folder):
    method = FedAvgLoRA(rank=3, downlink="int8")
    seen = [tasks for _, tasks in play(method, base, base_folder, 4, lambda number, index: (number, index) == (2, 1))]
    assert [list(task.payload) == [STEP] for task in seen[2]] == [True, False, True]
    assert not any(name.startswith(PRIVATE) for task in seen[2] for name in task.payload)


def test_a_raw_downlink_changes_nothing(base, base_folder):
    plain = [digest(state) for state, _ in play(FedAvgLoRA(rank=3), base, base_folder)]
    assert plain == [digest(state) for state, _ in play(FedAvgLoRA(rank=3, downlink="raw"), base, base_folder)]


def test_what_the_steps_left_out_is_kept_exactly(base):
    """The state after T steps and what is left equal all that was wanted: sums of integers."""
    link = Compression(codec="ternary", density=0.2, feedback=True)
    method = FedAvgLoRA(rank=3, downlink=link)
    state = method.init(base, 0)
    name = next(iter(state))
    rng = np.random.Generator(np.random.Philox(5))
    wanted = sent = 0
    for _ in range(6):
        before = state
        after = {n: (a + rng.normal(0, 0.1, a.shape)).astype(np.float32) for n, a in lacking(state, -1).items()}
        state = taken(state, after, link)
        step = link.coder.decode(state[PRIVATE + STEP].data, Manifest.of(dict(sorted(after.items()))))
        wanted = wanted + units((after[name].astype(np.float64) - before[name]).astype(np.float32), name)
        sent = sent + units(step[name], name)
        left = state[PRIVATE + RESIDUAL + name]
        np.testing.assert_array_equal(sent + left, wanted)


def test_feedback_brings_the_state_nearer(base):
    """A step in the same direction every round: without feedback its small parts never arrive."""
    apart = {}
    for feedback in (False, True):
        link = Compression(codec="ternary", density=0.1, feedback=feedback)
        state = goal = FedAvgLoRA(rank=3).init(base, 0)
        rng = np.random.Generator(np.random.Philox(6))
        drift = {n: rng.normal(0, 0.01, a.shape).astype(np.float32) for n, a in state.items()}
        for _ in range(40):
            goal = {n: a + drift[n] for n, a in goal.items()}
            state = taken(state, {n: state[n] + drift[n] for n in goal}, link)
        apart[feedback] = sum(float(np.square(goal[n] - state[n]).sum()) for n in goal)
    assert apart[True] < 0.1 * apart[False]


def test_a_step_that_is_none_is_refused(base, base_folder):
    method = FedAvgLoRA(rank=3, downlink="int8")
    states = list(play(method, base, base_folder, 1))
    worker, replica, member = ToyWorker(base_folder), Replica(), MEMBERS[0]
    replica.install(method, Round(method, states[0][0], 1).task(member), worker.job(method, member, 1))
    task = Round(method, states[1][0], 2).task(member, 0)
    bad = {STEP: task.payload[STEP][:-1]}
    broken = Task(task.round, 0, 1, Manifest.of(bad), bad, task.update)
    with pytest.raises(WireError):
        replica.install(method, broken, worker.job(method, member, 2))
    assert replica.version == 0
