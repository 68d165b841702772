"""Every method gives the same bits in the plain loop, over gRPC, in Flower's simulation and on a Flower deployment."""

from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

import loop_grid

from fedtune.methods import METHODS

KEEPING = "fedavg-lora by ternary"  # its clients keep between rounds what compression left out
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name != "flora" else []) for name in [*sorted(METHODS), KEEPING]]
WAYS = ["plain", pytest.param("secure", marks=pytest.mark.slow)]


def digests(flower, settings):
    return [closed["digest"] for closed in flower.report(Path(settings["run.folder"])).rounds]


def chosen(settings, name):
    if name in loop_grid.SEEDED:
        return settings | loop_grid.flattened({"method": loop_grid.options(name)})
    method, _, codec = name.partition(" by ")
    uplink = {"codec": codec, "density": 0.1, "feedback": True} if codec else {}
    return settings | {"method.name": method} | {f"method.uplink.{key}": value for key, value in uplink.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", [*sorted(METHODS), KEEPING, "fedkseed by sparse pro"])
def test_simulation(flower, app, settings, simulated, over_grpc, method):
    settings = chosen(settings, method)
    flower.run(app, "local", settings, nodes=2)
    assert digests(flower, settings) == simulated(settings, 2) == over_grpc(settings, 2)


def test_ranks_4_8_16_and_1_in_one_run(flower, app, settings, simulated, over_grpc):
    settings |= {"method.name": "flora", "simulation.ranks": "[4, 8, 16, 1]", "simulation.depths": "[0, 1, 2, 1]"}
    flower.run(app, "local", settings, nodes=4)
    assert flower.status("local") == "finished:completed"
    assert digests(flower, settings) == simulated(settings, 4) == over_grpc(settings, 4)
    events = flower.report(Path(settings["run.folder"])).events
    assert sorted(event["rank"] for event in events if event["event"] == "client_joined") == [1, 4, 8, 16]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ALL)
def test_deployment(request, way, method, flower, app, settings, simulated, over_grpc):
    """Real programs, offline; `secure` is TLS with authenticated SuperNodes. No process may be left: see `stop`."""
    request.getfixturevalue(way)
    settings = chosen(settings, method) | {"rounds.min_clients": 2}
    old = set(flower.folder.glob("*.pid"))
    flower.run(app, way, settings)
    assert digests(flower, settings) == simulated(settings, 2) == over_grpc(settings, 2)
    workers = [path.name.split(".")[0] for path in flower.folder.glob("*.pid") if path not in old]
    assert sorted(workers) == ["client-00", "client-01"]  # one worker a node served all rounds
    assert not [line for line in flower.processes().values() if "fedtune.flower.resident" in line]


@pytest.mark.slow
def test_flwr_run(flower, app, plain, settings, simulated):
    """`flwr run` instead of `fedtune flower run`."""
    settings |= {"rounds.min_clients": 2}
    flower.run_by_flwr(app, "plain", settings)
    assert flower.status("plain") == "finished:completed"
    assert digests(flower, settings) == simulated(settings, 2)
