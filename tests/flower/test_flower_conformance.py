"""Every method gives the same bits in the plain loop, over gRPC, in Flower's simulation and on a Flower deployment."""

from pathlib import Path

import pytest

from fedtune.methods import METHODS

PLAIN = pytest.param("plain", marks=[])
SECURE = pytest.param("secure", marks=pytest.mark.slow)


def digests(flower, settings):
    return [closed["digest"] for closed in flower.report(Path(settings["run.folder"])).rounds]


@pytest.fixture(params=sorted(METHODS))
def method(request, settings):
    settings["method.name"] = request.param
    return request.param


def test_simulation(flower, app, settings, simulated, over_grpc, method):
    flower.run(app, "local", settings, nodes=2)
    assert flower.status("local") == "finished:completed"
    assert digests(flower, settings) == simulated(settings, 2) == over_grpc(settings, 2)


def test_ranks_4_8_16_and_1_in_one_run(flower, app, settings, simulated):
    settings |= {"method.name": "flora", "simulation.ranks": "[4, 8, 16, 1]"}
    flower.run(app, "local", settings, nodes=4)
    assert digests(flower, settings) == simulated(settings, 4)
    adapter = Path(settings["run.folder"]) / "final" / "adapter_config.json"
    assert f'"r": {2 * (4 + 8 + 16 + 1)}' in adapter.read_text()


@pytest.mark.parametrize("name", [PLAIN, SECURE])
def test_deployment(request, name, flower, settings, simulated, over_grpc):
    deployment = request.getfixturevalue(name)
    settings |= {"rounds.min_clients": 2, "method.name": "flora"}
    old = set(flower.folder.glob("*.pid"))
    deployment.run(**settings)
    assert flower.status(name) == "finished:completed"
    assert digests(flower, settings) == simulated(settings, 2) == over_grpc(settings, 2)
    workers = {path.name.split(".")[0] for path in flower.folder.glob("*.pid") if path not in old}
    assert len(set(flower.folder.glob("*.pid")) - old) == 2  # one worker a node served all rounds
    assert workers == {"client-00", "client-01"}
    assert not [line for line in flower.processes().values() if "fedtune.flower.resident" in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "secure"])
@pytest.mark.parametrize("other", sorted(METHODS.keys() - {"flora"}))
def test_deployment_of_the_other_methods(request, name, other, flower, settings, simulated, over_grpc):
    settings |= {"rounds.min_clients": 2, "method.name": other}
    request.getfixturevalue(name).run(**settings)
    assert digests(flower, settings) == simulated(settings, 2) == over_grpc(settings, 2)
