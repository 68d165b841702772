"""Blobs: whole or not there, and never what their name does not say."""

import errno
import hashlib
import os

import pytest
from fedtune_server.blobs import Blobs

from fedtune.errors import StorageError


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


def test_put_and_load(blobs):
    digest = blobs.put([b"hello"])
    assert digest == hashlib.sha256(b"hello").hexdigest()
    assert bytes(blobs.load(digest)) == b"hello"
    assert bytes(blobs.load(blobs.put([b""]))) == b""


def test_draft_that_is_not_published_leaves_nothing(blobs):
    with blobs.draft() as draft:
        draft.write(b"half")
    assert list(blobs.folder.iterdir()) == []


def test_view_outlives_the_draft(blobs):
    with blobs.draft() as draft:
        draft.write(b"bytes")
        view = draft.view()
    assert bytes(view) == b"bytes"


@pytest.mark.parametrize("damage", [b"hellp", b"hell", b""])
def test_damaged_blob_is_named(blobs, damage):
    digest = blobs.put([b"hello"])
    (blobs.folder / digest).write_bytes(damage)
    with pytest.raises(StorageError, match=digest):
        blobs.load(digest)


def test_missing_blob_is_named(blobs):
    with pytest.raises(StorageError, match="0" * 64):
        blobs.load("0" * 64)


def test_blob_is_on_disk_before_it_has_its_name(blobs, monkeypatch):
    steps = []
    fsync, replace = os.fsync, type(blobs.folder).replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(type(blobs.folder), "replace", lambda a, b: (steps.append("rename"), replace(a, b))[1])
    blobs.put([b"x"])
    assert steps == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_what_to_do_and_leaves_nothing(blobs, monkeypatch, number):
    def full(_handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="Free some space"):
        blobs.put([b"x"])
    monkeypatch.undo()
    assert list(blobs.folder.iterdir()) == []
    assert bytes(blobs.load(blobs.put([b"x"]))) == b"x"


def test_sweep_keeps_what_is_named_and_what_is_being_written(blobs):
    keep, drop = blobs.put([b"a"]), blobs.put([b"b"])
    draft = blobs.draft()
    assert blobs.sweep([keep]) == 1
    assert {path.name for path in blobs.folder.iterdir()} == {keep, draft.path.name}
    assert blobs.sweep([keep], drafts=True) == 1
    assert not (blobs.folder / drop).exists()
    draft.close()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="blobs"):
        Blobs(tmp_path / "file" / "blobs")
