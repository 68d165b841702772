"""A coordinator as a program and clients as threads, beside the plain loop that says what must come out."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fedtune_client.main import run

from fedtune.base import open_base
from fedtune.config import Config, Shared, load
from fedtune.config.members import member_config, member_ids, member_of
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.simulation import Result, simulate
from fedtune.testing import open_toy, toy_base
from fedtune.worker import Worker

_VARIANTS = [
    "fedavg-lora by int8",
    "fedavg-lora by feedback",
    "fedavg-lora by both ways",
    "fedavg-lora by adam",
    "ffa-lora by nesterov",
    "fedavg-lora by personal",
    "fedavg by both ways",
    "fedavg by feedback",
    "fedavg by some",
    "flora by warm start",
    "flora by long warm start",
    "flora by budget",
    "flora by ternary",
    "flora by small stacks",
    "flora by embeddings",
    "fedex-lora by embeddings",
    "hetlora by pruning",
    "fedkseed by adapter",
    "fedkseed by sparse",
]
_OPTIONS: dict[str, dict[str, Any]] = {
    "int8": {"uplink.codec": "int8"},
    "ternary": {"uplink.codec": "ternary", "uplink.density": 0.1},
    "feedback": {"uplink.codec": "ternary", "uplink.density": 0.1, "uplink.feedback": True},
    "both ways": {"uplink": "int4", "downlink.codec": "ternary", "downlink.feedback": True},
    "adam": {"server_optimizer.name": "adam", "clip_norm": 0.5},
    "nesterov": {"server_optimizer.name": "nesterov", "clip_norm": 0.5},
    "personal": {"personal": ["layers.1.*", "lora_A"]},
    "warm start": {"start": "warm", "rank_budget": 6, "energy": 0.99, "clip_norm": 0.5},
    "long warm start": {"start": "warm", "warm_length": "fresh"},
    "budget": {"rank": 4, "rank_budget": 16, "server_optimizer.name": "momentum"},
}
_OPTIONS["small stacks"] = {"uplink": "int4", "downlink.codec": "ternary", "downlink.density": 0.3}
_OPTIONS["some"] = {"target_modules": ["q_proj", "layers.1"], "server_optimizer": "adam", "uplink": "int8"}
_OPTIONS["adapter"] = {"train": "lora", "rank": 2, "optimizer": "sign", "draws": "shared"}
_OPTIONS["sparse"] = {"train": "sparse", "density": 0.3, "pool": "rademacher", "clip_norm": 1.0, "directions": 2}
_OPTIONS["embeddings"] = {"target_modules": ["q_proj", "embed_tokens"]}
_OPTIONS["pruning"] = {"prune_gamma": 0.6}
_OPTIONS["krum"] = {"krum_byzantine": 1, "clip_norm": 42.0}
_OPTIONS["krum over own seeds"] = {"krum_byzantine": 1, "clip_norm": 60.0, "draws": "own"}
_SMALL: dict[str, dict[str, Any]] = {
    "fedkseed": {"seeds": 128, "steps": 4, "learning_rate": 1e-4, "eps": 1e-2, "pro": True},
    "fedavg": {},
}


class Grpc:
    """One run over gRPC."""

    def __init__(self, config: Config, toml: Path) -> None:
        self.config, self.folder = config, config.run.folder
        self.exits: dict[str, int] = {}
        self._threads: list[threading.Thread] = []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fedtune_server", str(toml)]
        self.server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        self.address = until(lambda: (self.folder / "address").read_text().strip())

    def client(self, index: int, open_worker: Callable[..., Any] = open_toy) -> None:
        own = member_config(self.config, index, self.address)

        def work() -> None:
            self.exits[own.client.id] = run(own, index, open_worker)

        self._threads.append(threading.Thread(target=work, daemon=True))
        self._threads[-1].start()

    def end(self) -> list[str]:
        """Waits for everyone and returns the digest of each round."""
        assert self.server.wait(60) == 0
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        assert set(self.exits.values()) == {0}
        return [json.loads(f.read_text())["digest"] for f in sorted(self.folder.glob("rounds/*/round.json"))]

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def close(self) -> None:
        self.server.kill()
        self.server.wait()


def until(value: Callable[[], Any], limit_s: float = 20.0) -> Any:
    """Waits for something true."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := value():
                return found
        time.sleep(0.01)
    raise TimeoutError


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_base(tmp_path_factory.mktemp("base"), tokens=24)


@pytest.fixture(params=sorted(METHODS) + _VARIANTS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(tmp_path: Path, toy_folder: Path) -> Callable[..., tuple[Config, Path]]:
    """Builds a configuration and its TOML file."""

    def build(method: str, name: str = "run", *, clients: int = 3, rounds: int = 3, **more: Any) -> tuple[Config, Path]:
        method, _, variant = method.partition(" by ")
        sections: dict[str, dict[str, Any]] = {
            "run": {"folder": str(tmp_path / name), "seed": 7},
            "model": {"name": str(toy_folder)},
            "method": {"name": method, **_SMALL.get(method, {"rank": 2}), **_OPTIONS.get(variant, {})},
            "rounds": {
                "count": rounds,
                "min_clients": more.get("min_clients", clients),
                "plan_s": more.get("plan_s", 0),
                **{key: more[key] for key in ("quorum", "grace_s") if key in more},
            },
            "client": {"measure": "plan_s" in more},
            "server": {"address": "127.0.0.1:0"},
            "simulation": {"clients": clients, **{k: list(more.get(k, ())) for k in ("ranks", "depths")}},
        }
        toml = tmp_path / f"{name}.toml"
        text = [
            f"[{s}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items()) for s, keys in sections.items()
        ]
        toml.write_text("\n".join(text))
        return load(toml), toml

    return build


@pytest.fixture
def over_grpc() -> Iterator[Callable[..., Grpc]]:
    """Starts coordinators."""
    runs: list[Grpc] = []

    def begin(made: tuple[Config, Path]) -> Grpc:
        runs.append(Grpc(*made))
        return runs[-1]

    yield begin
    for grpc_run in runs:
        grpc_run.close()


@pytest.fixture
def simulated() -> Callable[[Config], Result]:
    """Runs the plain loop with the same members, seed and examples."""

    def play(config: Config) -> Result:
        ids = member_ids(config)
        own = [member_config(config, i, "127.0.0.1:1").client for i in range(len(ids))]
        members = [member_of(client) for client in own]
        base, shared = open_base(Path(config.model.name)), Shared.of(config)

        def worker(member: Member) -> Worker:
            return open_toy(config, shared, ids.index(member.id))

        plan_s = config.rounds.plan_s
        return simulate(config.method, base, members, worker, config.rounds.count, shared.seed, plan_s=plan_s)

    return play
