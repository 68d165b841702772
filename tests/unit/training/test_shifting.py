"""Training the weights of a torch model itself: what comes back and what stays; FedAvg against `fedtune train`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune.base import open_base
from fedtune.cli.export import export
from fedtune.config import Shared, parse
from fedtune.config.members import member_config, member_ids
from fedtune.errors import ModelError, TrainingError
from fedtune.locate import locate_model
from fedtune.method import Member
from fedtune.methods.fedavg import save_change
from fedtune.simulation import simulate
from fedtune.training.centralised import train_centralised
from fedtune.training.evaluate import Evaluator
from fedtune.training.models import load_model
from fedtune.training.shifting import ShiftedBase, load_change, moved
from fedtune.training.worker import TorchWorker


def bits(model):
    return {name: weight.detach().numpy().tobytes() for name, weight in model.named_parameters()}


@pytest.fixture
def config(tiny_folder, tmp_path):
    rows = [{"q": f"say {word}", "a": word * 2} for word in ("one", "two", "three", "four", "five", "six") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse(
        {
            "model": {"name": str(tiny_folder)},
            "data": {"name": str(tmp_path / "rows.jsonl"), "prompt": "q", "response": "a", "held_out_rows": 6},
            "training": {"steps": 3, "batch_size": 2, "max_length": 64, "learning_rate": 1e-3},
            "method": {"name": "fedavg"},
            "simulation": {"clients": 1},
            "run": {"seed": 11, "folder": str(tmp_path / "run")},
        }
    )


def federate(config, rounds):
    base = open_base(locate_model(config.model.name))
    workers = {}

    def open_worker(member):
        index = member_ids(config).index(member.id)
        workers[member.id] = TorchWorker.open(member_config(config, index, "127.0.0.1:1"), Shared.of(config), index)
        return workers[member.id]

    members = [Member(name) for name in member_ids(config)]
    return simulate(config.method, base, members, open_worker, rounds, config.run.seed), workers


def test_one_client_and_one_round_are_training_in_one_place(config):
    result, _ = federate(config, 1)
    alone = train_centralised(config)
    for name, array in alone.factors.items():
        # The sum's fixed point ends at 2^-53; a float32 difference may go on.
        np.testing.assert_allclose(result.state[name], array, rtol=0, atol=2.0**-52)
    assert max(np.abs(array).max() for array in alone.factors.values()) > 1e-4


def test_one_step_of_gradient_descent_is_the_gradient(config):
    worker = federate(config, 1)[1]["client-00"]
    worker.reset()
    before = bits(worker.base.model)
    shapes = {n: np.zeros((0, *w.shape), np.float32) for n, w in worker.base.model.named_parameters()}
    worker.shifted.shift(shapes)
    with worker.shifted.moving() as weights:
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        loss = worker.base.model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in weights.items()}
        torch.optim.SGD(weights.values(), lr=0.5).step()
        by = moved(weights, start, shapes)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(by[name], -0.5 * gradient.numpy(), atol=1e-6)
    assert bits(worker.base.model) == before
    assert all(weight.grad is None and not weight.requires_grad for weight in worker.base.model.parameters())


def test_a_learning_rate_of_next_to_0_moves_nothing_and_every_bit_is_back(config):
    still = replace(config, training=replace(config.training, learning_rate=1e-30))
    worker = TorchWorker.open(member_config(still, 0, "127.0.0.1:1"), Shared.of(still), 0)
    before = bits(worker.base.model)
    job = worker.job(still.method, Member("client-00"), 1)
    job.shift(still.method.init(open_base(locate_model(still.model.name)), 0))
    assert bits(worker.base.model) == before
    with pytest.raises(TrainingError, match="changed"):
        job.train_weights()
    assert bits(worker.base.model) == before


def test_a_shift_is_base_plus_change_and_zeros_keep_every_bit(llama):
    base = ShiftedBase(llama)
    weight = llama.model.layers[0].mlp.up_proj.weight
    weight.data[0, :2] = torch.tensor([-0.0, 0.25])
    before = bits(llama)
    change = np.zeros(tuple(weight.shape), np.float32)
    change[0, 1] = 0.5
    base.shift({"model.layers.0.mlp.up_proj.weight": change})
    assert weight.data[0, 1] == 0.75
    assert torch.signbit(weight.data[0, 0])
    base.shift({"model.layers.0.mlp.up_proj.weight": change * 2})
    assert weight.data[0, 1] == 1.25
    base.reset()
    assert bits(llama) == before


def test_tied_weights_move_once_and_foreign_names_not_at_all(gpt2):
    base, before = ShiftedBase(gpt2), bits(gpt2)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    shape = tuple(gpt2.lm_head.weight.shape)
    names = {n: np.zeros((0, *shape), np.float32) for n in ("transformer.wte.weight", "lm_head.weight")}
    names["transformer.h.0.attn.bias"] = np.zeros((0, 1, 1, 4, 4), np.float32)
    base.shift(names)
    with base.moving() as weights:
        assert list(weights) == ["transformer.wte.weight"]
        start = {"transformer.wte.weight": weights["transformer.wte.weight"].detach().clone()}
        weights["transformer.wte.weight"].data += 1
        by = moved(weights, start, names)
    assert by["transformer.wte.weight"].min() > 0.9
    assert not by["lm_head.weight"].any()
    assert by["transformer.h.0.attn.bias"].shape == (1, 1, 4, 4)
    base.shift(by)
    assert gpt2.lm_head.weight.data.flatten()[0] != np.frombuffer(before["transformer.wte.weight"], np.float32)[0]
    base.reset()
    assert bits(gpt2) == before


def test_what_does_not_fit_is_refused_and_changes_nothing(llama):
    before = bits(llama)
    good = np.ones((64,), np.float32)
    for bad in ({"model.norm.weight": good, "lm_head.weight": good}, {"nothing.of.the.kind": good}):
        with pytest.raises(ModelError, match="change"):
            ShiftedBase(llama).shift(bad)
        assert bits(llama) == before


def test_narrow_weights_are_not_trained(llama):
    base = ShiftedBase(llama.bfloat16())
    base.shift({"model.norm.weight": np.zeros((0, 64), np.float32)})
    with pytest.raises(ModelError, match=r"model\.dtype"), base.moving():
        pass


def test_an_export_loads_by_itself_and_scores_as_the_change_does(config, tiny_folder, tmp_path):
    result, workers = federate(config, 2)
    (tmp_path / "final").mkdir()
    save_change(tmp_path / "final", result.state, str(tiny_folder))
    export(tmp_path / "final", tmp_path / "out", 0, False, None, "", "float32")
    model, _ = load_model(tiny_folder, "float32", torch.device("cpu"))
    ShiftedBase(model).shift(load_change(tmp_path / "final"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bits(whole) == bits(model)
    assert workers["client-00"].metrics["loss_last"] < 10
    evaluator = Evaluator.open(config)
    base, ours = evaluator.base(), evaluator.adapter(tmp_path / "final")
    assert ours["loss"] != base["loss"]
    assert evaluator.base() == base
    exported = Evaluator.open(replace(config, model=replace(config.model, name=str(tmp_path / "out"))))
    assert exported.base() == ours


def test_a_damaged_export_is_an_error(tmp_path):
    (tmp_path / "change.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="FedAvg"):
        load_change(tmp_path)
