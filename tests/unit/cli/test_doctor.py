"""`fedtune doctor` finds what is wrong, says how to mend it, and ends with 1 only when something must be mended."""

import json
import socket

import pytest

ROWS = [{"prompt": f"say {i}", "response": str(i), "who": f"p{i % 3}"} for i in range(40)]


@pytest.fixture
def config(tmp_path, base_folder):
    """A healthy configuration on the toy base, which `change` can make ill."""
    data, file = tmp_path / "rows.jsonl", tmp_path / "config.toml"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file.write_text(
        f"""
        [run]
        folder = "{tmp_path}/run"
        [model]
        name = "{base_folder}"
        [data]
        name = "{data}"
        prompt = "prompt"
        response = "response"
        [server]
        address = "127.0.0.1:0"
        """
    )
    return file


def look(fedtune, *arguments):
    ended = fedtune("doctor", *arguments, "--json")
    return ended.code, {check["name"]: check for check in json.loads(ended.out)}


def test_the_machine_alone(fedtune):
    code, checks = look(fedtune)
    assert code == 0
    assert checks["python"]["state"] == "ok"
    assert {"torch", "cores", "memory", "disk", "cache"} <= set(checks)


def test_a_healthy_configuration(fedtune, config):
    code, checks = look(fedtune, config)
    assert code == 0
    assert all(check["state"] == "ok" for check in checks.values() if check["name"] != "memory")
    assert checks["data"]["said"] == "36 training rows; by client: 9, 9, 9, 9"
    assert checks["layers and ranks"]["said"].startswith("4 clients")


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ("rounds.cout=3", "configuration", "did you mean count?"),
        ("model.name=/nowhere/at/all", "model", "/nowhere/at/all"),
        ("method.target_modules=['nothing']", "layers and ranks", "q_proj"),
        ("method.uplink={codec='ternary', budget_kb=0.01}", "layers and ranks", "method.uplink.budget_kb"),
        ("simulation.ranks=[1000]", "layers and ranks", "1 to 256"),
        ("data.name=/nowhere.jsonl", "data", "/nowhere.jsonl"),
        ("data.response=nothing", "data", "row 1"),
        ("simulation.clients=30", "data", ""),
        ("run.folder=/etc/passwd/run", "run.folder", "cannot be written"),
        ("server.address=nonsense", "configuration", "server.address"),
    ],
)
def test_what_is_wrong_is_found_and_a_remedy_given(fedtune, config, change, name, said):
    code, checks = look(fedtune, config, "--set", change)
    assert checks[name]["state"] == "fail"
    assert said in checks[name]["said"]
    assert checks[name]["mend"]
    assert code == 1


def test_a_taken_port_is_a_warning(fedtune, config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, checks = look(fedtune, config, "--set", f"server.address=127.0.0.1:{taken.getsockname()[1]}")
    assert checks["server.address"]["state"] == "warn"
    assert code == 0


def test_a_model_that_is_not_here_yet_is_a_warning(fedtune, config, monkeypatch, tmp_path):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "empty"))
    code, checks = look(fedtune, config, "--set", "model.name=tiny")
    assert checks["model"]["state"] == "warn"
    assert "--fetch" in checks["model"]["mend"]
    assert code == 0


def test_people_read_lines_with_the_mend_below(fedtune, config):
    ended = fedtune("doctor", config, "--set", "data.name=/nowhere.jsonl")
    assert "fail data" in ended.out
    assert "-> Mend [data]" in ended.out


def test_keys_without_effect_are_named(fedtune, config):
    code, checks = look(fedtune, config, "--set", "method.uplink={codec='int8', density=0.5}")
    assert code == 0
    assert checks["unused keys"]["said"] == "method.uplink.density: not used by codec int8"
