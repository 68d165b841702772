"""Personal factors: never sent, always there again."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.errors import ConfigError, ModelError
from fedtune.lora import load_peft
from fedtune.method import Member
from fedtune.methods import FedAvgLoRA
from fedtune.personal import KEPT, is_personal, own_adapter
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import digest
from fedtune.testing import ToyWorker

LAYER = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "factors"),
    [
        ("lora_B", "B"),
        ("lora_A", "A"),
        ("q_proj", "AB"),
        ("layers.3.*", "AB"),
        ("layers.3.*.lora_A", "A"),
        ("model.layers.3.self_attn.q_proj", "AB"),
        ("q_proj.lora_B", "B"),
        ("*", "AB"),
        ("proj", ""),
        ("layers.1.*", ""),
        ("v_proj", ""),
        ("layers.3", ""),
    ],
)
def test_patterns(pattern, factors):
    assert "".join(side for side in "AB" if is_personal(f"{LAYER}/{side}", [pattern])) == factors


@pytest.mark.parametrize("patterns", [("k_proj",), ("*",), ("lora_A", "lora_B")])
def test_a_pattern_that_fits_nothing_or_all_is_refused(base, patterns):
    with pytest.raises(ConfigError, match=r"method\.personal"):
        FedAvgLoRA(rank=2, personal=patterns).init(base, 0)


@pytest.mark.parametrize("personal", [("layers.1.*",), ("lora_B",), ("q_proj.lora_A", "layers.0.*")])
def test_no_byte_of_it_is_on_the_wire(base, base_folder, personal):
    """Values that only a personal factor could have are looked for in all that is sent."""
    method = FedAvgLoRA(rank=2, personal=personal)
    state = method.init(base, 0)
    assert digest({n: a for n, a in state.items() if a.size}) == digest(
        {n: a for n, a in FedAvgLoRA(rank=2).init(base, 0).items() if not is_personal(n, personal)}
    )
    member, worker, replica = method.admit(Member("a")), ToyWorker(base_folder), Replica()
    for number in (1, 2, 3):
        current = Round(method, state, number)
        task = current.task(member, replica.version)
        payload = b"".join(work(method, task, worker.job(method, member, number), replica))
        shared = sum(a.nbytes for n, a in state.items() if not is_personal(n, personal))
        assert len(payload) == task.broadcast.nbytes == shared
        own = {n.removeprefix(KEPT): a for n, a in worker.memory.items()}
        assert set(own) == {n for n in state if is_personal(n, personal)}
        assert not any(array.tobytes() in payload for array in own.values())
        current.add(member, payload, 1)
        state = current.close()


def test_personal_factors_go_on_from_round_to_round_and_survive_a_reset(base, base_folder):
    method = FedAvgLoRA(rank=2, personal=("layers.1.*",))
    state = method.init(base, 0)
    member, worker = method.admit(Member("a")), ToyWorker(base_folder)
    name = "model.layers.1.self_attn.q_proj/A"
    job = worker.job(method, member, 1)
    method.install(job, method.broadcast(state, -1))
    first = worker.attached[1][name]
    assert first.shape == (2, 16)
    assert first.std() > 0
    method.client_update(job, method.template(state, member))
    kept = worker.memory[KEPT + name]
    assert np.any(kept != first)
    worker.reset()
    method.install(worker.job(method, member, 2), method.broadcast(state, -1))
    assert np.array_equal(worker.attached[1][name], kept)


def test_clients_draw_their_own(base, base_folder):
    method = FedAvgLoRA(rank=2, personal=("layers.1.*",))
    state, drawn = method.init(base, 0), []
    for name in ("a", "b"):
        worker = ToyWorker(base_folder)
        method.install(worker.job(method, method.admit(Member(name)), 1), method.broadcast(state, -1))
        drawn.append(worker.attached[1])
    same = {n for n in drawn[0] if np.array_equal(drawn[0][n], drawn[1][n])}
    assert same == {n for n in state if ".0." in n or n.endswith("/B")}


def test_a_clients_own_adapter_has_the_layers_that_are_only_its_own(base, base_folder, tmp_path):
    method = FedAvgLoRA(rank=2, alpha=3.0, personal=("layers.1.*",))
    state = method.init(base, 0)
    member, worker = method.admit(Member("a")), ToyWorker(base_folder)
    job = worker.job(method, member, 1)
    method.install(job, method.broadcast(state, -1))
    method.client_update(job, method.template(state, member))
    method.export(state, tmp_path / "run", "org/base")
    assert not any(".1." in name for name in load_peft(tmp_path / "run"))
    save_file({**worker.memory, "residual/x": np.zeros(3)}, tmp_path / "memory.safetensors")
    own_adapter(tmp_path / "run", tmp_path / "memory.safetensors", tmp_path / "own")
    mine = load_peft(tmp_path / "own")
    name = "model.layers.1.self_attn.q_proj"
    assert np.array_equal(mine[f"{name}/B"], worker.memory[f"{KEPT}{name}/B"])
    assert np.allclose(mine[f"{name}/A"], 1.5 * worker.memory[f"{KEPT}{name}/A"])
    assert set(mine) == set(state)


def test_an_own_adapter_without_own_factors_is_refused(base, tmp_path):
    method = FedAvgLoRA(rank=2)
    method.export(method.init(base, 0), tmp_path / "run", "")
    with pytest.raises(ModelError, match=r"expected personal factors, got none.*without --own"):
        own_adapter(tmp_path / "run", tmp_path / "memory.safetensors", tmp_path / "own")
    save_file({"residual/x": np.zeros(3)}, tmp_path / "memory.safetensors")
    with pytest.raises(ModelError, match="personal factors"):
        own_adapter(tmp_path / "run", tmp_path / "memory.safetensors", tmp_path / "own")
