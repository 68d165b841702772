"""A hub model is fetched without torch, and a hub that does not answer is said quickly and plainly."""

import subprocess
import sys

import huggingface_hub
import pytest
from fedtune_client.main import run
from huggingface_hub import constants

from fedtune import hub
from fedtune.base import open_base
from fedtune.config import parse
from fedtune.errors import ConfigError, ModelError, UnavailableError
from fedtune.hub import find_model, no_connection, offline
from fedtune.installed import need_training


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def dead_port(monkeypatch):
    """A hub at a port where nobody listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "PATIENCE_S", 1.0)


def test_a_hub_that_cannot_be_reached_is_unavailable_and_asked_once(dead_port, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked all the same"))
    with pytest.raises(UnavailableError, match=r"model\.name 'some/model'.*127\.0\.0\.1:9.*no connection.*built-in"):
        find_model("some/model")


def test_a_connection_that_breaks_while_fetching_is_unavailable_too(monkeypatch):
    def broken(*_, **__):
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError as error:
            raise RuntimeError("wrapped") from error

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(UnavailableError):
        find_model("some/model")


def test_what_the_hub_refuses_is_no_matter_of_the_connection(monkeypatch):
    def refused(*_, **__):
        raise OSError("404: there is no such repository")

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ModelError, match=r"404.*built-in model"):
        find_model("some/model")
    assert not no_connection(OSError("404"))


def test_without_what_fetches_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="pip install huggingface_hub"):
        find_model("some/model")


def test_offline_is_switched_back():
    with offline():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False


def test_a_built_in_model_that_was_not_made_says_what_makes_it():
    with pytest.raises(ModelError, match=r"pip install 'fedtune\[client\]'.*copy the folder"):
        find_model("tiny")


SERVE = """
import sys
for name in ("torch", "transformers", "peft"):
    sys.modules[name] = None  # as on a machine that does not have them
import huggingface_hub
from fedtune import hub
hub.hub_answers = lambda: True
huggingface_hub.snapshot_download = lambda *a, **k: sys.argv[1]
from pathlib import Path
from fedtune.config import parse
from fedtune_server.run import open_run
run = open_run(parse({"run": {"folder": sys.argv[2]}, "model": {"name": "some/model"}}))
sys.stdout.write(run.base.digest)
run.close()
"""


def test_a_coordinator_without_torch_fetches_its_model_itself(base_folder, tmp_path):
    command = [sys.executable, "-c", SERVE, str(base_folder), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == open_base(base_folder).digest


def test_a_client_without_torch_says_so_before_it_dials(tmp_path, monkeypatch, capsys):
    for name in ("torch", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="no torch and no peft"):
        need_training()
    config = parse({"client": {"id": "ann", "folder": str(tmp_path / "ann")}})
    assert run(config) == 2
    assert "ann: error: installation: expected torch, transformers, peft, got no torch" in capsys.readouterr().err
