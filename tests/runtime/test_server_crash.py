"""kill -9 of the coordinator: the run goes on where it was and ends in the same bits."""

import json
import random
import sqlite3
import time

import pytest

IDS = {"a": (1, 3), "b": (2, 7), "c": (4, 11)}


def finish(tools, spawn, toy_folder, folder, rounds, kills, **method):
    """Runs three clients against a coordinator that is killed `kills` times; returns the final report."""
    settings = {"run": {"folder": str(folder)}, "rounds": {"count": rounds, "min_clients": 3, "grace_s": 30.0}}
    settings |= {"method": method} if method else {}
    draw = random.Random(kills)
    process = [spawn(**settings)]

    def slow(_round):
        time.sleep(draw.uniform(0.0, 0.3) if kills else 0)

    clients = [
        tools.client(toy_folder, n, lambda: process[-1].address(), rank=r, examples=e, before_submit=slow).start()
        for n, (r, e) in IDS.items()
    ]
    for _ in range(kills):
        time.sleep(draw.uniform(0.1, 1.0))  # a start takes about 0.4 s: some kills strike there
        assert process[-1].process.poll() is None, "the run ended before it was struck"
        process[-1].kill()
        process.append(spawn(**settings))
    assert process[-1].wait(60) == 0
    for client in clients:
        client.join()
    assert {client.outcome for client in clients} == {1}
    return json.loads((folder / "final" / "round.json").read_text())


def check(tools, spawn, toy_folder, tmp_path, rounds, kills, **method):
    calm = finish(tools, spawn, toy_folder, tmp_path / "calm", rounds, 0, **method)
    struck = finish(tools, spawn, toy_folder, tmp_path / "struck", rounds, kills, **method)
    assert struck["digest"] == calm["digest"]
    assert struck["clients"] == ["a", "b", "c"]
    with sqlite3.connect(tmp_path / "struck" / "run.db") as db:
        counts = db.execute("SELECT round, COUNT(*) FROM updates GROUP BY round").fetchall()
    assert counts == [(number, 3) for number in range(1, rounds + 1)]
    for number in range(1, rounds + 1):
        calm, struck = (_report(tmp_path / name, number) for name in ("calm", "struck"))
        assert calm["digest"] == struck["digest"]
        assert calm["weights"] == struck["weights"] == {"a": 3, "b": 7, "c": 11}


def test_ten_kills_end_in_the_same_bits(tools, spawn, toy_folder, tmp_path):
    check(tools, spawn, toy_folder, tmp_path, rounds=20, kills=10)


def test_kills_leave_the_bits_of_recompression(tools, spawn, toy_folder, tmp_path):
    """QR and SVD once more, in another process, and momentum that only the coordinator has."""
    options = {"name": "flora", "rank": 4, "rank_budget": 6, "energy": 0.9, "server_optimizer.name": "momentum"}
    check(tools, spawn, toy_folder, tmp_path, rounds=8, kills=4, **options)


def test_update_acknowledged_before_a_kill_is_not_asked_for_again(tools, spawn, connect, toy_folder, tmp_path):
    settings = {"rounds": {"count": 1, "min_clients": 2, "grace_s": 30.0}}
    first = spawn(**settings)
    client = tools.client(toy_folder, "a", lambda: current[-1].address())
    current = [first]
    client.start()
    calls = connect(first.address())
    talk = tools.conversation(calls, "b")
    talk.enter(_base(toy_folder))
    talk.hear()
    _until(lambda: client.replies == [1])
    first.kill()
    current.append(spawn(**settings))
    other = tools.client(toy_folder, "b", lambda: current[-1].address()).start()
    assert current[-1].wait(30) == 0
    other.join()
    client.join()
    assert client.replies == [1]
    report = json.loads((tmp_path / "run" / "final" / "round.json").read_text())
    assert report["clients"] == ["a", "b"]


def test_restart_takes_the_same_port(spawn):
    first = spawn()
    address = first.address()
    first.kill()
    assert spawn().address() == address


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_state_is_named(spawn, tmp_path, damage):
    first = spawn(method={"name": "fedavg-lora"})
    first.address()
    first.kill()
    folder = tmp_path / "run"
    [blob] = [path for path in (folder / "blobs").iterdir() if path.suffix != ".part"]
    data = bytearray(blob.read_bytes())
    data[-3] ^= 1
    blob.write_bytes(bytes(data[:-8] if damage == "cut" else data))
    again = spawn(method={"name": "fedavg-lora"})
    assert again.wait(20) == 8
    assert blob.name in (tmp_path / "run.log").read_text()


def _report(folder, number):
    return json.loads((folder / "rounds" / f"{number:04d}" / "round.json").read_text())


def _base(folder):
    from fedtune.base import open_base

    return open_base(folder).digest


def _until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
