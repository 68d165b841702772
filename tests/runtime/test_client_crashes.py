"""Client programs that are killed, stopped, or do not fit; and coordinators that are killed under them."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from fedtune_client.main import run

from fedtune.base import open_base
from fedtune.config import Shared, load
from fedtune.method import Member
from fedtune.rounds import Replica, Round, work
from fedtune.simulation import simulate
from fedtune.tensors import digest
from fedtune.testing import ToyWorker, open_toy, toy_base

PROGRAM = """
    import sys, time
    from pathlib import Path
    from fedtune.config import load
    from fedtune.testing import ToyWorker, open_toy
    from fedtune_client import main, session, transfer
    from fedtune import wire

    def say(word):
        print(word, flush=True)

    def slow(seconds):
        def open_worker(config, shared, index, on_step):
            def train():
                say("training")
                time.sleep(seconds)
            return ToyWorker(Path(config.model.name), shared.seed, delay=train)
        return open_worker

    open_worker = open_toy
    {setup}
    sys.exit(main.run(load(Path(sys.argv[1]), tuple(sys.argv[2:])), open_worker=open_worker))
"""
HANG_BEFORE_SENDING = """
    def hang(*_):
        say("sending")
        time.sleep(600)
    transfer.Transfer.submit = hang
"""


class Client:
    """A client program with a toy model; `setup` is Python that bends it."""

    def __init__(self, toml, tmp_path, name, address, setup="", *overrides):
        self.folder = tmp_path / name
        text = textwrap.dedent(PROGRAM).replace("{setup}", textwrap.dedent(setup))
        settings = [f"client.id={name}", f"client.folder={self.folder}", f"client.address={address}", *overrides]
        command = [sys.executable, "-c", text, str(toml), *settings]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def hear(self, word):
        assert self.process.stdout.readline().strip() == word

    def end(self, seconds=30):
        """Waits for the exit; returns the code and what was said on stderr."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def kill(self):
        self.process.kill()
        self.end()

    def events(self):
        return [json.loads(line)["event"] for line in (self.folder / "client.log").read_text().splitlines()]


@pytest.fixture
def client(tmp_path):
    started = []

    def begin(toml, name, address, setup="", *overrides):
        started.append(Client(toml, tmp_path, name, address, setup, *overrides))
        return started[-1]

    yield begin
    for one in started:
        if one.process.poll() is None:
            one.kill()


@pytest.fixture
def coordinator(spawn, tmp_path):
    """Starts a coordinator of two clients and returns it with its TOML file."""

    def begin(**overrides):
        served = spawn(**{"rounds": {"count": 2, "min_clients": 2, "grace_s": 0.5}, **overrides})
        return served, tmp_path / "run.toml"

    return begin


def digests(served):
    return [json.loads(file.read_text())["digest"] for file in sorted(served.folder.glob("rounds/*/round.json"))]


def oracle(toml, ids, rounds=2):
    config = load(toml)
    base, shared = open_base(Path(config.model.name)), Shared.of(config)
    members = [Member(name) for name in ids]
    result = simulate(shared.method, base, members, lambda m: open_toy(config, shared), rounds, shared.seed)
    return [r.digest for r in result.rounds]


def server_events(served, name):
    lines = (served.folder / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_finished_update_outlives_the_client_and_is_not_trained_again(coordinator, client):
    served, toml = coordinator()
    address = served.address()
    first = client(toml, "anna", address, HANG_BEFORE_SENDING)
    other = client(toml, "bert", address)
    first.hear("sending")
    first.kill()
    assert sorted(p.name for p in (first.folder / "outbox").iterdir()) == ["000001.bin", "000001.json"]
    second = client(toml, "anna", address, "open_worker = slow(0)")
    assert second.end()[0] == 0
    assert other.end()[0] == 0
    assert served.wait() == 0
    assert second.events().count("update_found") == 1
    assert second.events().count("trained") == 2  # once before the kill in round 1, once after it in round 2
    assert digests(served) == oracle(toml, ["anna", "bert"])


def test_a_client_killed_while_training_does_not_stop_the_round(coordinator, client):
    served, toml = coordinator(rounds={"count": 1, "min_clients": 3, "quorum": 0.6, "grace_s": 0.5})
    address = served.address()
    victim = client(toml, "carl", address, "open_worker = slow(600)")
    others = [client(toml, name, address) for name in ("anna", "bert")]
    victim.hear("training")
    victim.kill()
    assert served.wait() == 0
    assert [other.end()[0] for other in others] == [0, 0]
    assert server_events(served, "round_closed")[0]["clients"] == ["anna", "bert"]


def test_a_killed_client_comes_back_and_the_bits_are_the_same(coordinator, client):
    served, toml = coordinator()
    address = served.address()
    victim = client(toml, "anna", address, "open_worker = slow(600)")
    other = client(toml, "bert", address)
    victim.hear("training")
    victim.kill()
    again = client(toml, "anna", address)
    assert again.end()[0] == 0
    assert other.end()[0] == 0
    assert served.wait() == 0
    assert digests(served) == oracle(toml, ["anna", "bert"])


def test_clients_outlive_a_coordinator_that_is_killed_twice(coordinator, spawn, tmp_path):
    served, toml = coordinator(rounds={"count": 4, "min_clients": 2})
    address = served.address()
    trained, go, exits = [], threading.Semaphore(0), {}

    def open_worker(config, shared, index, on_step):
        def train():
            trained.append(config.client.id)
            assert go.acquire(timeout=30)

        return ToyWorker(Path(config.model.name), shared.seed, delay=train)

    def play(name):
        own = load(toml, (f"client.id={name}", f"client.folder={tmp_path / name}", f"client.address={address}"))
        exits[name] = run(own, open_worker=open_worker)

    threads = [threading.Thread(target=play, args=(name,), daemon=True) for name in ("anna", "bert")]
    for thread in threads:
        thread.start()
    for kill in (1, 2):
        wait_until(lambda kill=kill: len(trained) == 2 * kill)
        served.kill()
        go.release(2)  # training ends while nobody is there to take the update
        time.sleep(0.5)
        served = spawn(rounds={"count": 4, "min_clients": 2})
        assert served.address() == address
    go.release(4)
    assert served.wait() == 0
    for thread in threads:
        thread.join(20)
    assert exits == {"anna": 0, "bert": 0}
    assert len(trained) == 8  # four rounds of two: nothing was trained twice
    assert digests(served) == oracle(toml, ["anna", "bert"], 4)


@pytest.mark.slow
def test_ten_kills_of_the_coordinator_at_random_moments_change_no_bit(coordinator, spawn, tmp_path):
    rounds = {"count": 30, "min_clients": 4}
    served, toml = coordinator(rounds=rounds)
    address, names, exits = served.address(), ["anna", "bert", "carl", "dora"], {}

    def open_worker(config, shared, index, on_step):
        return ToyWorker(Path(config.model.name), shared.seed, delay=lambda: time.sleep(0.1))

    def play(name):
        own = load(toml, (f"client.id={name}", f"client.folder={tmp_path / name}", f"client.address={address}"))
        exits[name] = run(own, open_worker=open_worker)

    threads = [threading.Thread(target=play, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    moments = random.Random(5)
    for _ in range(10):
        before = len(digests(served))
        time.sleep(moments.uniform(0.0, 1.0))
        served.kill()
        served = spawn(rounds=rounds)
        wait_until(lambda before=before, served=served: len(digests(served)) > before, 30)
    assert served.wait(120) == 0
    for thread in threads:
        thread.join(20)
    assert exits == dict.fromkeys(names, 0)
    assert digests(served) == oracle(toml, names, 30)


@pytest.mark.parametrize(
    ("setup", "code", "says"),
    [
        ("wire.PROTOCOL_MAJOR = 0", 6, "protocol: expected 1.x"),
        ("wire.PROTOCOL_MAJOR = 99", 6, "protocol: expected 1.x"),
        ("wire.FEATURES = ()", 6, "features: expected raw-v1"),
        ("OTHER_BASE", 4, "base model: digest"),
    ],
)
def test_a_client_that_does_not_fit_leaves_and_the_others_go_on(coordinator, client, tmp_path, setup, code, says):
    served, toml = coordinator()
    address = served.address()
    overrides = [f"model.name={toy_base(tmp_path / 'other', seed=9)}"] if setup == "OTHER_BASE" else []
    odd = client(toml, "zoe", address, "" if overrides else setup, *overrides)
    exit_code, said = odd.end()
    assert (exit_code, says in said) == (code, True), said
    assert "Traceback" not in said
    others = [client(toml, name, address) for name in ("anna", "bert")]
    assert [other.end()[0] for other in others] == [0, 0]
    assert served.wait() == 0
    assert digests(served) == oracle(toml, ["anna", "bert"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_training_quickly_and_cleanly(coordinator, client, number):
    served, toml = coordinator(rounds={"count": 1, "min_clients": 1})
    one = client(toml, "anna", served.address(), "open_worker = slow(600)")
    one.hear("training")
    began = time.monotonic()
    one.process.send_signal(number)
    code, said = one.end(10)
    assert code == 0
    assert time.monotonic() - began < 5
    assert "Traceback" not in said


def test_a_signal_ends_a_client_that_finds_no_coordinator(client, tmp_path):
    toml = tmp_path / "alone.toml"
    toml.write_text("")
    one = client(toml, "anna", "127.0.0.1:1")
    wait_until(lambda: (one.folder / "client.log").exists() and "disconnected" in one.events())
    one.process.terminate()
    assert one.end(10)[0] == 0


def test_a_second_program_of_the_same_id_ends_the_first(coordinator, client, tmp_path):
    served, toml = coordinator(rounds={"count": 1, "min_clients": 2})
    address = served.address()
    first = client(toml, "anna", address)
    wait_until(lambda: server_events(served, "client_ready"))
    second = client(toml, "anna", address, "", f"client.folder={tmp_path / 'elsewhere'}")
    code, said = first.end()
    assert code == 6
    assert "Another program joined as anna" in said
    other = client(toml, "bert", address)
    assert (second.end()[0], other.end()[0], served.wait()) == (0, 0, 0)


def test_a_remote_coordinator_needs_tls(client, tmp_path):
    toml = tmp_path / "alone.toml"
    toml.write_text("")
    code, said = client(toml, "anna", "192.0.2.1:7070").end()
    assert code == 2
    assert "client.address" in said


CARRIES = {"name": "fedavg-lora", "uplink.codec": "ternary", "uplink.density": 0.1, "uplink.feedback": True}
HANG_WITHOUT_THE_ANSWER = """
    submit = transfer.Transfer.submit
    def deaf(*arguments):
        submit(*arguments)
        say("accepted")
        time.sleep(600)
    transfer.Transfer.submit = deaf
"""
SUBMIT_TOO_LATE = """
    submit = transfer.Transfer.submit
    def late(*arguments):
        while '"round_closed"' not in Path("{events}").read_text():
            time.sleep(0.02)
        return submit(*arguments)
    transfer.Transfer.submit = late
"""


def played(toml, served):
    """The digests of a run whose rounds have the members they had, and whose other turns never were."""
    config = load(toml)
    shared = Shared.of(config)
    state = shared.method.init(open_base(Path(config.model.name)), shared.seed)
    clients = {}
    found = []
    for number, closed in enumerate(server_events(served, "round_closed"), 1):
        current = Round(shared.method, state, number)
        for name in closed["clients"]:
            worker, replica = clients.setdefault(name, (open_toy(config, shared), Replica()))
            member = shared.method.admit(Member(name))
            reply = work(
                shared.method, current.task(member, replica.version), worker.job(shared.method, member, number), replica
            )
            current.add(member, b"".join(reply), worker.examples)
        state = current.close()
        found.append(digest(state))
    return found


@pytest.mark.parametrize(
    ("setup", "word", "events"),
    [(HANG_BEFORE_SENDING, "sending", ["update_found"]), (HANG_WITHOUT_THE_ANSWER, "accepted", ["update_settled"])],
)
def test_what_an_update_leaves_behind_is_as_durable_as_the_update(coordinator, client, setup, word, events):
    served, toml = coordinator(method=CARRIES, rounds={"count": 3, "min_clients": 2})
    address = served.address()
    first = client(toml, "anna", address, setup)
    other = client(toml, "bert", address)
    first.hear(word)
    first.kill()
    assert "000001.memory" in [p.name for p in (first.folder / "outbox").iterdir()]
    second = client(toml, "anna", address)
    assert (second.end()[0], other.end()[0], served.wait()) == (0, 0, 0)
    assert [e for e in second.events() if e in ("update_found", "update_settled")] == events
    assert digests(served) == oracle(toml, ["anna", "bert"], 3)


def test_an_update_that_came_too_late_leaves_nothing_behind(coordinator, client):
    rounds = {"count": 3, "min_clients": 3, "quorum": 0.6, "grace_s": 0.5}
    served, toml = coordinator(method=CARRIES, rounds=rounds)
    address = served.address()
    late = client(toml, "anna", address, SUBMIT_TOO_LATE.replace("{events}", str(served.folder / "events.jsonl")))
    others = [client(toml, name, address) for name in ("bert", "carl")]
    assert [one.end()[0] for one in (late, *others)] == [0, 0, 0]
    assert served.wait() == 0
    assert "update_late" in late.events()
    assert len(server_events(served, "round_closed")[0]["clients"]) == 2
    assert digests(served) == played(toml, served)


@pytest.mark.slow
def test_ten_kills_of_a_client_at_random_moments_lose_no_residue(coordinator, client):
    served, toml = coordinator(method=CARRIES, rounds={"count": 40, "min_clients": 2})
    address, moments = served.address(), random.Random(3)
    other = client(toml, "bert", address, "open_worker = slow(0.05)")
    for _ in range(10):
        one = client(toml, "anna", address, "open_worker = slow(0.05)")
        wait_until(lambda one=one: (one.folder / "client.log").exists() and "task" in one.events())
        time.sleep(moments.uniform(0.0, 1.0))
        one.kill()
    last = client(toml, "anna", address)
    assert (last.end(60)[0], other.end(60)[0], served.wait(60)) == (0, 0, 0)
    assert digests(served) == oracle(toml, ["anna", "bert"], 40)
