"""`fedtune export` finds the adapter that is meant and copies it; merging is tested with a model in tests/runtime."""

import json
import os

import pytest


@pytest.mark.parametrize(("options", "rank"), [((), 2), (("--round", "1"), 1), (("--round", "2"), 2)])
def test_the_round_that_is_meant_is_copied(fedtune, run_folder, tmp_path, options, rank):
    ended = fedtune("export", run_folder, tmp_path / "out", *options)
    assert ended.code == 0
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank


def test_final_comes_first_and_an_adapter_folder_is_itself(fedtune, run_folder, tmp_path):
    final = run_folder / "final"
    (run_folder / "rounds" / "0001").rename(final)
    assert fedtune("export", run_folder, tmp_path / "a").code == 0
    assert fedtune("export", final, tmp_path / "b").code == 0
    for name in "ab":
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] == 1


def test_the_base_can_be_named(fedtune, run_folder, tmp_path):
    fedtune("export", run_folder, tmp_path / "out", "--base", "org/model")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {"r": 2, "base_model_name_or_path": "org/model"}


def test_a_built_in_base_is_named_by_its_folder(fedtune, run_folder, tmp_path, monkeypatch):
    """PEFT and transformers know no built-in names. Where the model was never made, the card says what makes it."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    named = []
    for out in ("before", "after"):
        assert fedtune("export", run_folder, tmp_path / out).code == 0
        named.append(json.loads((tmp_path / out / "adapter_config.json").read_text())["base_model_name_or_path"])
        assert "resolve_model('tiny')" in (tmp_path / out / "README.md").read_text()
        (tmp_path / "cache" / "models" / "tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / "models" / "tiny" / "config.json").write_text("{}")
    assert named == ["tiny", str(tmp_path / "cache" / "models" / "tiny")]


def test_what_is_exported_can_be_read_as_the_umask_says(fedtune, run_folder, tmp_path):
    (run_folder / "rounds" / "0002" / "adapter_model.safetensors").chmod(0o600)
    before = os.umask(0o027)
    try:
        fedtune("export", run_folder, tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_round_that_was_not_closed(fedtune, run_folder, tmp_path):
    ended = fedtune("export", run_folder, tmp_path / "out", "--round", "7")
    assert ended.code == 4
    assert "closed: 1, 2" in ended.err


def test_nothing_to_export(fedtune, tmp_path):
    assert fedtune("export", tmp_path / "none", tmp_path / "out").code == 4


@pytest.mark.parametrize("client", ["runs/team/clients/ann", "nowhere"])
def test_nothing_personal_to_put_in(fedtune, run_folder, tmp_path, client):
    ended = fedtune("export", run_folder, tmp_path / "out", "--own", tmp_path / client)
    assert ended.code == 4
    assert "keeps nothing personal" in ended.err
    assert "without --own" in " ".join(ended.err.split())


def test_a_full_target_is_not_touched(fedtune, run_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert fedtune("export", run_folder, tmp_path / "out").code == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_unknown_dtype(fedtune, run_folder, tmp_path):
    assert fedtune("export", run_folder, tmp_path / "out", "--merge", "--dtype", "int3").code == 2
