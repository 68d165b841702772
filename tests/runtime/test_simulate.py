"""`fedtune simulate` with real programs and a tiny model: from nothing to a report, through interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """
[run]
name = "team"
[model]
name = "tiny"
[data]
name = "vader"
max_rows = 300
held_out_rows = 10
[method]
target_modules = ["q_proj", "v_proj"]
[training]
steps = 3
batch_size = 4
max_length = 96
learning_rate = 5e-3
[rounds]
count = 12
[simulation]
clients = 3
ranks = [8, 4, 2]
"""


def command(folder: Path, run: str, *options: str) -> list[str]:
    settings = ["--set", f"run.folder={folder / run}"]
    return [sys.executable, "-m", "fedtune", "simulate", str(folder / "config.toml"), "--plain", *settings, *options]


def wait_for_round(folder: Path, number: int, seconds: float = 200.0) -> None:
    until = time.monotonic() + seconds
    while not (folder / "rounds" / f"{number:04d}" / "round.json").exists():
        assert time.monotonic() < until, "no round was closed"
        time.sleep(0.02)


def heed_interrupts() -> None:
    """A shell starts its background jobs, and so perhaps these tests, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def coordinator_pid(folder: Path) -> int:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"fedtune_server" in words and f"run.folder={folder}".encode() in words:
            return int(path.parent.name)
    raise AssertionError("no coordinator")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run to its end, and the folder of its configuration."""
    folder = tmp_path_factory.mktemp("simulate")
    (folder / "config.toml").write_text(CONFIG)
    done = subprocess.run(command(folder, "whole"), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_a_run_leaves_what_the_documentation_says(undisturbed):
    folder = undisturbed[0] / "whole"
    for name in (
        "final/adapter_model.safetensors",
        "rounds/0003/adapter_config.json",
        "report.png",
        "ledger.csv",
        "settings.json",
    ):
        assert (folder / name).stat().st_size > 0
    found = report(folder)
    assert found["outcome"] == "completed"
    assert [r["round"] for r in found["rounds"]] == list(range(1, 13))
    assert [c["rank"] for c in found["clients"]] == [8, 4, 2]
    assert all(c["alpha"] > 0 for c in found["clients"])
    assert all(r["held_out"] for r in found["rounds"])
    with (folder / "ledger.csv").open() as stream:
        rows = [line.strip().split(",") for line in stream][1:]
    assert sum(int(r[4]) for r in rows if r[0] != "0" and r[2] == "up") >= found["bytes_up"] > 0


def test_the_model_learned(undisturbed):
    held_out = report(undisturbed[0] / "whole")["held_out"]
    assert held_out["final"]["loss"] < held_out["base"]["loss"] - 0.05


def test_the_summary_is_on_stdout_and_progress_on_stderr(undisturbed):
    done = undisturbed[1]
    assert "adapter:" in done.stdout
    assert "round 12/12: closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_started_again_says_the_same_at_once(undisturbed):
    folder = undisturbed[0]
    before = report(folder / "whole")
    done = subprocess.run(command(folder, "whole"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert report(folder / "whole") == before


def test_other_settings_in_the_same_folder_are_refused_and_change_nothing(undisturbed):
    folder = undisturbed[0]
    before = report(folder / "whole")
    options = ("--set", "training.steps=4", "--no-evaluate")
    done = subprocess.run(command(folder, "whole", *options), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "training.steps: expected 3, got 4" in done.stderr
    assert "Traceback" not in done.stderr
    assert report(folder / "whole") == before


def test_other_clients_or_centralised_training_in_the_same_folder_are_refused_and_change_nothing(undisturbed):
    folder = undisturbed[0]
    before = {path: path.read_bytes() for path in (folder / "whole").glob("*.json")}
    other = command(folder, "whole", "--set", "simulation.clients=4")
    train = ["train" if word == "simulate" else word for word in command(folder, "whole")]
    for words, said in ((other, "simulation.clients: expected 3, got 4"), (train, "--set run.folder=")):
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
    assert {path: path.read_bytes() for path in (folder / "whole").glob("*.json")} == before


@pytest.mark.skipif(sys.platform != "linux", reason="finds the coordinator in /proc")
def test_ctrl_c_and_a_killed_coordinator_change_no_bit(undisturbed):
    folder = undisturbed[0]
    run = folder / "disturbed"
    first = subprocess.Popen(
        command(folder, "disturbed", "--no-evaluate"), stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    )
    wait_for_round(run, 1)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    with pytest.raises(AssertionError, match="no coordinator"):
        coordinator_pid(run)
    second = subprocess.Popen(command(folder, "disturbed", "--no-evaluate"), stderr=subprocess.PIPE, text=True)
    wait_for_round(run, 2)
    os.kill(coordinator_pid(run), signal.SIGKILL)
    said = second.communicate(timeout=200)[1]
    assert second.returncode == 0, said[-3000:]
    assert report(run)["digest"] == report(folder / "whole")["digest"]


def test_a_merged_model_is_the_base_with_the_adapter(undisturbed, tmp_path):
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fedtune.training.models import resolve_model

    run = undisturbed[0] / "whole"
    export = [sys.executable, "-m", "fedtune", "export", str(run), str(tmp_path / "model"), "--merge"]
    subprocess.run(export, check=True, capture_output=True, timeout=120)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    adapted = PeftModel.from_pretrained(base, run / "final").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("model.name=/nowhere", 4, "/nowhere"),
        ("data.name=/nowhere.jsonl", 3, "/nowhere.jsonl"),
        ("simulation.ranks=[999]", 6, "method.max_rank"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(undisturbed, change, code, said):
    folder = undisturbed[0]
    done = subprocess.run(command(folder, "never", "--set", change), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "never" / "run.db").exists()
