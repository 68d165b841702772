"""The strategy's rules, over a grid of threads: quorum, order, damage, versions, refusals."""

import csv
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from loop_grid import FULL, KEEPING, SEEDED, LoopGrid, changed, events, fixed

from fedtune.base import open_base
from fedtune.config import Shared
from fedtune.config.unused import unused
from fedtune.directions import cpu
from fedtune.errors import ConfigError, FedtuneError, RoundError
from fedtune.flower.messages import as_array, content, read_array
from fedtune.flower.packets import LACK, UPDATE, pack, unpack
from fedtune.flower.record import RunFolder
from fedtune.flower.settings import read_identity
from fedtune.flower.station import Station
from fedtune.flower.strategy import FedtuneStrategy
from fedtune.method import Member
from fedtune.methods import METHODS
from fedtune.report.record import collect
from fedtune.rounds import Replica, Round, work
from fedtune.tensors import digest
from fedtune.testing import open_toy, toy_base
from fedtune.wire.v1 import coordinator_pb2 as pb


@pytest.mark.parametrize("method", [*sorted(METHODS), KEEPING, *sorted(SEEDED)])
@pytest.mark.parametrize("resident", [True, False])
def test_same_bits_as_the_plain_loop(made, simulated, method, resident):
    nodes = 5 if "krum" in method else 3
    config, grid, strategy, flat = made(method=method, resident=resident, nodes=nodes, min_clients=nodes)
    strategy.start(grid)
    want = simulated({k: v for k, v in flat.items() if k != "simulation.clients"}, nodes)
    assert len(set(want)) == 3
    assert [e["digest"] for e in events(config, "round_closed")] == want
    assert strategy.digest == want[-1]


@pytest.mark.parametrize("resident", [True, False])
def test_what_nodes_measured_decides_their_adapters(made, simulated, resident):
    config, _, strategy, flat = made(plan_s=2.9)
    flat |= {"client.measure": True}
    strategy.start(LoopGrid(flat, 3, resident))
    want = simulated({k: v for k, v in flat.items() if k != "simulation.clients"}, 3)
    assert [e["digest"] for e in events(config, "round_closed")] == want
    found = [(c.depth, c.rank, c.planned_s) for c in collect(config.run.folder).clients.values()]
    assert found == [(1, 2, 2.25), (1, 1, pytest.approx(2.7625)), (1, 1, pytest.approx(3.4))]


def test_the_run_folder_is_one_the_reports_read(made):
    config, grid, strategy, _ = made()
    result = strategy.start(grid)
    record = collect(config.run.folder)
    assert record.outcome == "completed"
    assert len(record.rounds) == 3
    assert record.clients["client-02"].examples == 16
    assert (config.run.folder / "final" / "adapter_model.safetensors").exists()
    assert result.train_metrics_clientapp[3]["num-examples"] == 39
    assert (config.run.folder / "ledger.csv").read_text().count("\n") == 1 + 3 * 3 * 4


def test_resident_nodes_get_only_what_is_new(made):
    sizes = {}
    for resident in (True, False):
        config, grid, strategy, _ = made(resident=resident, method="flora")
        strategy.start(grid)
        sizes[resident] = [e["bytes_down"] for e in events(config, "round_closed")]
        config.run.folder.rename(config.run.folder.with_name(f"was-{resident}"))
    assert sizes[True][1] < sizes[True][2] * 1.1
    assert sizes[False][2] > 1.5 * sizes[False][1]


@pytest.mark.parametrize("resident", [True, False])
def test_a_round_of_fedkseed_costs_18_kilobytes_each_way_at_most(made, monkeypatch, resident):
    """K = 4096, 200 steps, an adapter, Pro; what fedtune packs for Flower, headers and all."""
    monkeypatch.setattr("fedtune.testing.reference", cpu)  # the same bits, sooner
    config, grid, strategy, _ = made(method=FULL, resident=resident)
    strategy.start(grid)
    with (config.run.folder / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["bytes"] = int(row["bytes"])
    for number, client, way in {(r["round"], r["client"], r["direction"]) for r in rows}:
        total = sum(r["bytes"] for r in rows if (r["round"], r["client"], r["direction"]) == (number, client, way))
        assert 1600 < total <= 18_000
    assert len(rows) == 3 * 3 * 4


def test_keys_that_the_method_does_not_use_are_named(made, tmp_path, capsys):
    config, _, strategy, _ = made(method="fedkseed")
    strategy.summary()
    assert "not used" not in capsys.readouterr().err
    other = replace(
        config,
        training=replace(config.training, learning_rate=1e-2),
        run=replace(config.run, folder=tmp_path / "other"),
    )
    record = RunFolder(other.run.folder, Shared.of(other))
    FedtuneStrategy(other, open_base(Path(config.model.name)), record).summary()
    said = unused(other)
    assert said.startswith("training.learning_rate: not used by fedkseed")
    assert f"fedtune: note: {said}\n" in capsys.readouterr().err
    assert [event["said"] for event in events(other, "note")] == [said]


def test_nodes_at_the_same_version_share_one_array(made):
    _, grid, strategy, _ = made()
    strategy.start(grid)
    tasks = [read_array(m) for m in grid.sent if m.metadata.message_type == "train"]
    assert len({id(array.data) for array in tasks}) == 3
    assert len(tasks) == 9


@pytest.mark.parametrize(
    "damage",
    [
        "raise",
        changed(lambda h, p: fixed(h, struct.pack("<f", float("nan")) + p[4:])),
        changed(lambda h, p: fixed(h, struct.pack("<f", float("inf")) + p[4:])),
        changed(lambda h, p: fixed(h, p[:-4])),
        changed(lambda h, p: fixed(h, p + b"\0\0\0\0")),
        changed(lambda h, p: b"\0" + p[1:]),
        changed(lambda h, p: [setattr(h, "weight", 0), p][1]),
        changed(lambda h, p: [setattr(h, "weight", 2**40), p][1]),
        changed(lambda h, p: [setattr(h, "client_id", "client-00"), p][1]),
        changed(lambda h, p: [setattr(h, "state_digest", "0" * 64), p][1]),
        lambda stype, data: content(as_array(stype, data[:20])),
        lambda stype, data: content(as_array(stype, b"\x80pickle")),
        lambda stype, data: content(as_array("numpy.ndarray", data)),
        lambda stype, data: RecordDict({"arrays": ArrayRecord()}),
        lambda stype, data: content(
            as_array(LACK, pack([pb.FetchRequest(client_id="client-01", have=99).SerializeToString()]))
        ),
    ],
)
def test_a_bad_reply_is_refused_and_the_round_goes_on_at_quorum(made, damage):
    config, grid, strategy, _ = made(quorum=0.6)
    grid.damage["client-01"] = damage
    strategy.start(grid)
    closed = events(config, "round_closed")
    assert [e["clients"] for e in closed] == [["client-00", "client-02"]] * 3
    assert {e["client"] for e in events(config, "update_refused")} == {"client-01"}


@pytest.mark.parametrize("damage", ["raise", "silent"])
def test_below_quorum_the_run_fails_loudly(made, damage):
    config, grid, strategy, _ = made(deadline_s=1.0)
    grid.damage["client-01"] = damage
    with pytest.raises(RoundError, match=r"round 1: expected 3 updates, got 2 after 2 attempts"):
        strategy.start(grid)
    assert events(config, "run_finished")[-1]["outcome"] == "failed"
    assert not (config.run.folder / "final").exists()


def test_a_silent_node_is_not_waited_for_beyond_the_grace(made):
    config, grid, strategy, _ = made(quorum=0.6, deadline_s=3600.0)
    grid.damage["client-01"] = "silent"
    strategy.start(grid)
    assert len(events(config, "round_closed")) == 3


def test_too_few_nodes(made):
    _, grid, strategy, _ = made(min_clients=4, deadline_s=0.5)
    with pytest.raises(RoundError, match=r"nodes: expected 4 within 0.5 s, got 3"):
        strategy.start(grid)


@pytest.mark.parametrize("method", [*sorted(METHODS), KEEPING])
def test_a_worker_that_was_lost_is_brought_up_again(made, simulated, method):
    """A SuperNode's worker dies between rounds: the new one lacks a version, says so, and gives the same bits."""
    config, grid, strategy, flat = made(method=method)
    lost = []

    def lose(stype, data):
        if stype == UPDATE:
            lost.append(grid.stations[2])
            grid.stations[2] = grid._station(1, 3)
        return content(as_array(stype, data))

    grid.damage["client-01"] = lose
    strategy.start(grid)
    want = simulated({k: v for k, v in flat.items() if k != "simulation.clients"}, 3)
    assert [e["digest"] for e in events(config, "round_closed")] == want
    kinds = [read_array(m).stype for m in grid.sent if m.metadata.message_type == "train"]
    assert len(kinds) == 9 + 2


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_update_that_was_not_taken_leaves_no_trace_in_its_clients_memory(made, resident, lost):
    """What it had compressed away is there again for the next one, as if the client had not been asked."""
    config, grid, strategy, _ = made(method=KEEPING, resident=resident, quorum=0.6)
    turn = []

    def lose(stype, data):
        turn.append(stype)
        return content(as_array(stype, b"damaged" if len(turn) == lost + 1 else data))

    grid.damage["client-01"] = lose
    strategy.start(grid)
    assert [e["digest"] for e in events(config, "round_closed")] == without(config, "client-01", lost + 1)


def without(config, absent, number):
    """Digests of the plain loop, where one client is not asked in one round."""
    shared, names = Shared.of(config), [f"client-{i:02d}" for i in range(3)]
    held = {name: (open_toy(config, shared, i), Replica()) for i, name in enumerate(names)}
    state, found = shared.method.init(open_base(Path(config.model.name)), shared.seed), []
    for n in range(1, 4):
        current = Round(shared.method, state, n)
        for name in names:
            if (name, n) != (absent, number):
                member, (worker, replica) = shared.method.admit(Member(name)), held[name]
                job = worker.job(shared.method, member, n)
                reply = work(shared.method, current.task(member, replica.version), job, replica)
                current.add(member, b"".join(reply), worker.examples)
        state = current.close()
        found.append(digest(state))
    return found


def test_an_answer_that_was_lost_is_given_again(made):
    _, grid, strategy, _ = made(quorum=1.0)
    dropped = []

    def drop(stype, data):
        dropped.append(data)
        return content(as_array(stype, b"damaged")) if len(dropped) == 1 else content(as_array(stype, data))

    grid.damage["client-01"] = drop
    strategy.start(grid)
    assert dropped[0] == dropped[1]


def test_two_nodes_of_one_name(made):
    config, grid, strategy, _ = made(quorum=1.0)
    grid.stations[3] = grid._station(1, 3)
    strategy.start(grid)
    assert "client-01 twice" in events(config, "client_refused")[0]["reason"]
    assert events(config, "round_closed")[-1]["clients"] == ["client-00", "client-01"]


def test_other_weights_are_refused(made, tmp_path):
    config, grid, strategy, flat = made(quorum=0.6)
    other = toy_base(tmp_path / "other", seed=1)

    def open_other(config, shared, index, on_step):
        from fedtune.testing import ToyWorker

        return ToyWorker(other)

    identity = read_identity(flat, {"partition-id": 1, "num-partitions": 3})
    grid.stations[2] = Station(identity, open_other, resident=True)
    grid._reply = errors_as_flower_sends_them(grid._reply)
    strategy.start(grid)
    assert "base model: expected" in events(config, "update_refused")[0]["reason"]


def errors_as_flower_sends_them(reply):
    def safe(message):
        try:
            return reply(message)
        except FedtuneError as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)

    return safe


def test_wrapped_in_central_differential_privacy_it_is_refused_in_words(made):
    _, grid, strategy, _ = made()
    wrapped = DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 1.0, 3)
    with pytest.raises(ConfigError, match="could neither clip them nor add noise"):
        wrapped.configure_train(1, ArrayRecord(), ConfigRecord(), grid)


def test_what_reads_numbers_is_refused_by_flower(made):
    message = Message(content(as_array(UPDATE, b"fedtune1")), dst_node_id=1, message_type="train")
    reply = Message(content(as_array(UPDATE, b"fedtune1")), reply_to=message)
    with pytest.raises(TypeError, match=r"fedtune\.update\.v1"):
        read_array(reply).numpy()


def test_a_folder_with_a_run_is_refused(made):
    config, grid, strategy, _ = made()
    strategy.start(grid)
    with pytest.raises(ConfigError, match="a folder without a run"):
        RunFolder(config.run.folder, Shared.of(config))


def test_start_refuses_what_it_would_ignore(made):
    _, grid, strategy, _ = made()
    with pytest.raises(ConfigError):
        strategy.start(grid, train_config=ConfigRecord({"lr": 0.1}))


def test_client_app_in_process(made, tmp_path):
    """The ClientApp of a simulation answers a hello; a message of another strategy is refused in words."""
    from fedtune.flower.client import client_app
    from fedtune.flower.orders import hello, welcome

    config, _, _, flat = made()
    base = open_base(Path(config.model.name))
    app = client_app(open_toy)
    run_config = {**flat, "flower.resident": "off"}
    context = Context(1, 1, {"partition-id": 2, "num-partitions": 3}, RecordDict(), run_config)
    message = Message(content(hello(welcome(Shared.of(config), base.digest, "1"))), dst_node_id=1, message_type="query")
    reply = pb.Hello.FromString(unpack(read_array(app(message, context)).data).headers[0])
    assert reply.client_id == "client-02"
    other = Message(RecordDict({"arrays": ArrayRecord()}), dst_node_id=1, message_type="train")
    with pytest.raises(ValueError, match="another strategy"):
        app(other, context)


@pytest.mark.parametrize("name", ["fixedclipping_mod", "adaptiveclipping_mod", "LocalDpMod", "message_size_mod"])
def test_mods_that_read_numbers_fail_and_those_that_count_work(made, name):
    from flwr.clientapp import mod

    from fedtune.flower.client import client_app

    config, grid, strategy, flat = made(nodes=1, attempts=1)
    found = getattr(mod, name)
    app = client_app(open_toy, mods=[found(1.0, 1.0, 1.0, 0.1) if isinstance(found, type) else found])
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {**flat, "flower.resident": "off"})
    plain = grid._reply

    def reply(message):
        if message.metadata.message_type == "query":
            return plain(message)
        try:
            return app(message, context)
        except TypeError as error:
            return Message(Error(2, str(error)), reply_to=message)

    grid.resident = False
    grid.stations = {1: grid._station(0, 1)}
    grid._reply = reply
    if name == "message_size_mod":
        strategy.start(grid)
        assert len(events(config, "round_closed")) == 3
    else:
        with pytest.raises(RoundError, match="round 1: expected 1 updates, got 0"):
            strategy.start(grid)


def test_only_flowers_public_packages_are_imported():
    import ast

    import fedtune.flower

    public = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
    for file in Path(fedtune.flower.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(n in public or n == "flwr.serverapp.strategy" for n in names if n.split(".")[0] == "flwr")


def test_what_a_method_keeps_between_rounds_travels_in_flowers_context(made, monkeypatch):
    """Each turn is played by a process that has never seen the node before."""
    from fedtune.flower import client

    _, grid, strategy, flat = made(nodes=1)
    seen = []

    class Remembering:
        def __init__(self, worker):
            self.worker = worker

        def __getattr__(self, name):
            return getattr(self.worker, name)

        def job(self, method, member, number):
            job = self.worker.job(method, member, number)
            inner = job.train_fresh

            def train(spec):
                seen.append(float(job.memory["count"][0]) if "count" in job.memory else 0.0)
                job.memory["count"] = np.array([seen[-1] + 1], np.float32)
                return inner(spec)

            job.train_fresh = train
            return job

    monkeypatch.setattr(client, "_place", lambda _: [])
    app = client.client_app(lambda *args: Remembering(open_toy(*args)))
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 1}, RecordDict(), {**flat, "flower.resident": "off"})

    def reply(message):
        client._stations.clear()
        return app(message, context)

    grid._reply = reply
    strategy.start(grid)
    assert seen == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("initialised", "resident"), [(True, False), (False, True)])
def test_only_an_actor_of_ray_does_without_a_worker(made, monkeypatch, initialised, resident):
    from fedtune.flower.client import _is_resident

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: initialised))
    assert _is_resident(Context(1, 1, {}, RecordDict(), {})) is resident
