"""`fedtune status` reads a run folder, or asks a coordinator."""

import json


def test_a_run_folder_is_shown(fedtune, run_folder):
    ended = fedtune("status", run_folder)
    assert ended.code == 0
    assert "completed; 3.0 kB up, 9.0 kB down, 5.0 s" in ended.out
    assert "2.5000" in ended.out  # (30 * 2 + 10 * 4) / 40
    assert "ann" in ended.out
    assert "111111111111" in ended.out


def test_json_is_the_report(fedtune, run_folder):
    report = json.loads(fedtune("status", run_folder, "--json").out)
    assert report["outcome"] == "completed"
    assert report["refused_updates"] == 1
    assert [r["train_loss"] for r in report["rounds"]] == [2.5, 1.25]
    assert report["clients"][0] == {
        "id": "ann",
        "rank": 8,
        "alpha": 16.0,
        "depth": 0,
        "examples": 30,
        "updates": 2,
        "planned_s": 0.0,
    }


def test_steps_left_out_are_in_the_report_and_shown(fedtune, run_folder):
    assert "skipped" not in fedtune("status", run_folder).out
    path = run_folder / "rounds" / "0002" / "round.json"
    raw = json.loads(path.read_text())
    raw["metrics"]["ann"]["skipped"], raw["metrics"]["bob"]["skipped"] = 70.0, 7.0
    path.write_text(json.dumps(raw))
    report = json.loads(fedtune("status", run_folder, "--json").out)
    assert [r["skipped"] for r in report["rounds"]] == [0, 77]
    shown = fedtune("status", run_folder).out
    assert "skipped" in shown
    assert " 77 " in shown


def test_an_empty_folder_is_no_run(fedtune, tmp_path):
    ended = fedtune("status", tmp_path)
    assert ended.code == 8
    assert "Has the run been started?" in ended.err


def test_a_damaged_record_is_named(fedtune, run_folder):
    (run_folder / "rounds" / "0002" / "round.json").write_text('{"round": 2')
    ended = fedtune("status", run_folder)
    assert ended.code == 8
    assert "0002/round.json" in ended.err


def test_nobody_at_an_address_is_unavailable(fedtune):
    ended = fedtune("status", "127.0.0.1:9")
    assert ended.code == 9
    assert "127.0.0.1:9" in ended.err


def test_another_machine_without_tls_is_refused(fedtune):
    assert fedtune("status", "192.0.2.1:9").code == 2


def test_neither_folder_nor_address(fedtune):
    assert fedtune("status", "nowhere").code == 2
