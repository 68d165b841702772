"""The LoRA methods through PEFT's layers: grouped attention, MLP and Conv1D, on random models of both kinds."""

import pytest
import torch
from peft import PeftModel

from fedtune.base import open_base
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import digest
from fedtune.training.lora import injected
from fedtune.training.own import OwnWorker

LORA = sorted(METHODS.keys() - {"fedkseed", "fedavg"})
MIXED = {"flora", "flexlora", "florist", "hetlora"}
_IDS = torch.arange(40).reshape(2, 20)


def _step(model, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 250, (2, 12), generator=generator)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight -= 0.5 * weight.grad
                weight.grad = None
    return {"loss": loss.item()}


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tmp_path):
    model = request.getfixturevalue(request.param)
    model.save_pretrained(tmp_path / "base")
    return model


def _logits(model):
    with torch.no_grad():
        return model(input_ids=_IDS).logits


@pytest.mark.parametrize("name", LORA)
def test_what_is_exported_is_what_clients_hold(name, model, tmp_path):
    """Two rounds of all linear layers; then the exported adapter in PEFT beside a client that has installed the state.

    The client has the largest rank, so that a slice of the state is all of it.
    """
    method = METHODS[name](rank=4, target_modules=("all-linear",))
    base = open_base(tmp_path / "base")
    ranks = {"a": 4, "b": 2 if name in MIXED else 4}
    members = [method.admit(Member(n, rank)) for n, rank in ranks.items()]
    worker, before = OwnWorker(model, tmp_path / "base", 3, _step, seed=5), _logits(model)
    state = method.init(base, 5)
    for number in (1, 2):  # one model for all: each turn starts from the base
        current = Round(method, state, number)
        for member in members:
            worker.reset()
            payload = work(method, current.task(member), worker.job(method, member, number), Replica())
            current.add(member, b"".join(payload), 3)
        state = current.close()
    worker.reset()
    replica = Replica()
    replica.install(method, Round(method, state, 3).task(members[0]), worker.job(method, members[0], 3))
    assert replica.digest == digest(state)
    if name == "fedsa-lora":
        return  # no model is everybody's
    if worker.attached is None:
        held = _logits(model)
    else:
        with injected(model, *worker.attached):
            held = _logits(model)
    worker.reset()
    method.export(state, tmp_path / "out", "")
    loaded = _logits(PeftModel.from_pretrained(model, tmp_path / "out"))
    assert torch.allclose(loaded, held, atol=1e-4)
    assert not torch.allclose(loaded, before, atol=1e-3)
