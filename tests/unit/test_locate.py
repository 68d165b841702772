"""Models are found where they lie, and a missing one comes with a remedy."""

import pytest

from fedtune.errors import ModelError
from fedtune.locate import locate_model, model_folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_local_folder(home):
    assert locate_model(str(model(home / "mine"))) == home / "mine"


def test_cache_folder():
    folder = model(model_folder("org/name"))
    assert locate_model("org/name") == folder


@pytest.mark.parametrize(("ref", "revision"), [("main", ""), ("v2", "v2"), ("main", "abc")])
def test_hub_cache(home, ref, revision):
    repo = home / "hub" / "models--org--name"
    folder = model(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / ref).write_text("abc\n")
    assert locate_model("org/name", revision) == folder


@pytest.mark.parametrize(
    ("name", "revision"), [("org/name", ""), ("smollm", ""), ("../x", ""), ("org/name", "../../x")]
)
def test_missing_model_names_the_remedy(name, revision):
    with pytest.raises(ModelError, match="doctor --fetch"):
        locate_model(name, revision)


def test_folder_without_a_model(home):
    (home / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        locate_model(str(home / "empty"))
