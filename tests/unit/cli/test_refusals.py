"""What simulate, train and evaluate refuse, before anything is started, fetched or overwritten."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from fedtune.cli.heldout import HeldOut
from fedtune.cli.prepare import prepare
from fedtune.config import load, parse
from fedtune.errors import ConfigError, DataError, ProtocolError
from fedtune.lora import save_peft
from fedtune.testing import toy_base
from fedtune.training import data as training_data


@pytest.fixture
def config(tmp_path):
    """A configuration whose model is not here, in `tmp_path`/run."""
    rows, file = tmp_path / "rows.jsonl", tmp_path / "config.toml"
    rows.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    file.write_text(
        f'[run]\nfolder = "{tmp_path}/run"\n[model]\nname = "/nowhere"\n[data]\nname = "{rows}"\ntext = "text"\n'
        "[simulation]\nclients = 2\n"
    )
    return file


@pytest.fixture
def no_model(monkeypatch):
    """Fails when the model is looked for."""

    def fetched(*_: object) -> None:
        raise AssertionError("the model was looked for first")

    monkeypatch.setattr("fedtune.training.models.resolve_model", fetched)


@pytest.mark.usefixtures("no_model")
def test_train_refuses_the_folder_of_a_federation_and_changes_nothing(fedtune, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.db").touch()
    ended = fedtune("train", config)
    assert ended.code == 2
    assert "--set run.folder=" in ended.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.db"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["simulate", "server", "doctor"])
def test_a_federation_refuses_the_folder_of_a_centralised_run(fedtune, config, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text('{"kind": "centralised"}')
    ended = fedtune(command, config)
    assert ended.code == (1 if command == "doctor" else 2)
    assert "--set run.folder=" in ended.err + ended.out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.json"]


@pytest.mark.usefixtures("no_model")
def test_simulate_refuses_to_go_on_with_other_clients(fedtune, config, tmp_path):
    from fedtune.cli.same_run import keep_same

    (tmp_path / "run").mkdir()
    keep_same(load(config))
    (tmp_path / "run" / "run.db").touch()
    ended = fedtune("simulate", config, "--set", "simulation.clients=3")
    assert ended.code == 2
    assert "simulation.clients: expected 2, got 3" in ended.err


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("key", ["rounds.clients", "rounds.min_clients"])
def test_rounds_that_wait_for_more_clients_than_there_are_are_refused(fedtune, config, key):
    ended = fedtune("simulate", config, "--set", f"{key}=8")
    assert ended.code == 2
    assert f"{key}: expected at most simulation.clients = 2, got 8" in ended.err


def test_doctor_tells_a_simulation_from_a_servers_configuration(fedtune, config):
    code = {}
    for name, sets in {"simulation": (), "server": ("--set", "simulation.clients=4")}.items():
        ended = fedtune("doctor", config, "--json", "--set", "rounds.clients=8", *sets)
        code[name] = {check["name"]: check["state"] for check in json.loads(ended.out)}["rounds"]
    assert code == {"simulation": "fail", "server": "warn"}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["simulate", "train", "evaluate"])
def test_missing_data_are_found_before_the_model_is_looked_for(fedtune, config, command):
    ended = fedtune(command, config, "--set", "data.name=/nowhere.jsonl")
    assert (ended.code, "/nowhere.jsonl" in ended.err) == (3, True)
    ended = fedtune(command, config, "--set", "data.held_out_name=/none.jsonl")
    assert (ended.code, "/none.jsonl" in ended.err) == (3, True)


@pytest.mark.usefixtures("no_model")
def test_ranks_come_before_data_and_data_before_the_model(config, monkeypatch):
    with pytest.raises(DataError, match="row 1"):
        prepare(load(config, ("data.text=nothing",)), range(2))
    with pytest.raises(ProtocolError, match="max_rank"):
        prepare(load(config, ("simulation.ranks=[999]", "data.text=nothing")), range(2))


def test_data_are_read_once_for_all_clients(config, monkeypatch):
    reads = []
    read = training_data.read
    monkeypatch.setattr(training_data, "read", lambda data: reads.append(data) or read(data))
    monkeypatch.setattr("fedtune.training.models.resolve_model", lambda *_: Path())
    assert prepare(load(config), range(2)) == [18, 18]
    assert len(reads) == 1


@pytest.mark.parametrize("command", ["simulate", "train"])
def test_a_run_folder_that_is_a_file_is_a_storage_error(fedtune, config, tmp_path, command):
    (tmp_path / "run").touch()
    ended = fedtune(command, config)
    assert ended.code == 8
    assert f"{tmp_path}/run" in ended.err
    assert "run.folder" in ended.err


@pytest.mark.parametrize("command", ["simulate", "train", "evaluate"])
def test_a_full_disk_is_a_storage_error(fedtune, config, monkeypatch, command):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")

    monkeypatch.setattr("fedtune.training.models.resolve_model", full)
    ended = fedtune(command, config)
    assert ended.code == 8
    assert "/somewhere/file" in ended.err
    assert "Free some space" in ended.err


def test_whatever_ends_the_measuring_is_kept(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("measuring")

    monkeypatch.setattr("fedtune.training.evaluate.Evaluator.open", fail)
    held_out = HeldOut(parse({"run": {"folder": str(tmp_path)}}), lambda *_: None)
    held_out.start()
    held_out.finish()
    assert isinstance(held_out.error, ZeroDivisionError)


def test_a_run_without_its_figures_does_not_end_well(fedtune, config, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "evaluations.json")

    monkeypatch.setattr("fedtune.training.evaluate.Evaluator.open", fail)
    monkeypatch.setattr("fedtune.cli.simulate._check", lambda *_: None)
    monkeypatch.setattr("fedtune.cli.supervise.Supervisor.run", lambda *_: None)
    ended = fedtune("simulate", config)
    assert ended.code == 8
    assert "evaluations.json" in ended.err


def test_a_counts_error_names_both_keys():
    from fedtune.cli.prepare import check_counts

    with pytest.raises(ConfigError, match=r"(?s)rounds\.clients.*rounds\.min_clients"):
        check_counts(parse({"rounds": {"clients": 5, "min_clients": 6}}))
    check_counts(parse({"rounds": {"clients": 4, "min_clients": 4}}))


@pytest.mark.parametrize(("layer", "inputs"), [("model.layers.0.self_attn.q_proj", 24), ("elsewhere.q_proj", 16)])
def test_an_adapter_of_another_model_is_refused_before_a_model_is_loaded(
    fedtune, config, tmp_path, monkeypatch, layer, inputs
):
    def opened(*_: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("fedtune.training.evaluate.Evaluator.open", opened)
    base = toy_base(tmp_path / "base")
    factors = {f"{layer}/A": np.ones((2, inputs), np.float32), f"{layer}/B": np.ones((16, 2), np.float32)}
    save_peft(tmp_path / "adapter", factors, rank=2, alpha=4, base_model="org/wide")
    ended = fedtune("evaluate", config, "--set", f"model.name={base}", "--adapter", tmp_path / "adapter")
    assert ended.code == 4
    said = " ".join(ended.err.split())
    assert f"expected an adapter of {base}, got one of org/wide: {layer} of 16 x {inputs}" in said


def test_an_adapter_of_this_model_is_measured_though_its_head_is_not_among_the_weights(
    fedtune, config, tmp_path, monkeypatch
):
    def opened(*_: object) -> None:
        raise DataError("measuring began")

    monkeypatch.setattr("fedtune.training.evaluate.Evaluator.open", opened)
    base, names = toy_base(tmp_path / "base"), ("model.layers.0.self_attn.q_proj", "lm_head")
    factors = {f"{n}/{side}": np.ones((2, 16) if side == "A" else (16, 2), np.float32) for n in names for side in "AB"}
    save_peft(tmp_path / "adapter", factors, rank=2, alpha=4)
    ended = fedtune("evaluate", config, "--set", f"model.name={base}", "--adapter", tmp_path / "adapter")
    assert "measuring began" in ended.err


@pytest.mark.parametrize("wrong", ["method.target_modules=['nope']", "simulation.ranks=[300]"])
def test_what_the_settings_and_the_base_say_comes_before_data(fedtune, config, tmp_path, monkeypatch, wrong):
    def read(*_: object) -> None:
        raise AssertionError("data were looked at first")

    monkeypatch.setattr("fedtune.training.data.check_files", read)
    base = toy_base(tmp_path / "base")
    ended = fedtune("simulate", config, "--set", f"model.name={base}", "--set", wrong)
    assert ended.code in (2, 6)
    assert "nope" in ended.err or "300" in ended.err
