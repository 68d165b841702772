"""The resident worker: started when needed, kept, alone, private, and gone in time."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedtune.flower import visit

OPENER = """
import os, signal, time
from pathlib import Path
from fedtune.testing import ToyWorker

def open_worker(config, shared, index, on_step):
    with (Path(config.model.name).parent / "opened").open("a") as stream:
        stream.write(f"{os.getpid()}\\n")

    def delay():
        if config.data.label == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.data.label == "raise":
            raise ValueError("told to fail")
        for step in range(100 if config.data.label == "slow" else 0):
            on_step(step, 100, 1.0)
            time.sleep(0.05)

    return ToyWorker(Path(config.model.name), seed=shared.seed, delay=delay)
"""


@pytest.fixture
def world(tmp_path, sockets, monkeypatch):
    """A socket folder, a model, and packets for one node."""
    from fedtune.base import open_base
    from fedtune.config import Shared, parse
    from fedtune.method import Member
    from fedtune.rounds import Round
    from fedtune.tensors import digest
    from fedtune.testing import toy_base

    orders = pytest.importorskip("fedtune.flower.orders", reason="flwr is not installed: pip install 'fedtune[flower]'")
    monkeypatch.setenv("FEDTUNE_SOCKETS", str(sockets))
    (tmp_path / "opener_of_tests.py").write_text(OPENER)
    model = toy_base(tmp_path / "model")
    shared, base = Shared.of(parse({"model": {"name": str(model)}})), open_base(model)
    greeting = orders.welcome(shared, base.digest, "1")
    state = shared.method.init(base, 0)
    member = shared.method.admit(Member("client-00"))
    tasks = orders.Orders(Round(shared.method, state, 1), digest(state), greeting, [member])
    return World(tmp_path, orders.hello(greeting), tasks.order(member, -1, 0))


class World:
    def __init__(self, folder, hello, order):
        self.folder, self.hello, self.order = folder, hello, order
        self.name = visit.worker_name(str(folder))

    def ask(self, array=None, **config):
        array = array or self.order.array
        answer, (body, _) = visit.ask(self.name, self.header(array.stype, **config), array.data, b"")
        return answer, body

    def header(self, stype, **config):
        run_config = {"model.name": str(self.folder / "model"), **{k.replace("__", "."): v for k, v in config.items()}}
        opener = [str(self.folder), "opener_of_tests", "open_worker"]
        turn = dict(self.order.turn)
        node = {"partition-id": 0, "num-partitions": 1}
        return {"stype": stype, "turn": turn, "run_config": run_config, "node_config": node, "opener": opener}

    def workers(self):
        return [pid for pid in map(int, (self.folder / "opened").read_text().split()) if alive(pid)]

    def bye(self):
        visit.dismiss(self.name, self.header(visit.BYE))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, within_s=10.0):
    until = time.monotonic() + within_s
    while any(map(alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_one_worker_serves_all_and_ends_when_told(world):
    replies = [world.ask(world.hello), world.ask(), world.ask()]
    assert [answer["stype"] for answer, _ in replies] == ["fedtune.hello.v1", "fedtune.update.v1", "fedtune.update.v1"]
    assert replies[1][1] == replies[2][1]
    workers = world.workers()
    assert len(workers) == 1
    world.bye()
    gone(workers)
    assert [path.suffix for path in visit.folder().iterdir()] == [".lock"]


def test_it_is_started_once_when_many_ask_at_once(world):
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: world.ask(), range(4)))
    assert len({body for _, body in replies}) == 1
    assert len((world.folder / "opened").read_text().split()) == 1
    world.bye()


def test_the_folder_is_private(world):
    world.ask(world.hello)
    assert visit.folder().stat().st_mode & 0o777 == 0o700
    world.bye()


def test_a_folder_open_to_others_is_refused(world):
    visit.folder().chmod(0o755)
    with pytest.raises(visit.WorkerError, match="only you may enter"):
        world.ask()


def test_it_ends_when_nobody_asks(world):
    world.ask(flower__idle_s=0.6)
    gone(world.workers())


def test_an_error_is_told_and_the_worker_lives_on(world):
    with pytest.raises(visit.WorkerError, match="ValueError: told to fail"):
        world.ask(data__label="raise")
    assert len(world.workers()) == 1
    world.bye()


def test_a_wrong_configuration_is_told_in_words(world):
    with pytest.raises(visit.WorkerError, match=r"(?s)ConfigError.*rounds\.cuont: unknown key; did you mean count\?"):
        visit.ask(world.name, world.header("x", rounds__cuont=3) | {}, b"", b"")
    world.bye()


def test_a_worker_that_dies_at_work_is_reported_and_replaced(world):
    with pytest.raises(visit.WorkerError, match="died during the task"):
        world.ask(data__label="kill")
    assert world.ask()[0]["stype"] == "fedtune.update.v1"
    world.bye()


def test_training_ends_when_who_asked_is_gone(world):
    code = f"""
import json, sys
sys.path.insert(0, {str(world.folder)!r})
from fedtune.flower import visit
visit.ask({world.name!r}, json.loads({__import__("json").dumps(world.header("fedtune.task.v1", data__label="slow"))!r}),
          open({str(world.folder / "packet")!r}, "rb").read(), b"")
"""
    (world.folder / "packet").write_bytes(world.order.array.data)
    # The worker watches the parent of who asked: here this test, which stays.
    messenger = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 30
    while not (world.folder / "opened").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)
    messenger.kill()
    messenger.wait()
    began = time.monotonic()
    world.ask(world.hello)
    assert time.monotonic() - began < 2.0  # five seconds of training were not waited for
    assert len(world.workers()) == 1
    world.bye()


def test_it_ends_with_the_process_it_belongs_to(world):
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    path = visit.folder() / "own.sock"
    command = [sys.executable, "-m", "fedtune.flower.resident", str(path), str(owner.pid)]
    worker = subprocess.Popen(command)
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    owner.kill()  # nobody waits for it yet: it stays as a zombie, as it does where process 1 does not reap
    assert worker.wait(10) == 0
    owner.wait()


def test_it_ends_by_sigterm_and_leaves_its_log(world):
    world.ask(world.hello)
    world.ask()
    (worker,) = world.workers()
    os.kill(worker, signal.SIGTERM)
    gone([worker])
    assert not (visit.folder() / f"{world.name}.sock").exists()
    assert "ended by SIGTERM" in (visit.folder() / f"{world.name}.log").read_text()


def test_it_leaves_its_successors_socket_alone(world):
    world.ask()
    workers, path = world.workers(), visit.folder() / f"{world.name}.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(path))
        os.kill(workers[0], signal.SIGTERM)
        gone(workers)
        assert path.exists()


def test_what_old_runs_have_left_is_removed(world):
    old, young = visit.folder() / "old.log", visit.folder() / "young.lock"
    for file in (old, young):
        file.touch()
    os.utime(old, (0, time.time() - visit.OLD_S - 60))
    world.ask(world.hello)
    assert not old.exists()
    assert young.exists()
    world.bye()


def test_a_folder_whose_name_is_too_long_is_refused(world, monkeypatch):
    monkeypatch.setenv("FEDTUNE_SOCKETS", str(world.folder / ("x" * 90)))
    with pytest.raises(visit.WorkerError, match="set FEDTUNE_SOCKETS to a shorter folder"):
        world.ask()


def test_a_temporary_folder_whose_name_is_too_long_is_not_used(sockets, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.delenv("FEDTUNE_SOCKETS", raising=False)
    monkeypatch.setattr(visit.tempfile, "gettempdir", lambda: str(long))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert visit.folder() == Path(f"/tmp/fedtune-{os.getuid()}")
    assert list(long.iterdir()) == []
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets))
    assert visit.folder().parent == sockets


class _Slow(socket.socket):
    def sendall(self, data, flags=0):
        super().sendall(data, flags)
        time.sleep(0.05)


@pytest.mark.parametrize("parts", [[], [b""], [b"abc", b""], [b"", b"", b"abc", b"", b""]])
def test_a_reader_may_hang_up_as_soon_as_it_has_everything(parts):
    def read_and_close():
        with there:
            return visit.read(there)

    here, there = socket.socketpair()
    with _Slow(fileno=here.detach()) as slow, ThreadPoolExecutor() as pool:
        answer = pool.submit(read_and_close)
        visit.send(slow, {"stype": "x"}, *parts)
        assert answer.result() == ({"stype": "x"}, parts)


def test_the_messenger_imports_nothing_heavy():
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")
    heavy = ("torch", "transformers", "pydantic", "fedtune.config")
    code = f"import sys, fedtune.flower.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
