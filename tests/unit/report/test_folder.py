"""A run folder belongs to one kind of run, and a disk that refuses is named."""

import errno
import json

import pytest

from fedtune.config import parse
from fedtune.errors import ConfigError, StorageError
from fedtune.report import write_report
from fedtune.report.evaluations import Evaluations
from fedtune.report.folder import refuse_centralised, refuse_federated, storage


def test_a_new_folder_is_anybodys(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        refuse_centralised(folder)
        refuse_federated(folder)


@pytest.mark.parametrize("name", ["run.db", "events.jsonl"])
def test_a_federation_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    refuse_centralised(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.folder .*--set run\.folder="):
        refuse_federated(tmp_path)


def test_a_centralised_result_is_refused(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"kind": "centralised"}))
    refuse_federated(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.folder .*--set run\.folder="):
        refuse_centralised(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "\xff", '{"kind": "federated"}'])
def test_another_report_is_no_reason(tmp_path, content):
    (tmp_path / "report.json").write_text(content, encoding="latin-1")
    refuse_centralised(tmp_path)


@pytest.mark.parametrize("refuse", [refuse_centralised, refuse_federated])
def test_a_folder_with_something_else_is_refused(tmp_path, refuse):
    for name in (".hidden", "lost+found"):
        (tmp_path / name).mkdir()
    refuse(tmp_path)
    for name in ("thesis.tex", "photos", "b", "c"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        ConfigError, match=r"expected a new or empty folder, or a run's, got one with b, c, photos, \.\.\."
    ):
        refuse(tmp_path)
    (tmp_path / "coordinator.log").touch()  # a run that has just begun
    refuse(tmp_path)


@pytest.mark.parametrize("refuse", [refuse_centralised, refuse_federated])
def test_a_file_is_no_folder(tmp_path, refuse):
    (tmp_path / "run").touch()
    with pytest.raises(StorageError, match=r"run: .*run\.folder"):
        refuse(tmp_path / "run")


def test_a_full_disk_is_named_with_a_remedy(tmp_path):
    with pytest.raises(StorageError, match=rf"{tmp_path}: .*No space left.* Free some space"), storage(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(StorageError, match=r"report\.json"):
        write_report(tmp_path, {})
    with pytest.raises(StorageError, match=r"evaluations\.json"):
        Evaluations.open(tmp_path / "nowhere", parse({})).put("base", {"loss": 1.0})
