import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedtune.base import open_base
from fedtune.config import Config, Shared, parse
from fedtune.config.members import member_config, member_ids
from fedtune.errors import DataError, ModelError, ProtocolError
from fedtune.history import joined, of_round
from fedtune.locate import locate_model
from fedtune.lora import LoraSpec, key_a, layers_of, load_peft
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.simulation import Result, simulate
from fedtune.tensors import digest
from fedtune.training.centralised import train_centralised
from fedtune.training.evaluate import Evaluator
from fedtune.training.worker import TorchWorker

SPEC = LoraSpec(("model.layers.0.self_attn.q_proj",), 4, 8)


@pytest.fixture
def config(tiny_folder, tmp_path) -> Config:
    rows = [{"q": f"say {word}", "a": word * 2} for word in ("one", "two", "three", "four", "five", "six") * 4]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse(
        {
            "model": {"name": str(tiny_folder)},
            "data": {"name": str(tmp_path / "rows.jsonl"), "prompt": "q", "response": "a"},
            "training": {"steps": 3, "batch_size": 2, "max_length": 64, "learning_rate": 1e-2},
            "method": {"rank": 4},
            "simulation": {"clients": 3, "ranks": [4, 2, 1]},
            "run": {"seed": 11},
        }
    )


def _federate(config: Config, rounds: int) -> Result:
    base = open_base(locate_model(config.model.name))
    members = []
    for index, name in enumerate(member_ids(config)):
        client = member_config(config, index, "127.0.0.1:1").client
        members.append(Member(name, client.rank, client.alpha))

    def open_worker(member: Member) -> TorchWorker:
        index = member_ids(config).index(member.id)
        return TorchWorker.open(member_config(config, index, "127.0.0.1:1"), Shared.of(config), index)

    return simulate(config.method, base, members, open_worker, rounds, config.run.seed)


def test_the_same_run_twice_gives_the_same_bits(config):
    assert _federate(config, 2).digest == _federate(config, 2).digest
    assert _federate(config, 2).digest != _federate(replace(config, run=replace(config.run, seed=12)), 2).digest


def test_a_federation_learns(config):
    config = replace(config, training=replace(config.training, steps=20))
    result = _federate(config, 3)
    evaluator = Evaluator.open(config)
    before = evaluator.base()
    after = evaluator.factors(joined(result.state))
    assert after["loss"] < before["loss"] - 0.5
    assert evaluator.base() == before


@pytest.mark.parametrize("method", ["flora", "fedavg-lora"])
def test_one_client_and_one_round_are_bit_equal_to_centralised_training(config, method, tmp_path):
    raw = {"name": method, "rank": 4, "target_modules": ["q_proj", "down_proj"], "dropout": 0.1}
    chosen = parse({"method": raw}).method
    config = replace(config, method=chosen, simulation=replace(config.simulation, clients=1))
    result = _federate(config, 1)
    trained = train_centralised(config)
    trained.save(config, tmp_path / "central")
    config.method.export(result.state, tmp_path / "federated", config.model.name)
    central, federated = (load_peft(tmp_path / name) for name in ("central", "federated"))
    assert digest(central) == digest(federated)
    assert np.abs(central[key_a("model.layers.0.mlp.down_proj")]).max() > 0


def test_one_client_for_several_rounds_is_merge_and_restart(config):
    """FLoRA with one client is ReLoRA's schedule: train, merge, begin anew; bit for bit."""
    config = replace(config, simulation=replace(config.simulation, clients=1, ranks=(4,)))
    result = _federate(config, 3)
    worker, method = TorchWorker.open(member_config(config, 0, "127.0.0.1:1"), Shared.of(config), 0), config.method
    member = method.admit(Member("client-00", 4))
    layers = tuple(layers_of(method.template(result.state, member).names))
    for number in (1, 2, 3):
        job = worker.job(method, member, number)
        factors = dict(job.train_fresh(LoraSpec(layers, 4, member.alpha)))
        factors |= {n: a * np.float32(2) for n, a in factors.items() if n.endswith("/A")}
        job.merge(factors)
        assert digest(of_round(result.state, number)) == digest(factors)


@pytest.mark.parametrize("options", [{"start": "warm"}, {"start": "warm", "rank_budget": 6, "energy": 0.9}])
def test_a_warm_start_learns_on_from_what_all_have_learnt(config, options):
    method = parse({"method": {"rank": 4, **options}}).method
    config = replace(config, method=method, training=replace(config.training, steps=8))
    result, evaluator = _federate(config, 5), Evaluator.open(config)
    losses = [evaluator.base()["loss"], *(evaluator.factors(joined(r.state))["loss"] for r in result.rounds)]
    assert losses[1] < losses[0] - 0.1
    assert losses[5] < losses[1] - 0.1
    assert _federate(config, 5).digest == result.digest


def test_a_worker_that_is_reset_can_start_again(config):
    worker = TorchWorker.open(config, Shared.of(config), 0)
    method, member = config.method, config.method.admit(Member("client-00"))
    spec = LoraSpec(("model.layers.0.self_attn.q_proj",), 4, 8)
    first = worker.job(method, member, 1).train_fresh(spec)
    worker.job(method, member, 1).merge(first)
    merged = worker.job(method, member, 1).train_fresh(spec)
    worker.reset()
    assert digest(worker.job(method, member, 1).train_fresh(spec)) == digest(first) != digest(merged)
    assert worker.metrics["steps"] == 3
    assert worker.examples == len(worker._bench.rows)


def test_training_what_is_not_attached(config):
    worker = TorchWorker.open(config, Shared.of(config))
    with pytest.raises(ProtocolError, match="attached"):
        worker.job(config.method, Member("client-00"), 1).train_attached()


def test_memory_is_kept_between_rounds(config):
    worker = TorchWorker.open(config, Shared.of(config))
    worker.job(config.method, Member("a"), 1).memory["error"] = np.ones(3)
    assert worker.job(config.method, Member("a"), 2).memory["error"].sum() == 3


def test_thread_counts_are_set(config):
    before = torch.get_num_threads()
    try:
        TorchWorker.open(replace(config, client=replace(config.client, threads=2)), Shared.of(config))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_device_that_is_not_there(config):
    with pytest.raises(ModelError, match=r"client\.device"):
        TorchWorker.open(replace(config, client=replace(config.client, device="teapot")), Shared.of(config))


def test_local_training_of_one_client(config):
    trained = train_centralised(config, index=1)
    assert trained.member.id == "client-01"
    result = _federate(config, 1)
    assert trained.metrics["loss"] == result.rounds[0].metrics["client-01"]["loss"]


def test_a_client_measures_its_own_model_on_rows_it_does_not_train_on(config):
    plain = _federate(config, 1)
    config = replace(config, data=replace(config.data, own_held_out=0.25))
    result = _federate(config, 2)
    for metrics in result.rounds[1].metrics.values():
        assert metrics["own_loss"] != metrics["own_loss_before"] > 0
    assert "own_loss" not in plain.rounds[0].metrics["client-00"]
    assert result.rounds[0].weight < plain.rounds[0].weight


def test_measuring_draws_nothing_and_changes_no_bit(config):
    config = replace(config, data=replace(config.data, own_held_out=0.25))
    worker = TorchWorker.open(config, Shared.of(config), 0)
    measured = worker.job(config.method, Member("a", 4, 8.0), 1).train_fresh(SPEC)
    worker._bench = replace(worker._bench, measure=None)
    assert digest(worker.job(config.method, Member("a", 4, 8.0), 1).train_fresh(SPEC)) == digest(measured)


def test_too_few_rows_to_hold_out_some_are_refused(config):
    config = replace(config, data=replace(config.data, own_held_out=0.01))
    with pytest.raises(DataError, match=r"data\.own_held_out"):
        TorchWorker.open(config, Shared.of(config), 0)


@pytest.mark.parametrize("name", ["ffa-lora", "rolora"])
def test_a_method_that_freezes_a_factor_trains_the_other_alone(config, name):
    method = METHODS[name](rank=4)
    worker = TorchWorker.open(config, Shared.of(config), 0)
    member, state = method.admit(Member("a")), method.init(open_base(locate_model(config.model.name)), 1)
    job = worker.job(method, member, 1)
    method.install(job, method.broadcast(state, -1))
    trained, fitted = {}, worker.fit
    worker.fit = lambda *given: trained.update(fitted(*given)) or trained
    update = method.client_update(job, method.template(state, member))
    assert all(n.endswith("/B") and np.any(update[n]) for n in update)
    assert all(np.array_equal(trained[n], state[n]) for n in trained if n.endswith("/A"))
    assert len(trained) == 2 * len(update)
