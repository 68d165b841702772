"""The app folder, and the way from Flower's flat settings to a configuration. None of this needs Flower."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedtune.cli.main import app as cli
from fedtune.config import Config, load, parse
from fedtune.errors import ConfigError
from fedtune.flower.app import project, write_app
from fedtune.flower.packets import pack, unpack
from fedtune.flower.settings import read_config, read_identity
from fedtune.methods import METHODS

HERE = Path(__file__).resolve().parents[2] / "simulations" / "flower"


def flat(table, prefix=""):
    values = {}
    for key, value in table.items():
        values.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return values


def settings(folder):
    return flat(tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_app_holds_the_configuration_it_was_written_from(tmp_path, method):
    config = parse({"method": {"name": method}, "data": {"template": 'say "{prompt}"\n', "name": "a.jsonl"}})
    write_app(tmp_path / "App_1", config)
    assert read_config(settings(tmp_path / "App_1")) == config
    project = tomllib.loads((tmp_path / "App_1" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    assert project["name"] == "app-1"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_another_method_by_name_has_its_own_defaults(tmp_path, method):
    write_app(tmp_path / "a", Config())
    assert read_config({**settings(tmp_path / "a"), "method.name": method}).method == METHODS[method]()


def test_every_value_is_one_flower_can_carry(tmp_path):
    write_app(tmp_path / "a", Config())
    assert {type(value) for value in settings(tmp_path / "a").values()} <= {str, int, float, bool}


def test_the_committed_app_is_what_its_configuration_says(tmp_path):
    """Keys that fedtune has got since it was written may be missing: they have their defaults."""
    config = load(HERE / "config.toml")
    assert read_config(settings(HERE / "app")) == config
    write_app(tmp_path / "app", config)
    for file in (tmp_path / "app" / "fedtune_app").iterdir():
        assert (HERE / "app" / "fedtune_app" / file.name).read_text() == file.read_text()


def test_a_table_within_the_method(tmp_path):
    config = parse({"method": {"name": "fedavg-lora", "uplink": {"codec": "ternary", "density": 0.1}}})
    write_app(tmp_path / "a", config)
    found = settings(tmp_path / "a")
    assert found["method.uplink.codec"] == "ternary"
    assert read_config(found) == config
    assert read_config(found | {"method.uplink.codec": "int8"}).method.uplink.codec == "int8"
    assert read_config(found | {"method.name": "flora"}).method.rank == config.method.rank


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="a new or empty folder"):
        write_app(tmp_path, Config())


def test_the_command_writes_an_app(tmp_path):
    done = CliRunner().invoke(cli, ["flower", "new", str(tmp_path / "mine"), "--set", "rounds.count=5"])
    assert done.exit_code == 0, done.output
    assert settings(tmp_path / "mine")["run.name"] == "demo"
    assert settings(tmp_path / "mine")["rounds.count"] == 5
    done = CliRunner().invoke(cli, ["flower", "new", str(tmp_path / "none"), "--set", "rounds.cuont=5"])
    assert isinstance(done.exception, ConfigError)
    assert "did you mean count?" in str(done.exception)
    assert not (tmp_path / "none").exists()


def test_lists_as_text():
    for text in ("4, 8,16", "[4, 8, 16]"):
        assert read_config({"simulation.ranks": text}).simulation.ranks == (4, 8, 16)
    assert read_config({"method.target_modules": "q_proj, v_proj"}).method.target_modules == ("q_proj", "v_proj")
    assert read_config({"training.betas": "0.8, 0.9"}).training.betas == (0.8, 0.9)


def test_a_wrong_key_is_named():
    with pytest.raises(ConfigError, match=r"rounds\.cuont: unknown key; did you mean count\?"):
        read_config({"rounds.cuont": 3})
    with pytest.raises(ConfigError, match=r"section\.key"):
        read_config({"rounds": 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resident", "sometimes"),
        ("keep", "many"),
        ("keep", -1),
        ("keep", 1.5),
        ("idle_s", -1),
        ("idle_s", 0),
        ("idle_s", True),
        ("strange", 1),
    ],
)
def test_a_wrong_key_of_the_plug_in_is_named(key, value):
    with pytest.raises(ConfigError, match=rf"flower.*{key}|flower\.{key}"):
        read_config({f"flower.{key}": value})


def test_a_table_given_twice_is_refused():
    with pytest.raises(ConfigError, match=r"method\.uplink\.codec"):
        read_config({"method.name": "fedavg-lora", "method.uplink": "int8", "method.uplink.codec": "int8"})


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: text.strip() or "x")


@given(_TEXT.filter(lambda text: "{" not in text and "}" not in text), st.lists(_TEXT, min_size=1, max_size=3))
def test_any_text_survives_the_apps_file(text, modules):
    config = parse({"data": {"template": text + "{prompt}"}, "method": {"target_modules": modules}})
    found = tomllib.loads(project(config, Path("app"), "fedtune_app"))["tool"]["flwr"]["app"]["config"]
    flat = {f"{section}.{key}": value for section, keys in found.items() for key, value in keys.items()}
    read = read_config({key: value for key, value in flat.items() if not isinstance(value, dict)})
    assert read.data.template == text + "{prompt}"
    assert read.method.target_modules == tuple(modules)


def test_a_limit_of_the_coordinators_is_in_the_app(tmp_path):
    write_app(tmp_path / "a", parse({"server": {"max_update_mb": 7}}))
    assert read_config(settings(tmp_path / "a")).server.max_update_mb == 7


def test_a_node_by_its_partition():
    identity = read_identity({"simulation.ranks": "4, 8"}, {"partition-id": 1, "num-partitions": 12})
    assert (identity.config.client.id, identity.config.client.rank, identity.index) == ("client-01", 8, 1)
    assert identity.config.simulation.clients == 12


def test_a_node_by_its_name_and_own_rows():
    node = {"client.id": "clinic-a", "data.name": "/rows.jsonl", "client.rank": 8, "client.device": "cuda:1"}
    identity = read_identity({"data.name": "vader"}, node)
    client = identity.config.client
    assert (client.id, client.rank, client.device, identity.index) == ("clinic-a", 8, "cuda:1", None)
    assert identity.config.data.name == "/rows.jsonl"


def test_a_partition_with_a_device_of_its_own():
    identity = read_identity({}, {"partition-id": 0, "num-partitions": 2, "client.device": "cuda:1"})
    assert (identity.config.client.id, identity.config.client.device, identity.index) == ("client-00", "cuda:1", 0)


@pytest.mark.parametrize(
    ("run", "node", "words"),
    [
        ({}, {}, r"client\.id"),
        ({}, {"partition-id": 0, "rounds.count": 3}, "The rest belongs to the run"),
        ({"simulation.clients": 4}, {"partition-id": 0, "num-partitions": 2}, "num-partitions, which is 2"),
        ({}, {"partition-id": 5, "num-partitions": 2}, "client index"),
        ({}, {"client.id": "No Such"}, r"client\.id"),
        ({}, {"partition-id": 0}, "expected num-partitions beside partition-id, got none"),
        ({}, {"partition-id": "a", "num-partitions": 2}, "partition-id: expected a whole number"),
        ({}, {"partition-id": 0, "num-partitions": "x"}, "num-partitions: expected a whole number"),
    ],
)
def test_a_node_that_cannot_be(run, node, words):
    with pytest.raises(ConfigError, match=words):
        read_identity(run, node)


def test_packets():
    packet = unpack(pack([b"one", b""], [b"pay", memoryview(b"load")]))
    assert (packet.headers, bytes(packet.payload)) == ((b"one", b""), b"payload")


@pytest.mark.parametrize("cut", range(12 + 4 + 3 + 4))
def test_a_packet_that_is_cut_is_refused(cut):
    from fedtune.errors import WireError

    with pytest.raises(WireError):
        unpack(pack([b"one", b"two"])[:cut])
