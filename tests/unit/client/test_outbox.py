"""An update on disk is whole or absent, and answers only the question it was made for."""

from dataclasses import replace

import pytest
from fedtune_client.outbox import Key, Outbox

from fedtune.errors import StorageError

KEY = Key("run-1", 3, "a" * 64, "b" * 64, 4, 8.0)
PAYLOAD = [b"abc", memoryview(b"defg")]


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path)


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "outbox").iterdir())


def test_an_update_survives_the_process(outbox, tmp_path):
    stored = outbox.store(KEY, PAYLOAD, 7, {"loss": 0.5})
    found = Outbox(tmp_path).find(KEY)
    assert found == stored
    assert (found.file.read_bytes(), found.nbytes, found.weight, found.metrics) == (b"abcdefg", 7, 7, {"loss": 0.5})


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "run-2"},
        {"state_digest": "c" * 64},
        {"template": "c" * 64},
        {"rank": 8},
        {"alpha": 1.0},
        {"round": 4},
    ],
)
def test_another_question_is_not_answered_with_it(outbox, change):
    outbox.store(KEY, PAYLOAD, 7, {})
    assert outbox.find(replace(KEY, **change)) is None


@pytest.mark.parametrize(
    "damage", [lambda f: f.write_bytes(b"abcdefX"), lambda f: f.write_bytes(b""), lambda f: f.unlink()]
)
def test_a_damaged_update_is_not_found(outbox, damage):
    damage(outbox.store(KEY, PAYLOAD, 7, {}).file)
    assert outbox.find(KEY) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": 1, "extra": 2}'])
def test_a_damaged_record_is_not_found(outbox, tmp_path, text):
    outbox.store(KEY, PAYLOAD, 7, {})
    (tmp_path / "outbox" / "000003.json").write_text(text)
    assert outbox.find(KEY) is None


def test_what_a_crash_left_half_written_is_swept_away(outbox, tmp_path):
    outbox.store(KEY, PAYLOAD, 7, {})
    for name in ("000004.bin", "000005.bin.tmp", "000005.json.tmp"):
        (tmp_path / "outbox" / name).write_bytes(b"x")
    assert Outbox(tmp_path).find(KEY)
    assert files(tmp_path) == ["000003.bin", "000003.json"]


def test_a_crash_while_writing_leaves_nothing_to_find(outbox, tmp_path):
    def torn():
        yield b"abc"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        outbox.store(KEY, torn(), 7, {})
    assert outbox.find(KEY) is None
    assert Outbox(tmp_path).find(KEY) is None


def test_removed_updates_are_gone(outbox, tmp_path):
    outbox.remove(outbox.store(KEY, PAYLOAD, 7, {}))
    assert files(tmp_path) == []


def test_earlier_rounds_and_other_runs_are_forgotten(outbox):
    outbox.store(KEY, PAYLOAD, 7, {})
    outbox.keep_only("run-1", 3)
    assert outbox.find(KEY)
    outbox.keep_only("run-1", 4)
    assert outbox.find(KEY) is None
    outbox.store(KEY, PAYLOAD, 7, {})
    outbox.keep_only("run-2", 1)
    assert outbox.find(KEY) is None


def test_a_full_disk_is_a_storage_error(outbox, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune_client.outbox.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        outbox.store(KEY, PAYLOAD, 7, {})


def test_an_empty_update_is_an_update(outbox):
    assert outbox.store(KEY, [], 1, {}) == outbox.find(KEY)
