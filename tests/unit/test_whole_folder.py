"""Folders that are written whole: what fails leaves nothing, what is empty is filled, what is full is refused."""

import os

import pytest
from safetensors import SafetensorError

from fedtune.errors import ConfigError, StorageError
from fedtune.whole_folder import whole_folder


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_when_all_of_it_is_written(tmp_path, there):
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
        target.chmod(0o710)
    before = os.umask(0o022)
    try:
        with whole_folder(target) as draft:
            (draft / "a").write_text("1")
            (draft / "b").mkdir()
            assert not (target / "a").exists()
    finally:
        os.umask(before)
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert target.stat().st_mode & 0o777 == (0o710 if there else 0o755)
    assert [*target.parent.iterdir()] == [target]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError(28, "No space left"), StorageError), (SafetensorError("I/O"), StorageError), (KeyError(), KeyError)],
)
def test_what_fails_leaves_nothing_and_can_be_tried_again(tmp_path, there, error, told):
    target = tmp_path / "out"
    if there:
        target.mkdir()

    def fail():
        with whole_folder(target) as draft:
            (draft / "a").write_text("1")
            raise error

    with pytest.raises(told):
        fail()
    assert [*tmp_path.rglob("*")] == ([target] if there else [])
    with whole_folder(target) as draft:
        (draft / "a").write_text("2")
    assert (target / "a").read_text() == "2"


def test_what_is_there_is_never_touched(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match="new or empty"), whole_folder(tmp_path / name):
            pytest.fail("a folder was opened")
    with pytest.raises(StorageError, match="can be written"), whole_folder(tmp_path / "file" / "out"):
        pytest.fail("a folder was opened")
