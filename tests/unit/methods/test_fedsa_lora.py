"""FedSA-LoRA: A is everybody's, B is the client's."""

import numpy as np
from safetensors.numpy import save_file

from fedtune.lora import load_peft
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA, FedSALoRA
from fedtune.personal import KEPT, own_adapter
from fedtune.rounds import Round
from fedtune.tensors import Manifest, digest
from fedtune.testing import ToyWorker


def test_a_is_the_mean_and_b_stays(base, base_folder, family):
    method = FedSALoRA(rank=2)
    states, workers, _ = family.play(method, base, base_folder, [Member("a"), Member("b")], 2)
    assert all(array.size == 0 for name, array in states[2].items() if name.endswith("/B"))
    one, two = (worker.memory for worker in workers.values())
    assert set(one) == {KEPT + name for name in states[0] if name.endswith("/B")}
    assert all(np.any(one[name] != two[name]) for name in one)


def test_no_byte_of_b_travels_either_way(base):
    method = FedSALoRA(rank=2)
    state = method.init(base, 0)
    bytes_of_a = sum(array.nbytes for name, array in state.items() if name.endswith("/A"))
    template = method.template(state, method.admit(Member("a")))
    assert template.nbytes == Manifest.of(method.broadcast(state, -1)).nbytes == bytes_of_a
    assert all(name.endswith("/A") for name in template.names)


def test_the_first_b_is_zero_and_the_next_the_clients_last(base, base_folder):
    method = FedSALoRA(rank=2)
    member, worker = method.admit(Member("a")), ToyWorker(base_folder)
    state = method.init(base, 0)
    for number in (1, 2):
        job = worker.job(method, member, number)
        method.install(job, method.broadcast(state, number - 2))
        held = {n: a for n, a in worker.attached[1].items() if n.endswith("/B")}
        want = {n: worker.memory.get(KEPT + n, np.zeros_like(a)) for n, a in held.items()}
        assert digest(held) == digest(want)
        update = method.client_update(job, Round(method, state, number).task(member).update)
        state = method.finish(state, method.fold(None, update, member, 3), 3)


def test_it_is_fedavg_lora_with_b_personal(base, base_folder, family):
    members = [Member("a"), Member("b")]
    ours = family.play(FedSALoRA(rank=2), base, base_folder, members, 3)
    same = family.play(FedAvgLoRA(rank=2, personal=("lora_B",)), base, base_folder, members, 3)
    assert [digest(s) for s in ours[0]] == [digest(s) for s in same[0]]
    assert digest(ours[1]["b"].memory) == digest(same[1]["b"].memory)


def test_the_runs_adapter_is_a_beside_zeros_and_a_clients_has_its_b(base, base_folder, family, tmp_path):
    method = FedSALoRA(rank=2)
    states, workers, _ = family.play(method, base, base_folder, [Member("a"), Member("b")], 2)
    method.export(states[2], tmp_path / "run", "org/base")
    shared = load_peft(tmp_path / "run")
    assert all(np.array_equal(shared[n], 2 * states[2][n]) for n in shared if n.endswith("/A"))
    assert not any(shared[n].any() for n in shared if n.endswith("/B"))
    save_file(workers["b"].memory, tmp_path / "memory.safetensors")
    own_adapter(tmp_path / "run", tmp_path / "memory.safetensors", tmp_path / "own")
    mine = load_peft(tmp_path / "own")
    assert all(np.array_equal(mine[n], shared[n]) for n in mine if n.endswith("/A"))
    assert all(np.array_equal(mine[n], workers["b"].memory[KEPT + n]) for n in mine if n.endswith("/B"))
