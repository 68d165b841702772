"""The supervisor, with programs of three lines in place of the coordinator and the clients."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

from fedtune.cli.programs import Program
from fedtune.cli.remote import RemoteClient, RemoteStatus
from fedtune.cli.supervise import Supervisor
from fedtune.cli.view import RunView
from fedtune.errors import ConfigError, FedtuneError, ModelError, RoundError

SAY = """
import json, os, sys, time
def say(event, **fields):
    with open("events.jsonl", "a") as stream:
        stream.write(json.dumps({"event": event, **fields}) + "\\n")
first = not os.path.exists("started")
open("started", "w").close()
"""
WELL = "say('ready'); say('round_closed', round=1, digest='d1', seconds=1); say('run_finished', outcome='completed')"
IDLE = "time.sleep(60)"


class Stage:
    """A folder with two programs, and the supervisor over them."""

    def __init__(self, folder, coordinator, host=IDLE):
        self.folder = folder
        self.closed = []
        self.shown = Console(file=(folder / "shown.txt").open("w"), width=200)
        programs = [self.program("coordinator", coordinator), self.program("host", host)]
        view = RunView(1, self.shown, plain=True)
        self.supervisor = Supervisor(
            folder, *programs, view, lambda number, digest: self.closed.append((number, digest))
        )
        self.programs = programs

    def program(self, name, body):
        (self.folder / f"{name}_program.py").write_text(SAY + textwrap.dedent(body))
        return Program(name, [f"{name}_program"], self.folder / f"{name}.log")

    def alive(self):
        return [p.name for p in self.programs if p.process is not None and p.code is None]

    def said(self):
        self.shown.file.flush()
        return (self.folder / "shown.txt").read_text()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda *bodies: Stage(tmp_path, *bodies)


def test_a_run_that_goes_well(stage):
    s = stage(WELL)
    s.supervisor.run()
    assert s.closed == [(1, "d1")]
    assert s.alive() == []
    assert "starting it again" not in s.said()


def test_a_finished_run_started_again_is_over_at_once(stage):
    s = stage("sys.exit(0)")
    s.supervisor.run()
    assert s.programs[1].process is None


def test_a_coordinator_that_is_killed_is_started_again(stage):
    s = stage(f"say('ready')\nif first: os.kill(os.getpid(), 9)\n{WELL}")
    s.supervisor.run()
    assert s.closed == [(1, "d1")]
    assert s.said().count("starting it again") == 1


def test_a_coordinator_that_keeps_dying_is_given_up(stage, monkeypatch):
    monkeypatch.setattr("fedtune.cli.supervise._RESTARTS", 2)
    s = stage(
        "say('ready')\nprint('Traceback ...\\nZeroDivisionError: x')\nsys.stdout.flush()\nos.kill(os.getpid(), 9)"
    )
    with pytest.raises(RoundError, match=r"at most 2 restarts.*ZeroDivisionError"):
        s.supervisor.run()
    assert s.alive() == []


@pytest.mark.parametrize(("code", "kind"), [(2, ConfigError), (4, ModelError), (7, RoundError)])
@pytest.mark.parametrize("ready", ["", "say('ready'); time.sleep(0.5)"])
def test_an_error_that_has_a_name_is_passed_on_in_its_own_words(stage, code, kind, ready):
    s = stage(f"{ready}\nsys.stderr.write('noise\\nerror: the port is taken\\n  by another\\n')\nsys.exit({code})")
    with pytest.raises(kind, match=r"(?s)the port is taken\n  by another.*coordinator.log"):
        s.supervisor.run()
    assert s.alive() == []


def test_clients_that_end_with_an_error_end_the_run(stage):
    s = stage(f"say('ready')\n{IDLE}", "sys.stderr.write('error: another base model\\n'); sys.exit(4)")
    with pytest.raises(ModelError, match="another base model"):
        s.supervisor.run()
    assert s.alive() == []


CLIENTS = """
def write(text):
    sys.stderr.write(text); sys.stderr.flush()
write('client-00: joined\\nclient-00: error: steps: none\\n{"event": "client_exited", "client": "client-00"}\\n')
"""


def test_what_each_client_complained_of_ends_the_run_in_its_own_words(stage):
    more = 'write(\'client-01: error: steps: none\\nclient-02: unexpected error: KeyError\\n{"event": "x"}\\n\')'
    s = stage(f"say('ready')\n{IDLE}", f"{CLIENTS}{more}\nsys.exit(10)")
    (s.folder / "host.log").write_text("client-09: error: of an earlier start\n")
    with pytest.raises(FedtuneError) as raised:
        s.supervisor.run()
    said = "host: client-00, client-01: steps: none\nclient-02: unexpected error: KeyError\n"
    assert str(raised.value) == f"{said}  log: {s.folder / 'host.log'}"


def test_a_client_that_fails_is_told_of_with_the_reason_while_the_others_go_on(stage):
    s = stage(f"say('ready')\nwhile not os.path.exists('failed'): time.sleep(0.05)\ntime.sleep(1.0)\n{WELL}",
              f"{CLIENTS}\nopen('failed', 'w').close()\n{IDLE}")  # fmt: skip
    s.supervisor.run()
    assert s.said().count("failed: client-00: steps: none\n") == 1


def test_clients_that_are_killed_are_started_again(stage):
    s = stage(
        f"say('ready')\nwhile not os.path.exists('twice'): time.sleep(0.05)\n{WELL}",
        "if os.path.exists('once'): open('twice', 'w').close(); time.sleep(60)\n"
        "open('once', 'w').close()\nos.kill(os.getpid(), 9)",
    )
    s.supervisor.run()
    assert "the clients ended (code -9); starting them again" in s.said()


def test_sigterm_stops_both_programs_and_counts_as_an_interrupt(stage):
    s = stage(f"say('ready')\n{IDLE}")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        s.supervisor.run()
    assert s.alive() == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_last_words(tmp_path):
    program = Program("x", [], tmp_path / "x.log")
    assert program.last_words() == "no log"
    program.log.write_text("")
    assert program.last_words() == "an empty log"
    program.log.write_text('a\n{"event": "internal_error", "reason": "why"}\n')
    assert program.last_words() == "why"
    program.log.write_text("a\nerror: one\n  two\n")
    assert program.last_words() == "one\n  two"
    program.log.write_text(
        "a: error: one\n  two\nb: joined\nb: error: three\n" + "".join(f"{n}: error: {n}\n" for n in "xyz")
    )
    assert program.last_words() == "a: one\n  two\nb: three\nx: x\ny: y\nand 1 more"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_programs_end_when_their_parent_is_killed(tmp_path):
    child = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-m', 'fedtune.cli.leash', sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    pid = wait_for(lambda: int((tmp_path / "pid").read_text() or 0))
    process.kill()
    process.wait()
    assert wait_for(lambda: not alive(pid))


def test_the_moving_table_draws_every_state():
    console = Console(record=True, width=120)
    view = RunView(3, console)
    for event in (
        {"event": "client_ready", "client": "a", "examples": 3},
        {"event": "round_started", "round": 1, "selected": ["a"], "attempt": 2},
        {"event": "task_pushed", "client": "a"},
        {"event": "update_accepted", "client": "a", "bytes": 2000, "metrics": {"loss": 1.25}},
        {"event": "round_closed", "round": 1, "seconds": 70.0, "bytes_up": 2000, "bytes_down": 10},
        {"event": "client_left", "client": "b"},
        {"event": "something_new", "round": 1},
    ):
        view.tell(json.loads(json.dumps(event)))
    view.evaluated(0, 2.5)
    view.evaluated(1, 1.5)
    console.print(view.render())
    text = console.export_text()
    for part in ("round 1/3", "2.0 kB up", "loss 1.250", "gone", "base: 2.500  1: 1.500"):
        assert part in text, part


def test_skipped_steps_are_told_of_when_a_round_closes():
    console = Console(record=True, width=120)
    view = RunView(2, console, plain=True)
    for number, skipped in ((1, 3.0), (2, 0.0)):
        for client in "ab":
            metrics = {"loss": 1.0, "skipped": skipped}
            view.tell({"event": "update_accepted", "client": client, "bytes": 8, "metrics": metrics})
        view.tell({"event": "round_closed", "round": number, "seconds": 2.0})
    closed = [line for line in console.export_text().splitlines() if "closed" in line]
    assert closed == ["round 1/2: closed after 2.0 s; 6 steps skipped", "round 2/2: closed after 2.0 s"]


def test_a_plain_view_says_now_and_then_how_far_clients_are():
    console = Console(record=True, width=200)
    views = RunView(3, console, plain=True), RunView(3, console, plain=True, every_s=0.0)
    clients = [RemoteClient(f"c{i}", "training", 0, 0, 1, 40 + i, 200, 2.5) for i in range(6)]
    answer = RemoteStatus("r", "demo", "training", 1, 3, 0, 0, (*clients, replace(clients[0], id="d", steps=0)))
    for view in views:
        view.round = 1
        for client in answer.clients:
            view.tell({"event": "task_pushed", "client": client.id})
        view.progress(answer)
    steps = "; ".join(f"c{i} step {40 + i}/200, loss 2.500" for i in range(4))
    assert console.export_text() == f"round 1/3: {steps}; 2 more\n"
    views[1].tell({"event": "update_accepted", "client": "c0", "bytes": 5})
    views[1].progress(replace(answer, clients=(replace(clients[0], state="submitted"),)))
    assert "c0 step" not in console.export_text().splitlines()[-1]


def wait_for(look, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if found := look():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stream:  # noqa: PTH123  # /proc goes away while it is read
        return stream.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_it_is_shown_what_a_round_waits_for(stage):
    body = "say('ready'); say('waiting', round=1, clients=4, ready=2); " + WELL
    made = stage(body)
    made.supervisor.run()
    assert "waiting for 4 clients, 2 are ready" in made.said()


def test_the_moving_table_says_so_until_the_round_starts():
    view = RunView(1, Console(width=100))
    drawn = []
    for event in ({"event": "waiting", "clients": 4, "ready": 2}, {"event": "round_started", "round": 1}):
        view.tell(event)
        with view.console.capture() as capture:
            view.console.print(view.render())
        drawn.append("waiting for 4 clients, 2 are ready" in capture.get())
    assert drawn == [True, False]
