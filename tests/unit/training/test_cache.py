import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from fedtune.errors import StorageError, UnavailableError
from fedtune.training import cache
from fedtune.training.cache import Package, build_once, fetch, installed_file


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_built_once_and_kept(folder):
    calls = []

    def build(target: Path) -> None:
        calls.append(target)
        (target / "thing").write_text("done")

    for _ in range(2):
        assert build_once("models/x", build) == folder / "models" / "x"
    assert len(calls) == 1
    assert (folder / "models" / "x" / "thing").read_text() == "done"


def test_a_failed_build_leaves_nothing(folder):
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise UnavailableError("no index")

    with pytest.raises(UnavailableError):
        build_once("models/x", fail)
    assert [path.name for path in (folder / "models").iterdir()] == ["x.lock"]


def _race(log: Path) -> None:
    def build(target: Path) -> None:
        with log.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        (target / "thing").write_text("done")

    assert (build_once("models/x", build) / "thing").read_text() == "done"


def test_processes_that_race_build_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    racers = [context.Process(target=_race, args=(tmp_path / "log",)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="FEDTUNE_CACHE"):
        build_once("models/x", lambda target: None)


def _fake_pip(monkeypatch, tmp_path, body: str) -> None:
    """Puts a script where the interpreter is: it is called as `python -m pip download ... --dest FOLDER ...`."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = --dest ] && dest=$2; shift; done\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setattr(cache.sys, "executable", str(script))


def test_fetch_takes_what_pip_brings(monkeypatch, tmp_path):
    _fake_pip(monkeypatch, tmp_path, 'printf content > "$dest/thing-1.tar.gz"')
    package = Package("thing", "1", hashlib.sha256(b"content").hexdigest(), source=True)
    assert fetch(package).read_bytes() == b"content"
    monkeypatch.setattr(cache.sys, "executable", os.devnull)
    assert fetch(package).read_bytes() == b"content"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("echo 'No module named pip' >&2; exit 1", "No module named pip"),
        ("exit 0", "nothing was downloaded"),
        ('printf other > "$dest/thing-1.tar.gz"', "SHA-256"),
    ],
)
def test_fetch_says_what_went_wrong(monkeypatch, tmp_path, folder, body, says):
    _fake_pip(monkeypatch, tmp_path, body)
    with pytest.raises(UnavailableError, match=says):
        fetch(Package("thing", "1", "0" * 64))
    assert not (folder / "packages" / "thing-1").exists()


def test_files_of_installed_packages_are_found_in_the_right_version_only():
    from importlib.metadata import version

    assert installed_file(Package("pytest", version("pytest"), ""), "pytest/__init__.py") is not None
    assert installed_file(Package("pytest", "0.0.1", ""), "pytest/__init__.py") is None
    assert installed_file(Package("no-such-package-here", "1", ""), ".py") is None
