"""Many forked clients on one machine, with a toy model."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from fedtune.base import open_base
from fedtune.config import Shared, load
from fedtune.config.members import member_ids
from fedtune.method import Member
from fedtune.simulation import simulate
from fedtune.testing import open_toy

PROGRAM = """
    import os, signal, sys, threading, time
    from pathlib import Path
    from fedtune.config import load
    from fedtune.errors import DataError
    from fedtune.testing import ToyWorker, open_toy
    from fedtune_client.hosting import host

    def open_worker(config, shared, index, on_step):
        worker = open_toy(config, shared, index, on_step)
        {setup}
        return worker

    sys.exit(host(load(Path(sys.argv[1])), sys.argv[2], open_worker))
"""
SLOW = "worker._delay = lambda: time.sleep(600)"
ROUNDS = {"count": 2, "min_clients": 4, "grace_s": 0.5}


@pytest.fixture
def hosted(spawn, tmp_path):
    """Starts a coordinator and a host; returns them with the TOML file."""
    started = []

    def begin(setup="pass", **overrides):
        served = spawn(**{"rounds": ROUNDS, "simulation": {"clients": 4, "ranks": [4, 1]}, **overrides})
        toml = tmp_path / "run.toml"
        inner = textwrap.indent(textwrap.dedent(setup).strip(), "    ")
        text = textwrap.dedent(PROGRAM).replace("    {setup}", inner)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", text, str(toml), served.address()],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
        return served, started[-1], toml

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def lines(said):
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def pids(host, count=4):
    """Reads the children's process ids as the host reports them."""
    found = {}
    while len(found) < count:
        line = host.stderr.readline()
        if line.startswith("{") and (event := json.loads(line))["event"] == "client_started":
            found[event["client"]] = event["pid"]
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def training(served, count=1):
    lines = [f.read_text() for f in served.folder.glob("clients/*/client.log")]
    return sum('"event": "task"' in text for text in lines) >= count


def test_all_clients_take_part_with_the_bits_of_the_simulation(hosted):
    served, host, toml = hosted()
    _, said = host.communicate(timeout=60)
    assert host.returncode == 0
    assert served.wait() == 0
    config = load(toml)
    ids, shared = member_ids(config), Shared.of(config)
    members = [Member(name, (4, 1)[i % 2]) for i, name in enumerate(ids)]
    base = open_base(Path(config.model.name))
    want = simulate(shared.method, base, members, lambda m: open_toy(config, shared, ids.index(m.id)), 2, shared.seed)
    got = json.loads((served.folder / "rounds/0002/round.json").read_text())
    assert got["digest"] == want.digest
    assert sorted(event["code"] for event in lines(said) if event["event"] == "client_exited") == [0, 0, 0, 0]
    assert not [event for event in lines(said) if event["event"].endswith("before_fork")]
    assert not list(served.folder.glob("clients/*/exit.json"))


def test_a_client_that_fails_is_reported_and_the_others_finish(hosted):
    setup = "if index == 2: raise DataError('data.name: expected rows, got none')"
    served, host, _ = hosted(setup, rounds={**ROUNDS, "min_clients": 3})
    _, said = host.communicate(timeout=60)
    assert host.returncode == 3
    assert served.wait() == 0
    assert "client-02: error: data.name: expected rows, got none" in said
    record = json.loads((served.folder / "clients/client-02/exit.json").read_text())
    assert (record["client"], record["code"]) == ("client-02", 3)
    assert sorted(e["code"] for e in lines(said) if e["event"] == "client_exited") == [0, 0, 0, 3]


def test_a_killed_client_is_reported_with_its_signal(hosted):
    setup = "if index == 1: os.kill(os.getpid(), signal.SIGKILL)"
    served, host, _ = hosted(setup, rounds={**ROUNDS, "min_clients": 3})
    host.communicate(timeout=60)
    assert host.returncode == 137
    assert json.loads((served.folder / "clients/client-01/exit.json").read_text())["code"] == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_clients(hosted, number):
    served, host, _ = hosted(SLOW)
    children = pids(host)
    wait_until(lambda: training(served))
    began = time.monotonic()
    host.send_signal(number)
    host.communicate(timeout=20)
    assert host.returncode == 0
    assert time.monotonic() - began < 8
    assert not any(alive(pid) for pid in children.values())


def test_no_client_outlives_a_killed_host(hosted):
    served, host, _ = hosted(SLOW)
    children = pids(host)
    wait_until(lambda: training(served))
    host.kill()
    wait_until(lambda: not any(alive(pid) for pid in children.values()))


def test_only_so_many_train_at_once(hosted, tmp_path):
    setup = f"""
        def train(folder={str(tmp_path)!r}, me=index):
            mark = Path(folder) / f"training-{{me}}"
            mark.touch()
            with open(Path(folder) / "seen", "a") as seen:
                seen.write(f"{{len(list(Path(folder).glob('training-*')))}}\\n")
            time.sleep(0.1)
            mark.unlink()
        worker._delay = train"""
    simulation = {"clients": 4, "concurrency": 2}
    served, host, _ = hosted(setup, simulation=simulation)
    host.communicate(timeout=60)
    assert (host.returncode, served.wait()) == (0, 0)
    seen = [int(count) for count in (tmp_path / "seen").read_text().split()]
    assert len(seen) == 8
    assert max(seen) == 2
