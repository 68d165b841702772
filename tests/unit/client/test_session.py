"""The client against a coordinator that misbehaves on purpose."""

import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import fedtune_client.session as session_module
import grpc
import pytest
from fedtune_client.log import Log
from fedtune_client.main import _alone, run
from fedtune_client.outbox import Outbox

from fedtune.base import open_base
from fedtune.errors import ModelError
from fedtune.method import Member
from fedtune.simulation import simulate
from fedtune.testing import ToyWorker, toy_base
from fedtune.wire.v1 import coordinator_pb2 as pb


def at(config, coordinator):
    return replace(config, client=replace(config.client, address=f"127.0.0.1:{coordinator.port}"))


def events(config):
    lines = (config.client.folder / "client.log").read_text().splitlines()
    return [json.loads(line) for line in lines]


def names(config):
    return [line["event"] for line in events(config)]


def outbox(config):
    return sorted(p.name for p in (config.client.folder / "outbox").iterdir())


def oracle(config, rounds):
    folder = Path(config.model.name)
    return simulate(config.method, open_base(folder), [Member("anna")], lambda m: ToyWorker(folder), rounds, 0)


def test_a_run_ends_in_the_state_of_the_simulation(config, coordinator, toy):
    assert run(at(config, coordinator), open_worker=toy().open) == 0
    assert coordinator.digests == [r.digest for r in oracle(config, 2).rounds]
    assert outbox(config) == []
    assert coordinator.submits[0].weight == 10
    assert coordinator.submits[0].metrics["steps"] == 1.0
    assert coordinator.readies[0].examples == 10


def test_an_unavailable_coordinator_gets_the_same_bytes_again(config, coordinator, toy):
    coordinator.answers = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED]
    worker = toy()
    assert run(at(config, coordinator), open_worker=worker.open) == 0
    assert [s.sha256 for s in coordinator.submits[:3]] == [coordinator.submits[0].sha256] * 3
    assert worker.trainings == 2


def test_late_is_forgotten_and_the_next_round_goes_on(config, coordinator, toy):
    coordinator.answers = [pb.SUBMIT_STATUS_LATE]
    assert run(at(config, coordinator), open_worker=toy().open) == 0
    assert "update_late" in names(config)
    assert len(coordinator.submits) == 2


def test_an_update_that_another_one_took_the_place_of_does_not_end_the_client(config, coordinator, toy):
    def other_was_there():
        coordinator.advance()
        return grpc.StatusCode.ALREADY_EXISTS

    coordinator.answers = [other_was_there]
    assert run(at(config, coordinator), open_worker=toy().open) == 0


@pytest.mark.parametrize(
    ("code", "exit_code"), [(grpc.StatusCode.INVALID_ARGUMENT, 5), (grpc.StatusCode.FAILED_PRECONDITION, 6)]
)
def test_a_refused_update_ends_the_client(config, coordinator, toy, code, exit_code, capsys):
    coordinator.answers = [code]
    assert run(at(config, coordinator), open_worker=toy().open) == exit_code
    assert "anna: error: told to" in capsys.readouterr().err


def test_a_refused_update_is_not_sent_again_after_a_restart(config, coordinator, toy):
    coordinator.answers = [grpc.StatusCode.INVALID_ARGUMENT]
    run(at(config, coordinator), open_worker=toy().open)
    assert outbox(config) == []


def test_another_base_model_is_refused_before_ready(config, coordinator, toy, tmp_path, capsys):
    worker = toy(folder=toy_base(tmp_path / "other", seed=1))
    assert run(at(config, coordinator), open_worker=worker.open) == ModelError.exit_code == 4
    assert coordinator.readies == []
    assert "base model: digest: expected" in capsys.readouterr().err


def test_a_client_may_keep_its_copy_of_the_model_in_another_folder(config, coordinator, toy, tmp_path):
    own = toy_base(tmp_path / "elsewhere")
    shutil.rmtree(config.model.name)  # where the coordinator has it is nothing to this client
    asked = []

    def open_worker(config, shared, index, on_step):
        asked.append(shared.model)
        return ToyWorker(Path(shared.model.name), shared.seed)

    mine = replace(at(config, coordinator), model=replace(config.model, name=str(own)))
    assert run(mine, open_worker=open_worker) == 0
    assert [model.name for model in asked] == [str(own)]
    assert coordinator.readies[0].settings_digest == coordinator.shared.digest()


def test_a_copy_that_is_not_there_is_named(config, coordinator, toy, tmp_path, capsys):
    mine = replace(at(config, coordinator), model=replace(config.model, name=str(tmp_path / "mistyped")))
    assert run(mine, open_worker=toy().open) == 4
    assert coordinator.readies == []
    said = capsys.readouterr().err
    assert f"got {str(tmp_path / 'mistyped')!r}" in said or f"got {tmp_path / 'mistyped'}" in said
    assert f"the run's model is {config.model.name}" in said


def test_a_copy_with_other_weights_is_refused(config, coordinator, tmp_path, capsys):
    other = toy_base(tmp_path / "other", seed=1)
    mine = replace(at(config, coordinator), model=replace(config.model, name=str(other)))
    code = run(mine, open_worker=lambda config, shared, *_: ToyWorker(Path(shared.model.name), shared.seed))
    assert code == 4
    assert coordinator.readies == []
    assert "this client's own model.name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("welcome", "says"),
    [
        ({"protocol_major": 2}, "protocol version: expected 1, got 2"),
        ({"features": []}, "raw-v1"),
        ({"settings_digest": "0" * 64}, "settings digest"),
        ({"settings_json": '{"method":{"name":"flora","novel":1}}'}, "novel"),
        ({"settings_json": "nonsense"}, "same version of fedtune"),
    ],
)
def test_terms_this_program_cannot_keep_are_refused(config, coordinator, toy, welcome, says, capsys):
    coordinator.welcome = welcome
    worker = toy()
    assert run(at(config, coordinator), open_worker=worker.open) == 6
    assert says in capsys.readouterr().err
    assert worker.workers == []


def test_a_replica_that_differs_is_fetched_anew(config, coordinator, toy):
    coordinator.broken = 1
    worker = toy()
    assert run(at(config, coordinator), open_worker=worker.open) == 0
    assert coordinator.fetches == [-1, -1, 0]
    assert "replica_differs" in names(config)
    assert coordinator.digests == [r.digest for r in oracle(config, 2).rounds]


def test_a_replica_that_differs_twice_ends_the_client(config, coordinator, toy, capsys):
    coordinator.broken = 2
    assert run(at(config, coordinator), open_worker=toy().open) == 5
    assert "state digest: expected" in capsys.readouterr().err
    assert coordinator.submits == []


def test_a_second_attempt_at_a_round_starts_from_the_base_and_gives_the_same_bytes(config, coordinator, toy):
    coordinator.retries, coordinator.pause_s = 1, 0.3
    assert run(at(config, coordinator), open_worker=toy().open) == 0
    assert coordinator.fetches[:2] == [-1, -1]
    assert coordinator.submits[0].sha256 == coordinator.submits[1].sha256
    assert [s.task_id[0] for s in coordinator.submits[:2]] == ["0", "b"]


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_what_came_too_late_for_one_attempt_is_sent_for_the_next(config, coordinator, toy, pause_s):
    """Whether the new task overtakes the answer to the old one or not."""
    coordinator.answers, coordinator.retries, coordinator.pause_s = [pb.SUBMIT_STATUS_LATE], 1, pause_s
    coordinator.answer_s = 0.2
    made = toy()
    assert run(at(config, coordinator), open_worker=made.open) == 0
    assert made.trainings == 2
    assert [s.task_id[0] for s in coordinator.submits] == ["0", "b", "0"]
    assert coordinator.digests == [r.digest for r in oracle(config, 2).rounds]


def test_a_newer_round_makes_the_work_in_hand_stale(config, coordinator, toy):
    made = toy(delay=lambda: at_step())
    steps = []

    def at_step():
        if made.trainings == 1:
            coordinator.advance()
            until(lambda: steps.append(1) or _abandoned(made.on_step))
        made.on_step(1, 1, 0.5)

    assert run(at(config, coordinator), open_worker=made.open) == 0
    assert [s.task_id for s in coordinator.submits] == [f"{2:032x}"]
    assert "turn_abandoned" in names(config)
    assert coordinator.fetches == [-1, -1]


def _abandoned(on_step):
    on_step(1, 10, 0.5)
    return False


def until(condition, limit_s=10.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_progress_is_reported_about_once_a_second(config, coordinator, toy, monkeypatch):
    monkeypatch.setattr(session_module, "PROGRESS_S", 60.0)
    made = toy(delay=lambda: [made.on_step(i, 100, 0.5) for i in range(1, 101)])
    assert run(at(config, coordinator), open_worker=made.open) == 0
    until(lambda: len(coordinator.progress) == 4)
    assert [(p.round, p.step) for p in coordinator.progress] == [(1, 1), (1, 100), (2, 1), (2, 100)]


def test_a_long_turn_says_now_and_then_how_far_it_is(config, coordinator, toy, monkeypatch, capsys):
    monkeypatch.setattr(session_module, "SAY_S", 0.05)
    made = toy(delay=lambda: [(made.on_step(i, 10, 0.5), time.sleep(0.06)) for i in range(1, 11)])
    assert run(at(config, coordinator), open_worker=made.open) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "step" in line]
    assert said[0] == "anna: round 1: step 2/10, loss 0.5000"
    assert 2 * 3 <= len(said) <= 2 * 9
    assert names(config).count("step") == len(said)


def test_a_lost_connection_is_dialled_again_and_said_once(config, coordinator, toy, capsys):
    coordinator.stop()
    worker = toy()
    exits = []
    client = threading.Thread(target=lambda: exits.append(run(at(config, coordinator), open_worker=worker.open)))
    client.start()
    time.sleep(1.0)
    coordinator.start()
    client.join(20)
    assert exits == [0]
    assert names(config).count("disconnected") == 1
    assert capsys.readouterr().err.count("trying until there is one") == 1


def test_a_failed_run_gives_its_exit_code(config, coordinator, toy, capsys):
    coordinator.outcome = pb.OUTCOME_FAILED
    assert run(at(config, coordinator), open_worker=toy().open) == 7
    assert "told to" in capsys.readouterr().err


def test_an_update_that_is_not_finite_is_never_sent(config, coordinator, toy, capsys):
    def spoil():
        _, factors = made.workers[0].attached
        next(iter(factors.values()))[0, 0] = float("nan")

    made = toy(delay=spoil)
    assert run(at(config, coordinator), open_worker=made.open) == 5
    assert coordinator.submits == []
    assert "finite" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_for_people_and_a_traceback_in_the_log(config, coordinator, toy, capsys):
    def fall():
        raise RuntimeError("the graphics card is on fire")

    assert run(at(config, coordinator), open_worker=toy(delay=fall).open) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert "on fire" in events(config)[-1]["traceback"]


def test_a_full_disk_ends_the_client_with_its_code(config, coordinator, toy, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune_client.outbox.os.fsync", full)
    assert run(at(config, coordinator), open_worker=toy().open) == 8
    assert coordinator.submits == []


def test_a_folder_is_for_one_client(config, coordinator, toy, capsys):
    log = Log(config.client.folder, "other")
    with _alone(config):
        assert run(at(config, coordinator), open_worker=toy().open) == 2
    log.close()
    assert "Another client" in capsys.readouterr().err


def test_an_update_found_on_disk_is_sent_instead_of_trained(config, coordinator, toy, monkeypatch):
    with monkeypatch.context() as patch:  # as if the client had been killed before it could read the answer
        patch.setattr(Outbox, "remove", lambda self, update: None)
        coordinator.answers = [grpc.StatusCode.INVALID_ARGUMENT]
        run(at(config, coordinator), open_worker=toy().open)
    assert outbox(config) == ["000001.bin", "000001.json"]
    second = toy()
    assert run(at(config, coordinator), open_worker=second.open) == 0
    assert second.trainings == 1
    assert coordinator.submits[0].sha256 == coordinator.submits[1].sha256
    assert coordinator.digests == [r.digest for r in oracle(config, 2).rounds]


def test_a_large_broadcast_goes_through_a_file(config, coordinator, toy, monkeypatch):
    monkeypatch.setattr("fedtune_client.transfer.IN_MEMORY", 0)
    assert run(at(config, coordinator), open_worker=toy().open) == 0
    assert coordinator.digests == [r.digest for r in oracle(config, 2).rounds]
    assert sorted(p.name for p in config.client.folder.iterdir()) == ["client.log", "lock", "outbox"]


def test_a_broadcast_that_does_not_fit_on_the_disk_ends_the_client(config, coordinator, toy, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune_client.transfer.IN_MEMORY", 0)
    monkeypatch.setattr("fedtune_client.transfer.os.posix_fallocate", full)
    assert run(at(config, coordinator), open_worker=toy().open) == 8
