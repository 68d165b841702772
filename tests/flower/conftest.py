"""Flower's real programs for tests: private folders, free ports, no network, and nothing left running."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from toy_app import CLIENT_APP, TOY


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Flower:
    """One SuperLink's world: its folder, its environment, the programs in it."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.home = self.folder / "flwr"
        self.home.mkdir(parents=True)
        self.sockets = short_folder()
        self.connect("local", 'address = ":local:"')
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        private = ("PYTHONPATH", "FLWR_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(private)} | {
            "PATH": path,
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(self.port),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.sockets),  # its sockets lie there
            "FEDTUNE_SOCKETS": str(self.sockets),
            "FEDTUNE_TEST": self.mark,
            "OMP_NUM_THREADS": "1",
        }

    def connect(self, name: str, lines: str) -> None:
        """Adds a connection to Flower's configuration."""
        with (self.home / "config.toml").open("a") as stream:
            if stream.tell() == 0:
                stream.write('[superlink]\ndefault = "local"\n')
            stream.write(f"[superlink.{name}]\n{lines}\n")

    def start(self, *command: str, log: str) -> subprocess.Popen[bytes]:
        """Starts a program in the background."""
        with (self.folder / log).open("wb") as stream:
            return subprocess.Popen(command, env=self.env, cwd=self.folder, stdout=stream, stderr=stream)

    def call(self, *command: str, timeout: float = 280, code: int = 0) -> str:
        """Runs a program to its end, which must have the exit code; returns what it said."""
        # A file, not a pipe: what a program leaves running would hold a pipe open.
        with (self.folder / f"call-{uuid.uuid4().hex}.log").open("w+") as stream:
            done = subprocess.run(
                command, env=self.env, cwd=self.folder, stdout=stream, stderr=stream, timeout=timeout, check=False
            )
            stream.seek(0)
            said = stream.read()
        assert done.returncode == code, said
        return said

    def run(self, app: Path, connection: str, config: dict[str, object], nodes: int = 0, code: int = 0) -> str:
        """`fedtune flower run`, to its end, which must have the exit code; returns its log."""
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        extra = ["--federation-config", f"num-supernodes={nodes} client-resources-num-cpus=1"] if nodes else []
        return self.call("fedtune", "flower", "run", str(app), connection, "--run-config", values, *extra, code=code)

    def run_by_flwr(self, app: Path, connection: str, config: dict[str, object]) -> str:
        """`flwr run`, to its end; returns its log."""
        values = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        return self.call("flwr", "run", str(app), connection, "--stream", "--run-config", values)

    def start_local(self) -> None:
        """Starts the SuperLink of simulations, which `flwr run` would start itself, but with 15 seconds to do it in."""
        command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
        self.start(*command, "--port", str(self.port), log="local.log")
        listening(self.port)

    def status(self, connection: str) -> str:
        """Status of the newest run."""
        said = self.call("flwr", "ls", connection, "--format", "json")
        listed = json.loads(said[said.index("{") :])
        return str(max(listed["runs"], key=lambda run: run["pending-at"])["status"])

    def processes(self) -> dict[int, str]:
        """Processes of this world that live: number to command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"FEDTUNE_TEST={self.mark}".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def stop(self) -> None:
        """Ends everything that was started here."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.processes():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            until = time.monotonic() + 10
            while self.processes() and time.monotonic() < until:
                time.sleep(0.1)
        shutil.rmtree(self.sockets)
        assert not self.processes()

    def report(self, folder: Path) -> SimpleNamespace:
        """What a run folder says."""
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        rounds = [json.loads(p.read_text()) for p in sorted(folder.glob("rounds/*/round.json"))]
        ledger = (folder / "ledger.csv").read_text()
        return SimpleNamespace(events=events, rounds=rounds, ledger=ledger, last=events[-1])


def short_folder() -> Path:
    """Makes a folder for sockets, whose paths may not be long as those of tests are."""
    return Path(tempfile.mkdtemp(prefix="fedtune-", dir="/tmp"))


@pytest.fixture
def sockets():
    """A folder with a short name."""
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def flower(tmp_path_factory):
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")
    world = Flower(tmp_path_factory.mktemp("flower"))
    try:
        world.start_local()
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="module")
def app(flower):
    """A Flower app whose nodes are toys."""
    from fedtune.config import Config
    from fedtune.flower.app import write_app
    from fedtune.testing import toy_base

    folder = flower.folder / "app"
    write_app(folder, Config())
    (folder / "fedtune_app" / "toy.py").write_text(TOY)
    (folder / "fedtune_app" / "client_app.py").write_text(CLIENT_APP)
    toy_base(flower.folder / "model")
    return folder


@pytest.fixture(scope="module")
def pki(flower):
    """A certificate authority, a server's certificate, and node keys."""
    folder = flower.folder / "pki"
    folder.mkdir()

    def openssl(*args: str) -> None:
        flower.call("openssl", *args)

    if shutil.which("openssl") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs openssl and ssh-keygen to make certificates")
    names = folder / "san.cnf"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=test", "-keyout", f"{folder}/ca.key", "-out", f"{folder}/ca.pem")  # fmt: skip
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost",
            "-keyout", f"{folder}/server.key", "-out", f"{folder}/server.csr")  # fmt: skip
    openssl("x509", "-req", "-in", f"{folder}/server.csr", "-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key",
            "-CAcreateserial", "-days", "2", "-extfile", str(names), "-out", f"{folder}/server.pem")  # fmt: skip
    for node in range(2):
        flower.call("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"{folder}/node{node}")
    return folder


@dataclass
class Deployment:
    """A SuperLink and two SuperNodes."""

    world: Flower
    app: Path
    connection: str
    nodes: list["subprocess.Popen[bytes]"]
    superlink: "subprocess.Popen[bytes]"

    others: set[int]

    def run(self, **config: object) -> str:
        return self.world.run(self.app, self.connection, config)

    def stop(self) -> None:
        """Ends the programs as their user would; nothing that was started meanwhile may be left."""
        for program in (*self.nodes, self.superlink):
            program.terminate()
        for program in (*self.nodes, self.superlink):
            try:
                program.wait(60)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        until = time.monotonic() + 20
        while left := {pid: line for pid, line in self.world.processes().items() if pid not in self.others}:
            assert time.monotonic() < until, left
            time.sleep(0.1)


def deploy(world: Flower, app: Path, name: str, pki: Path | None = None) -> Deployment:
    """Starts a SuperLink and two SuperNodes, with TLS and authenticated nodes when there are certificates."""
    port, others = free_port(), set(world.processes())
    if pki:
        safe = ["--ssl-ca-certfile", f"{pki}/ca.pem", "--ssl-certfile", f"{pki}/server.pem"]
        safe += ["--ssl-keyfile", f"{pki}/server.key", "--enable-supernode-auth"]
        world.connect(name, f'address = "127.0.0.1:{port}"\nroot-certificates = "{pki}/ca.pem"')
    else:
        safe = ["--insecure"]
        world.connect(name, f'address = "127.0.0.1:{port}"\ninsecure = true')
    superlink = world.start("flower-superlink", *safe, "--port", str(port), log=f"{name}-superlink.log")
    listening(port)
    nodes = []
    for i in range(2):
        own = ["--insecure"]
        if pki:
            world.call("flwr", "supernode", "register", f"{pki}/node{i}.pub", name)
            own = ["--root-certificates", f"{pki}/ca.pem", "--auth-supernode-private-key", f"{pki}/node{i}"]
        where = ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
        config = f"partition-id={i} num-partitions=2"
        node = world.start("flower-supernode", *own, *where, "--node-config", config, log=f"{name}-node{i}.log")
        nodes.append(node)
    return Deployment(world, app, name, nodes, superlink, others)


def listening(port: int) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the SuperLink does not listen")


@pytest.fixture(scope="module")
def plain(flower, app):
    deployment = deploy(flower, app, "plain")
    yield deployment
    deployment.stop()


@pytest.fixture(scope="module")
def secure(flower, app, pki):
    deployment = deploy(flower, app, "secure", pki)
    yield deployment
    deployment.stop()


@pytest.fixture
def settings(flower, app, tmp_path):
    """Run config of a short run of toys."""
    model = str(flower.folder / "model")
    return {
        "model.name": model,
        "run.folder": str(tmp_path / "run"),
        "run.seed": 7,
        "method.rank": 2,
        "rounds.count": 2,
        "rounds.attempts": 10,  # on a busy machine Flower gives up ClientApps that start slowly, and says they failed
    }


@pytest.fixture
def simulated():
    """Digests of the rounds of the plain loop with the same configuration."""
    from fedtune.base import open_base
    from fedtune.config import Shared
    from fedtune.config.members import member_config, member_ids, member_of
    from fedtune.flower.settings import read_config
    from fedtune.method import Member
    from fedtune.simulation import simulate
    from fedtune.testing import open_toy

    def play(settings: dict[str, object], nodes: int) -> list[str]:
        config = read_config({**settings, "simulation.clients": nodes})
        own = [member_config(config, i, "127.0.0.1:1").client for i in range(nodes)]
        members = [member_of(client) for client in own]
        shared = Shared.of(config)

        def worker(member: Member) -> object:
            return open_toy(config, shared, member_ids(config).index(member.id))

        base = open_base(Path(config.model.name))
        plan_s = config.rounds.plan_s
        done = simulate(config.method, base, members, worker, config.rounds.count, shared.seed, plan_s=plan_s)
        return [r.digest for r in done.rounds]

    return play


@pytest.fixture
def over_grpc(tmp_path):
    """Digests of the rounds over fedtune's own gRPC, with the same configuration."""
    import threading

    from fedtune_client.main import run

    from fedtune.config.members import member_config
    from fedtune.flower.settings import read_config
    from fedtune.methods import METHODS
    from fedtune.testing import open_toy

    def play(settings: dict[str, object], nodes: int) -> list[str]:
        folder = tmp_path / "grpc"
        flat = {**settings, "simulation.clients": nodes, "run.folder": str(folder), "rounds.min_clients": nodes}
        # An app lists the keys of every method; a TOML file has its own method's only.
        own = {f"method.{name}" for name in ("name", *METHODS[str(flat["method.name"])].__dataclass_fields__)}
        flat = {k: v for k, v in flat.items() if not k.startswith("method.") or ".".join(k.split(".")[:2]) in own}
        server = start_server(tmp_path / "grpc.toml", flat)
        try:
            until = time.monotonic() + 30
            while not (folder / "address").exists() and time.monotonic() < until:
                time.sleep(0.05)
            address = (folder / "address").read_text().strip()
            config = read_config(flat)
            owns = [member_config(config, i, address) for i in range(nodes)]
            threads = [threading.Thread(target=run, args=(c, i, open_toy), daemon=True) for i, c in enumerate(owns)]
            for thread in threads:
                thread.start()
            assert server.wait(60) == 0
            for thread in threads:
                thread.join(20)
        finally:
            server.kill()
        return [json.loads(p.read_text())["digest"] for p in sorted(folder.glob("rounds/*/round.json"))]

    return play


def start_server(toml: Path, flat: dict[str, object]) -> "subprocess.Popen[bytes]":
    """Starts fedtune's own coordinator with the settings of a Flower run; lists are TOML in a string already."""
    toml.write_text("")
    sets = ["server.address=127.0.0.1:0"]
    for key, value in flat.items():
        listed = isinstance(value, str) and value[:1] == "["
        sets.append(f"{key}={value if listed else json.dumps(value)}")
    command = [sys.executable, "-m", "fedtune_server", str(toml)]
    return subprocess.Popen([*command, *(part for s in sets for part in ("--set", s))], stderr=subprocess.DEVNULL)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes configuration, grid and strategy of a run in this process, where nothing waits long."""
    pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")
    import loop_grid

    loop_grid.hurry(monkeypatch)
    return lambda **settings: loop_grid.make(tmp_path, **settings)
