"""Real training inside Flower: a small torch model and rows of text, and a training loop of the user's own."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")
pytest.importorskip("torch")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COUNTED = """
import os
from pathlib import Path

from fedtune.flower.client import client_app


def open_worker(config, shared, index, on_step):
    from fedtune.training.worker import TorchWorker

    (config.run.folder.parent / f"{config.client.id}.{os.getpid()}.opened").touch()
    return TorchWorker.open(config, shared, index, on_step)


app = client_app(open_worker)
"""
OWN = """
from fedtune.flower.client import client_app


def train(model, rows, seed):
    import torch

    torch.manual_seed(seed)
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight -= 0.5 * weight.grad
                weight.grad = None
    return {"loss": loss.item()}


def open_worker(config, shared, index, on_step):
    import torch

    from fedtune.training.models import load_model, resolve_model
    from fedtune.training.own import OwnWorker

    folder = resolve_model(shared.model.name)
    model, _ = load_model(folder, "float32", "cpu")
    rows = torch.arange(16).reshape(2, 8) + 10 * index
    return OwnWorker(model, folder, len(rows), lambda model, seed: train(model, rows, seed), shared.seed)


app = client_app(open_worker)
"""


@pytest.fixture(scope="module")
def job(flower):
    """A job on rows of a file, with two clients of ranks 4 and 2."""
    from fedtune.training.models import resolve_model

    resolve_model("tiny")
    rows = (json.dumps({"text": f"hello number {i} and some more words"}) + "\n" for i in range(40))
    (flower.folder / "rows.jsonl").write_text("".join(rows))
    (flower.folder / "job.toml").write_text(f"""
        run.folder = "{flower.folder}/run"
        model.name = "tiny"
        data.name = "{flower.folder}/rows.jsonl"
        data.text = "text"
        training = {{ steps = 2, batch_size = 2, max_length = 32 }}
        method.rank = 4
        rounds = {{ count = 3, min_clients = 2 }}
        simulation = {{ clients = 2, ranks = [4, 2] }}
    """)
    return flower.folder / "job.toml"


def written(flower, job, name, client):
    flower.call("fedtune", "flower", "new", str(flower.folder / name), "--config", str(job))
    (flower.folder / name / "fedtune_app" / "client_app.py").write_text(client)
    return flower.folder / name


def test_a_deployment_trains_as_fedtune_simulate_does(flower, plain, job, tmp_path):
    """And every node loads its model once for all rounds."""
    app = written(flower, job, "counted", COUNTED)
    flower.run(app, "plain", {"run.folder": str(tmp_path / "run")})
    flower.call("fedtune", "simulate", str(job), "--set", f"run.folder={tmp_path}/simulated")
    mine, want = tmp_path / "run", tmp_path / "simulated"
    name = "final/adapter_model.safetensors"
    assert (mine / name).read_bytes() == (want / name).read_bytes()
    assert [r["digest"] for r in flower.report(mine).rounds] == [r["digest"] for r in flower.report(want).rounds]
    opened = sorted(path.name.split(".")[0] for path in tmp_path.glob("*.opened"))
    assert opened == ["client-00", "client-01"]


@pytest.mark.parametrize("connection", ["local", "plain"])
def test_a_training_loop_of_ones_own(request, flower, job, tmp_path, connection):
    """The same loop gives the same bits in the plain loop and in Flower."""
    if connection == "plain":
        request.getfixturevalue("plain")
    app = written(flower, job, f"own-{connection}", OWN)
    flower.run(app, connection, {"run.folder": str(tmp_path / "run")}, nodes=2 if connection == "local" else 0)
    got = flower.report(tmp_path / "run").rounds
    assert [r["digest"] for r in got] == played(job, app)
    assert got[0]["metrics"]["client-00"]["loss"] > 0


def played(job, app):
    """Digests of the plain loop with the app's own workers, in a process of its own: torch stays out of this one."""
    code = f"""
import json, sys
sys.path.insert(0, {str(app)!r})
from pathlib import Path
from fedtune.base import open_base
from fedtune.config import Shared, load
from fedtune.config.members import member_config
from fedtune.method import Member
from fedtune.simulation import simulate
from fedtune.training.models import resolve_model
from fedtune_app.client_app import open_worker
config = load(Path({str(job)!r}))
shared = Shared.of(config)
own = [member_config(config, i, "127.0.0.1:1").client for i in range(2)]
members = [Member(c.id, c.rank, c.alpha) for c in own]
index = {{c.id: i for i, c in enumerate(own)}}
done = simulate(config.method, open_base(resolve_model("tiny")), members,
                lambda m: open_worker(config, shared, index[m.id], None), config.rounds.count, shared.seed)
print(json.dumps([r.digest for r in done.rounds]))
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(said.stdout.splitlines()[-1])
