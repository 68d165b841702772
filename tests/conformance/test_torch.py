"""The same bits with a real model: the plain loop, the host of forked clients, and client programs of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.base import open_base
from fedtune.config import Shared, load
from fedtune.config.members import member_config
from fedtune.method import Member
from fedtune.simulation import simulate

torch = pytest.importorskip("torch")

TOML = """
    run.folder = "{folder}/run"
    model.name = "tiny"
    data.name = "{folder}/data.jsonl"
    data.text = "text"
    training = {{ steps = 2, batch_size = 2, max_length = 32 }}
    method.rank = 4
    rounds = {{ count = 2, min_clients = 2 }}
    server.address = "127.0.0.1:0"
    simulation = {{ clients = 2, ranks = [4, 2] }}
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    from fedtune.training.models import resolve_model

    resolve_model("tiny")
    folder = tmp_path_factory.mktemp("torch")
    rows = (json.dumps({"text": f"hello number {i} and some more words"}) + "\n" for i in range(40))
    (folder / "data.jsonl").write_text("".join(rows))
    (folder / "fedtune.toml").write_text(TOML.format(folder=folder))
    return folder / "fedtune.toml"


@pytest.fixture(scope="module")
def want(toml):
    """The digests of the plain loop, in this process."""
    from fedtune.training.models import resolve_model
    from fedtune.training.worker import TorchWorker

    config = load(toml)
    shared = Shared.of(config)
    own = {c.client.id: (i, c) for i in range(2) for c in [member_config(config, i, "127.0.0.1:1")]}
    members = [Member(name, c.client.rank, c.client.alpha) for name, (_, c) in own.items()]
    before = torch.get_num_threads()
    result = simulate(
        shared.method,
        open_base(resolve_model("tiny")),
        members,
        lambda m: TorchWorker.open(own[m.id][1], shared, own[m.id][0]),
        2,
        shared.seed,
    )
    torch.set_num_threads(before)
    return [r.digest for r in result.rounds]


def program(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["host", "programs"])
def test_separate_programs_give_the_bits_of_the_simulation(toml, tmp_path, want, how):
    folder = tmp_path / "run"
    place = ("--set", f"run.folder={folder}")
    running = [program("fedtune_server", toml, *place)]
    try:
        assert running[0].stderr.readline()
        address = (folder / "address").read_text().strip()
        if how == "host":
            running.append(program("fedtune_client.host", toml, *place, "--address", address))
        else:
            to = ("--set", f"client.address={address}")
            running += [program("fedtune_client", toml, *place, *to, "--index", i) for i in range(2)]
        said = [one.communicate(timeout=120)[1] for one in running[::-1]]
        assert [one.returncode for one in running] == [0] * len(running), said
    finally:
        for one in running:
            one.kill()
            one.wait()
    got = [json.loads(file.read_text())["digest"] for file in sorted(Path(folder).glob("rounds/*/round.json"))]
    assert got == want
