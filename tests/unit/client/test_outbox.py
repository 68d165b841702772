"""An update on disk is whole or absent, and answers only the question it was made for."""

from dataclasses import replace

import numpy as np
import pytest
from fedtune_client.outbox import Key, Outbox

from fedtune.errors import StorageError

KEY = Key("run-1", 3, "a" * 64, "b" * 64, 4, 8.0)
TASK = "e" * 32
PAYLOAD = [b"abc", memoryview(b"defg")]
KEPT = {"residual/x": np.arange(3), "personal/y": np.ones((2, 0), np.float32)}


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path)


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "outbox").iterdir())


def test_an_update_survives_the_process(outbox, tmp_path):
    stored = outbox.store(KEY, TASK, PAYLOAD, 7, {"loss": 0.5}, {})
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
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})
    assert outbox.find(replace(KEY, **change)) is None


@pytest.mark.parametrize(
    "damage", [lambda f: f.write_bytes(b"abcdefX"), lambda f: f.write_bytes(b""), lambda f: f.unlink()]
)
def test_a_damaged_update_is_not_found(outbox, damage):
    damage(outbox.store(KEY, TASK, PAYLOAD, 7, {}, {}).file)
    assert outbox.find(KEY) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": {}}', '{"key": 1, "extra": 2}'])
def test_a_damaged_record_is_not_found(outbox, tmp_path, text):
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})
    (tmp_path / "outbox" / "000003.json").write_text(text)
    assert outbox.find(KEY) is None


def test_what_a_crash_left_half_written_is_swept_away(outbox, tmp_path):
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})
    for name in ("000004.bin", "000005.bin.tmp", "000005.json.tmp"):
        (tmp_path / "outbox" / name).write_bytes(b"x")
    assert Outbox(tmp_path).find(KEY)
    assert files(tmp_path) == ["000003.bin", "000003.json"]


def test_a_crash_while_writing_leaves_nothing_to_find(outbox, tmp_path):
    def torn():
        yield b"abc"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        outbox.store(KEY, TASK, torn(), 7, {}, {})
    assert outbox.find(KEY) is None
    assert Outbox(tmp_path).find(KEY) is None


def test_removed_updates_are_gone(outbox, tmp_path):
    outbox.remove(outbox.store(KEY, TASK, PAYLOAD, 7, {}, {}))
    assert files(tmp_path) == []


def test_earlier_rounds_and_other_runs_are_forgotten(outbox):
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})
    outbox.keep_only("run-1", 3)
    assert outbox.find(KEY)
    outbox.keep_only("run-1", 4)
    assert outbox.find(KEY) is None
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})
    outbox.keep_only("run-2", 1)
    assert outbox.find(KEY) is None


def test_a_full_disk_is_a_storage_error(outbox, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune_client.outbox.os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})


def test_an_empty_update_is_an_update(outbox):
    assert outbox.store(KEY, TASK, [], 1, {}, {}) == outbox.find(KEY)


def same(one, other):
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def test_memory_counts_from_the_moment_its_update_is_accepted(outbox, tmp_path):
    update = outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT)
    assert files(tmp_path) == ["000003.bin", "000003.json", "000003.memory"]
    assert outbox.memory("run-1") == {}
    outbox.accepted(update)
    assert files(tmp_path) == []
    assert same(Outbox(tmp_path).memory("run-1"), dict(sorted(KEPT.items())))


def test_memory_of_another_run_is_none(outbox):
    outbox.accepted(outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT))
    assert outbox.memory("run-2") == {}


def test_memory_of_an_update_that_is_not_taken_is_forgotten(outbox, tmp_path):
    outbox.accepted(outbox.store(KEY, TASK, PAYLOAD, 7, {}, {"x": np.ones(1)}))
    outbox.remove(outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT))
    assert files(tmp_path) == []
    assert same(outbox.memory("run-1"), {"x": np.ones(1)})


def test_memory_that_was_emptied_is_empty(outbox):
    outbox.accepted(outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT))
    outbox.accepted(outbox.store(replace(KEY, round=4), TASK, PAYLOAD, 7, {}, {}))
    assert outbox.memory("run-1") == {}


def test_a_crash_between_taking_over_and_forgetting_does_no_harm(outbox, tmp_path, monkeypatch):
    update = outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT)
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "remove", lambda self, update: None)
        outbox.accepted(update)
    again = Outbox(tmp_path)
    assert again.find(KEY) == update
    (unsettled,) = again.unsettled("run-1", 4)
    again.accepted(unsettled)
    assert files(tmp_path) == []
    assert len(again.memory("run-1")) == 2


def test_damaged_memory_makes_an_update_unusable(outbox):
    update = outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT)
    update.memory_file.write_bytes(b"x")
    assert outbox.find(KEY) is None


def test_only_earlier_updates_with_memory_are_unsettled(outbox):
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, {})
    assert outbox.unsettled("run-1", 9) == []
    update = outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT)
    assert outbox.unsettled("run-1", 4) == [update]
    assert outbox.unsettled("run-1", 3) == []
    assert outbox.unsettled("run-2", 4) == []


def test_a_new_run_begins_with_nothing_of_the_old_one(outbox, tmp_path):
    outbox.store(KEY, TASK, PAYLOAD, 7, {}, KEPT)
    outbox.keep_only("run-2", 1)
    assert files(tmp_path) == []
