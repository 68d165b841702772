"""FLoRA's compressed downlink: the coordinator's stack is what its clients decode, to the last bit."""

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedtune.codecs import raw
from fedtune.errors import WireError
from fedtune.lora import key_a, key_b, layers_of
from fedtune.method import Member
from fedtune.methods import FLoRA
from fedtune.rounds import Replica, Round
from fedtune.tensors import PRIVATE, digest
from fedtune.testing import ToyWorker

MEMBERS = [Member("a", 2, 4.0), Member("b", 3, 6.0)]


def play(method, base, folder, rounds, late=()):
    """Plays rounds; returns states, each client's digests, and bytes sent to the first one."""
    state, states, sent = method.init(base, 0), [], []
    held = {m.id: (ToyWorker(folder, 3), Replica()) for m in MEMBERS}
    found = {m.id: [] for m in MEMBERS}
    for number in range(1, rounds + 1):
        current = Round(method, state, number)
        for member in MEMBERS:
            if (member.id, number) in late:
                continue
            worker, replica = held[member.id]
            task = current.task(member, replica.version)
            job = worker.job(method, member, number)
            replica.install(method, task, job)
            found[member.id].append((number - 1, replica.digest))
            update = method.client_update(job, task.update)
            current.add(member, b"".join(method.encode(update, task.update)), 10)
            sent.append(b"".join(raw.encode(task.payload, task.broadcast)))
        state = current.close()
        states.append(state)
    return states, found, sent


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "ternary"])
def test_every_client_holds_the_coordinators_bits_also_one_that_was_away(base, base_folder, codec):
    method = FLoRA(downlink=codec)
    states, found, _ = play(method, base, base_folder, 4, late={("b", 2), ("b", 3)})
    versions = [digest(method.init(base, 0)), *map(digest, states)]
    for turns in found.values():
        assert [d for _, d in turns] == [versions[version] for version, _ in turns]
    assert [version for version, _ in found["b"]] == [0, 3]


def test_int8_sends_a_quarter_and_loses_little(base, base_folder):
    plain, small = (play(FLoRA(downlink=codec), base, base_folder, 2) for codec in ("raw", "int8"))
    assert len(small[2][-1]) < 0.3 * len(plain[2][-1])
    one, other = plain[0][0], small[0][0]
    for layer in layers_of([name for name in one if name.startswith("000001")]):
        want = one[key_b(layer)] @ one[key_a(layer)]
        got = other[key_b(layer)] @ other[key_a(layer)]
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_bytes_are_kept_apart_and_are_no_part_of_the_digest(base, base_folder):
    states, _, _ = play(FLoRA(downlink="int8"), base, base_folder, 3)
    codes = [name for name in states[-1] if name.startswith(PRIVATE)]
    assert len(codes) == 3
    assert digest(states[-1]) == digest({n: a for n, a in states[-1].items() if n not in codes})


def test_bytes_that_do_not_fit_are_refused(base, base_folder):
    method = FLoRA(downlink="int8")
    states, _, _ = play(method, base, base_folder, 1)
    received = dict(method.broadcast(states[-1], 0))
    received["000001/code"] = received["000001/code"][:-1]
    with pytest.raises(WireError):
        method.unpacked(ToyWorker(base_folder, 3).job(method, MEMBERS[0], 1), received)


@pytest.mark.parametrize(
    "more", [{"start": "warm"}, {"rank_budget": 64}, {"downlink": {"codec": "int8", "feedback": True}}]
)
def test_what_would_be_rounded_anew_each_round_is_refused(more):
    with pytest.raises(ValidationError, match="downlink"):
        TypeAdapter(FLoRA).validate_python({"downlink": "int8", **more})
