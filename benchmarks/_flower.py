"""Runs `flower_app` in Flower's simulation (Ray) or deployment (SuperLink and SuperNodes) and measures it.

Flower lives in an environment of its own; nothing of it is imported here. FLWR_HOME is private, telemetry and update
checks are off, the interpreter's folder is on PATH (Flower starts its parts by name), and every process that it leaves
behind, such as the local SuperLink, is ended.
"""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from _measure import Measured, measure
from _processes import descendants, end_descendants

_ROLES = {
    "flower-superlink": "coordinator",
    "flwr-serverapp": "server app",
    "flwr-simulation": "server app",
    "flower-supernode": "client",
    "flwr-clientapp": "client app",
    "ray::": "client app",
}


def simulation(python: Path, clients: int, megabytes: float, rounds: int) -> Measured:
    """Runs the simulation with one CPU a client."""
    with home(python) as (place, environment):
        federation = f"num-supernodes={clients} client-resources-num-cpus=1"
        command = ["flwr", "run", "app", "local", "--stream", "--federation-config", federation]
        return _run(place, environment, command, clients, megabytes, rounds)


def deployment(python: Path, clients: int, megabytes: float, rounds: int) -> Measured:
    """Runs a SuperLink and one SuperNode a client, all on this machine, without TLS."""
    with home(python) as (place, environment):
        port = start_superlink(place, environment)
        for index in range(clients):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(_free_port())]
            _start(node, place, environment, f"supernode-{index}")
        link = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (place / "config.toml").write_text(link)
        return _run(place, environment, ["flwr", "run", "app", "here", "--stream"], clients, megabytes, rounds)


def start_superlink(place: Path, environment: dict[str, str]) -> int:
    """Starts a SuperLink; returns its port once it answers."""
    port = _free_port()
    command = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    _start(command, place, environment, "superlink")
    _wait_for(f"http://127.0.0.1:{port}/health")
    return port


def version(python: Path) -> str:
    """Says which Flower this interpreter has; empty when it has none."""
    code = "from importlib.metadata import version; print(version('flwr'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip()


@contextmanager
def home(python: Path):
    """Yields a private FLWR_HOME with a copy of the app, and the environment to run in."""
    with tempfile.TemporaryDirectory(prefix="flower-") as folder:
        home = Path(folder)
        shutil.copytree(
            Path(__file__).parent / "flower_app", home / "app", ignore=shutil.ignore_patterns("__pycache__")
        )
        environment = {
            **os.environ,
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "FLWR_HOME": folder,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": folder,
            "TMPDIR": folder,
        }
        try:
            yield home, environment
        finally:
            end_descendants()


def _run(
    home: Path, environment: dict[str, str], command: list[str], clients: int, megabytes: float, rounds: int
) -> Measured:
    log = home / "rounds.jsonl"
    settings = f'rounds={rounds} clients={clients} megabytes={megabytes} log="{log}"'
    return measure(
        lambda: _start([*command, "--run-config", settings], home, environment, "run"),
        lambda: _closed(log, clients),
        rounds,
        _role,
        home,
    )


def _closed(log: Path, clients: int) -> list[float]:
    """Lists when each round ended; a round that lost a client is no measurement."""
    with suppress(FileNotFoundError):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        closed = [event for event in events if event["event"] == "closed"]
        if any(event["clients"] != clients for event in closed):
            raise RuntimeError(f"Flower lost clients: {closed}")
        return [event["time"] for event in closed]
    return []


def _role(command: str) -> str:
    return next((role for word, role in _ROLES.items() if word in command), "")


def _start(command: list[str], home: Path, environment: dict[str, str], name: str) -> subprocess.Popen[bytes]:
    with (home / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _wait_for(url: str, patience_s: float = 180.0) -> None:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{url} does not answer; {len(descendants())} processes run")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
