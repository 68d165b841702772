"""A full disk: refused with a sentence, nothing lost, and the run goes on when there is room again."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from fedtune_server import blobs

from fedtune.errors import StorageError
from fedtune.wire.v1 import coordinator_pb2 as pb


def full(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def two(start, connect, tools, toy_folder):
    """A coordinator, the channel, and two clients' tasks and updates, submitted by hand."""
    served = start(rounds={"count": 1, "min_clients": 2})
    calls = connect(served.address)
    talks = {name: tools.conversation(calls, name) for name in "ab"}
    welcomes = {name: talk.enter(served.run.base.digest) for name, talk in talks.items()}
    tasks = {name: talk.hear().task for name, talk in talks.items()}
    payloads = {name: tools.honest(calls, toy_folder, name, welcomes[name], tasks[name]) for name in "ab"}
    served.talks = talks
    return served, calls, lambda name: tools.submit(calls, name, tasks[name], payloads[name])


def unavailable(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    return caught.value.details()


@pytest.mark.parametrize("seam", ["open", "write", "fsync", "rename"])
def test_full_disk_at_every_step_of_a_blob(two, monkeypatch, seam):
    served, calls, submit = two
    assert submit("a").status == pb.SUBMIT_STATUS_ACCEPTED
    with monkeypatch.context() as patch:
        if seam == "open":
            patch.setattr(blobs.Draft, "__init__", lambda self, folder: _refuse(folder))
        elif seam == "write":
            patch.setattr(blobs.Draft, "write", lambda self, data: _refuse(self.path))
        elif seam == "fsync":
            patch.setattr(blobs.os, "fsync", full)
        else:
            patch.setattr(Path, "replace", full)
        details = unavailable(lambda: submit("b"))
        assert "Free some space" in details
        assert str(served.config.run.folder) in details
        assert calls.status(pb.StatusRequest()).phase == "training"
        assert served.run.healthy is False
    assert submit("a").status == pb.SUBMIT_STATUS_ACCEPTED
    assert submit("b").status == pb.SUBMIT_STATUS_ACCEPTED
    served.join()
    report = json.loads((served.config.run.folder / "final" / "round.json").read_text())
    assert report["clients"] == ["a", "b"]


def test_full_disk_in_the_database(two):
    served, _, submit = two
    pages = served.run.store.call(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    served.run.store.call(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    filler = "INSERT INTO updates VALUES (99, ?, '', 0, 0, ?, '')"  # no room is left beside the row that will come
    for size in (400, 40, 1):
        for i in range(1000):
            try:
                served.run.store.call(lambda db, k=f"{size}-{i}", n=size: db.execute(filler, (k, "x" * n)) and None)
            except StorageError:
                break
    details = unavailable(lambda: submit("a"))
    assert "run.db" in details
    served.run.store.call(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
    assert submit("a").status == pb.SUBMIT_STATUS_ACCEPTED
    assert submit("b").status == pb.SUBMIT_STATUS_ACCEPTED
    served.join()


def test_round_that_cannot_be_written_closes_when_there_is_room(two, monkeypatch):
    served, calls, submit = two
    from fedtune_server import results

    with monkeypatch.context() as patch:
        patch.setattr(results, "fsync_folder", full)
        assert submit("a").status == pb.SUBMIT_STATUS_ACCEPTED
        assert submit("b").status == pb.SUBMIT_STATUS_ACCEPTED
        _until(lambda: not served.run.healthy)
        assert served.run.version.number == 0
        assert calls.status(pb.StatusRequest()).phase == "training"
    served.join()
    assert served.run.version.number == 1
    names = sorted(path.name for path in (served.config.run.folder / "rounds").iterdir())
    assert names == ["0001"]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if not done or done.returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk(small_disk, start, connect, tools, toy_folder):
    folder = small_disk / "run"
    served = start(run={"folder": str(folder)}, rounds={"count": 2, "min_clients": 2})
    calls = connect(served.address)
    talks = {name: tools.conversation(calls, name) for name in "ab"}
    welcomes = {name: talk.enter(served.run.base.digest) for name, talk in talks.items()}
    tasks = {name: talk.hear().task for name, talk in talks.items()}
    payloads = {name: tools.honest(calls, toy_folder, name, welcomes[name], tasks[name]) for name in "ab"}
    assert tools.submit(calls, "a", tasks["a"], payloads["a"]).status == pb.SUBMIT_STATUS_ACCEPTED
    filler = small_disk / "filler"
    fill(filler)
    details = unavailable(lambda: tools.submit(calls, "b", tasks["b"], payloads["b"]))
    assert "Free some space" in details
    assert calls.status(pb.StatusRequest()).phase == "training"
    filler.unlink()
    assert tools.submit(calls, "b", tasks["b"], payloads["b"]).status == pb.SUBMIT_STATUS_ACCEPTED
    assert talks["a"].hear().task.round == 2
    assert (folder / "rounds" / "0001" / "adapter_model.safetensors").stat().st_size > 0


def test_start_on_a_full_disk_exits_8(small_disk, spawn, tmp_path):
    folder = small_disk / "run"
    folder.mkdir()
    fill(small_disk / "filler")
    process = spawn(run={"folder": str(folder)})
    assert process.wait() == 8
    text = (tmp_path / "run.log").read_text()
    assert "Free some space" in text
    assert "Traceback" not in text


def test_folder_that_cannot_be_written_exits_8(spawn, tmp_path):
    (tmp_path / "file").write_text("x")
    process = spawn(run={"folder": str(tmp_path / "ok")})
    process.kill()
    from fedtune_server.main import main

    toml = tmp_path / "ok.toml"
    assert main([str(toml), "--set", f"run.folder={tmp_path / 'file' / 'run'}"]) == 8


def fill(path):
    """Writes until the disk has no room left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            continue
    assert shutil.disk_usage(path.parent).free == 0


def _refuse(folder):
    raise blobs.storage_error(Path(folder), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
