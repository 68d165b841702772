"""The log: durable, one answer per change, and a full disk is an error with a remedy."""

import asyncio
import sqlite3
import time
from concurrent.futures import wait

import pytest
from fedtune_server import records
from fedtune_server.records import RoundRow, TaskRow, UpdateRow, VersionRow
from fedtune_server.store import Store

from fedtune.errors import StorageError
from fedtune.method import Member

ROUND = RoundRow(1, 1, "open", 2, ("a", "b"), 5.0)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "run.db")
    yield store
    store.close()


def reopened(tmp_path, read):
    with sqlite3.connect(tmp_path / "run.db") as db:
        return read(db)


def test_what_was_answered_is_on_disk(store, tmp_path):
    task = TaskRow(1, 1, "t" * 32, Member("a", 4, 8.0))
    update = UpdateRow(1, "a", "d" * 64, 7, 100, {"loss": 0.5})
    store.call(records.write_round(ROUND, [task]))
    store.call(records.write_update(update, {(1, "a", "up", "payload"): 100}))
    assert reopened(tmp_path, records.read_round) == ROUND
    assert reopened(tmp_path, records.read_tasks(1)) == {"a": task}
    assert reopened(tmp_path, records.read_updates(1)) == {"a": update}
    assert reopened(tmp_path, records.read_ledger) == [(1, "a", "up", "payload", 100)]


def test_power_cut_safe_settings(store):
    def pragmas(db):
        return db.execute("PRAGMA journal_mode").fetchone()[0], db.execute("PRAGMA synchronous").fetchone()[0]

    assert store.call(pragmas) == ("wal", 2)


def test_many_waiting_changes_are_few_commits(store):
    commits = []
    store.call(lambda db: db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None))
    gate = store.submit(lambda db: time.sleep(0.2))
    futures = [store.submit(records.write_meta({f"k{i}": "v"})) for i in range(50)]
    wait([gate, *futures], 10)
    store.call(lambda db: db.set_trace_callback(None))
    assert len(store.call(records.read_meta)) == 50
    assert len(commits) <= 4


def test_a_change_that_fails_is_undone_alone(store):
    update = UpdateRow(1, "a", "d" * 64, 7, 100)
    good = records.write_meta({"k": "v"})
    futures = [store.submit(c) for c in (records.write_update(update, {}), records.write_update(update, {}), good)]
    wait(futures, 10)
    assert [future.exception() is None for future in futures] == [True, False, True]
    assert isinstance(futures[1].exception(), sqlite3.IntegrityError)


def test_full_disk_refuses_and_later_takes(store):
    pages = store.call(lambda db: db.execute("PRAGMA page_count").fetchone()[0])
    store.call(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    with pytest.raises(StorageError, match=r"run\.db.*full.*Free some space"):
        store.call(records.write_meta({"k": "v" * 100_000}))
    assert store.call(records.read_meta) == {}
    store.call(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchone())
    store.call(records.write_meta({"k": "v" * 100_000}))
    assert len(store.call(records.read_meta)["k"]) == 100_000


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "run.db").write_bytes(b"this is no database" * 1000)
    with pytest.raises(StorageError, match=r"run\.db.*damaged"):
        Store(tmp_path / "run.db")


def test_closing_a_round_is_all_or_nothing(store):
    store.call(records.write_round(ROUND, []))
    row = VersionRow(1, "d", {"x": ("blob", "leaf")})
    store.call(records.close_round(row, {(1, "a", "down", "control"): 3}, 9.0))
    with pytest.raises(sqlite3.IntegrityError):
        store.call(records.close_round(row, {(1, "a", "down", "control"): 3}, 9.0))
    assert store.call(records.read_round).phase == "closed"
    assert store.call(records.read_version) == row
    assert store.call(records.read_ledger) == [(1, "a", "down", "control", 3)]


def test_update_of_a_task_is_found_again(store):
    task = TaskRow(1, 1, "t" * 32, Member("a", 4, 8.0))
    store.call(records.write_round(ROUND, [task]))
    store.call(records.write_update(UpdateRow(1, "a", "d" * 64, 7, 100), {}))
    assert store.call(records.find_update("a", "t" * 32)) == "d" * 64
    assert store.call(records.find_update("b", "t" * 32)) is None
    assert store.call(records.find_update("a", "u" * 32)) is None


def test_caller_that_gives_up_harms_neither_its_change_nor_the_next(store):
    async def give_up():
        gate = store.submit(lambda db: time.sleep(0.1))
        waiting = asyncio.create_task(store.commit(records.write_meta({"a": "1"})))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.result()

    asyncio.run(give_up())
    dropped = [store.submit(lambda db: time.sleep(0.1)), store.submit(records.write_meta({"b": "1"}))]
    assert dropped[1].cancel()
    store.call(records.write_meta({"c": "1"}))
    assert store.call(records.read_meta) == {"a": "1", "c": "1"}
