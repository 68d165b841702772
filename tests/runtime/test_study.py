"""`simulations/study.py`: a small study from nothing to its table, and again without running anything anew."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SIMULATIONS = Path(__file__).resolve().parents[2] / "simulations"
CONFIG = """
[model]
name = "tiny"
[data]
name = "vader"
max_rows = 300
held_out_rows = 10
[training]
steps = 2
batch_size = 4
max_length = 96
learning_rate = 5e-3
[rounds]
count = 2
[simulation]
clients = 2
"""
ARMS = """
rows = 20
set = ["method.rank=4"]
[[arm]]
name = "flora"
title = "FLoRA"
seeds = [0, 1]
[[arm]]
name = "alone"
title = "alone, mean of 2"
command = "train"
each_client = true
[[plot]]
file = "bytes.png"
x = "bytes"
log = true
"""


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SIMULATIONS / "study.py"), str(folder), "--out", str(folder / "out"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_study_gives_a_table_and_a_plot_and_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "arms.toml").write_text(ARMS)
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()
    }
    assert set(lines) >= {"base model", "FLoRA", "alone, mean of 2"}
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    losses = [row["figures"]["loss"] for row in rows if row["arm"] == "flora"]
    assert lines["FLoRA"][0] == "2"
    assert float(lines["FLoRA"][1].split(" ")[0]) == pytest.approx(sum(losses) / 2, abs=6e-4)
    alone = [json.loads((tmp_path / "out" / f"alone-s0-c0{i}.final.json").read_text())["final"]["loss"] for i in (0, 1)]
    assert next(row for row in rows if row["arm"] == "alone")["figures"]["loss"] == pytest.approx(sum(alone) / 2)
    report = json.loads((tmp_path / "out" / "flora-s0" / "report.json").read_text())
    assert next(row for row in rows if row["arm"] == "flora")["up"][-1] == sum(r["bytes_up"] for r in report["rounds"])
    assert (tmp_path / "out" / "bytes.png").read_bytes().startswith(b"\x89PNG")
    other = run(tmp_path, "--set", "rounds.count=3")
    assert (other.returncode, "flora-s0.settings has other settings" in other.stderr) == (1, True)
    again = run(tmp_path)
    assert again.stdout.strip() == table.strip(), "a second run runs nothing and shows the same table"


VARIANTS = """
[[variant]]
name = "equal"
title = "equal shares"
set = ["simulation.partition=iid"]
[[variant]]
name = "skew"
title = "skewed"
set = ["simulation.partition=label", "simulation.ranks=[4, 2]"]
"""


@pytest.mark.slow
def test_arms_in_one_process_give_the_bits_of_the_programs(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.replace("held_out_rows", "own_held_out = 0.2\nheld_out_rows"))
    arms = ARMS.replace("[0, 1]", '[0]\nvariants = ["skew"]').replace("each_client = true", 'variants = ["equal"]')
    (tmp_path / "arms.toml").write_text(arms + VARIANTS)
    programs, loop = run(tmp_path), run(tmp_path, "--one-process", "--out", str(tmp_path / "loop"))
    assert (programs.returncode, loop.returncode) == (0, 0), loop.stderr
    both = [json.loads((tmp_path / place / "results.json").read_text()) for place in ("out", "loop")]
    assert {row["arm"] for row in both[0]} == {"flora-skew", "alone-equal"}
    for one, other in zip(*both, strict=True):
        for key in ("arm", "base", "figures", "path", "own"):  # up and down of programs count their messages, too
            assert one[key] == other[key], (one["arm"], key)


def test_an_unknown_arm_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "arms.toml").write_text(ARMS)
    done = run(tmp_path, "--only", "floor")
    assert done.returncode == 1
    assert "floor" in done.stderr


def test_the_first_arm_that_fails_ends_the_study(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    broken = '[[arm]]\nname = "broken"\ntitle = "broken"\nset = ["data.name=/no/such/file.csv"]\n'
    (tmp_path / "arms.toml").write_text(ARMS.replace("[[arm]]", broken + "[[arm]]", 1))
    done = run(tmp_path)
    assert done.returncode == 1
    log = tmp_path / "out" / "broken-s0.log"
    assert f"broken-s0: ended with code 3; its log is {log}" in done.stderr
    assert "/no/such/file.csv" in done.stderr
    assert "Traceback" not in done.stderr
    assert "broken-s0" in done.stdout
    assert "flora-s0" not in done.stdout


def test_results_of_other_settings_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "arms.toml").write_text(ARMS)
    (tmp_path / "out").mkdir()
    for kind in ("json", "settings"):
        (tmp_path / "out" / f"flora-s0.{kind}").write_text("{}")
    done = run(tmp_path, "--only", "flora", "--seeds", "0", "--set", "rounds.count=50")
    assert done.returncode == 1
    assert "flora-s0.settings has other settings; name another --out" in done.stderr


@pytest.mark.parametrize("file", sorted(SIMULATIONS.glob("*/arms*.toml")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_arm_of_the_committed_studies_is_a_valid_configuration(file: Path) -> None:
    from fedtune.config import load

    about = tomllib.loads(file.read_text())
    variants = about.get("variant", [{"name": "", "set": []}])
    for arm in about["arm"]:
        for variant in (v for v in variants if v["name"] in arm.get("variants", [v["name"]])):
            load(file.parent / "config.toml", (*about.get("set", ()), *variant["set"], *arm.get("set", ())))
