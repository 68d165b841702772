"""A training function of one's own as a worker."""

import pytest
import torch

from fedtune.base import open_base
from fedtune.errors import ProtocolError, TrainingError
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.simulation import simulate
from fedtune.training.models import load_model, resolve_model
from fedtune.training.own import OwnWorker


def step(model, seed):
    torch.manual_seed(seed)
    ids = torch.randint(0, 50, (2, 8))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight -= 0.5 * weight.grad
                weight.grad = None
    return {"loss": loss.item()}


def worker(train=step, examples=3):
    folder = resolve_model("tiny")
    model, _ = load_model(folder, "float32", "cpu")
    return OwnWorker(model, folder, examples, train, seed=5)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"fedkseed"}))
def test_it_runs_every_method_that_sends_adapters_and_leaves_the_model_as_it_was(method):
    base = open_base(resolve_model("tiny"), "tiny")
    made = METHODS[method](**({} if method == "fedavg" else {"rank": 2}))
    workers = {}

    def open_worker(member):
        return workers.setdefault(member.id, worker())

    first = simulate(made, base, [Member("a"), Member("b")], open_worker, 2, 5)
    for held in workers.values():
        held.reset()
        held.memory.clear()  # what personal methods keep outlives a reset
    again = simulate(made, base, [Member("a"), Member("b")], open_worker, 2, 5)
    assert first.digest == again.digest
    assert first.rounds[0].metrics["a"]["loss"] > 0
    assert not any(
        weight.requires_grad and "lora" in name for name, weight in workers["a"].base.model.named_parameters()
    )


def test_seed_methods_are_refused_with_the_reason():
    base = open_base(resolve_model("tiny"), "tiny")
    with pytest.raises(ProtocolError, match="adapters"):
        simulate(METHODS["fedkseed"](), base, [Member("a")], lambda member: worker(), 1, 5)


def test_what_it_costs_cannot_be_measured():
    with pytest.raises(ProtocolError, match=r"client\.measure: expected false.*State client\.depth"):
        worker().measure(METHODS["flora"](), Member("a"))


def test_a_function_that_trains_nothing_is_an_error():
    held = worker(lambda model, seed: {"loss": 1.0})
    method = METHODS["flora"](rank=2)
    base = open_base(resolve_model("tiny"), "tiny")
    with pytest.raises(TrainingError, match="changed"):
        simulate(method, base, [Member("a")], lambda member: held, 1, 5)
