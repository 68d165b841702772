"""A Flower grid whose nodes live in this process, and runs over it."""

import json
from types import SimpleNamespace

from flwr.app import Error, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedtune.base import open_base
from fedtune.config import Shared, parse
from fedtune.flower import roster
from fedtune.flower.messages import as_array, content, read_array, read_turn
from fedtune.flower.packets import pack, unpack
from fedtune.flower.record import RunFolder
from fedtune.flower.settings import read_identity
from fedtune.flower.station import Station
from fedtune.flower.strategy import FedtuneStrategy
from fedtune.testing import open_toy, toy_base
from fedtune.wire.v1 import coordinator_pb2 as pb


class LoopGrid(Grid):
    """Nodes in this process. `damage` maps a client to what becomes of its replies; replies come back last first."""

    def __init__(self, run_config, nodes, resident=True):
        self.run_config, self.resident = run_config, resident
        self.stations = {i + 1: self._station(i, nodes) for i in range(nodes)}
        self.names = {i + 1: f"client-{i:02d}" for i in range(nodes)}
        self.damage, self.replies, self.sent, self.number = {}, {}, [], 0
        self.kept = dict.fromkeys(self.stations, b"")

    def _station(self, index, nodes):
        node = {"partition-id": index, "num-partitions": nodes}
        return Station(read_identity(self.run_config, node), open_toy, resident=self.resident)

    def set_run(self, run):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError

    @property
    def run(self):
        return SimpleNamespace(run_id=1)

    def get_node_ids(self):
        return list(self.stations)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            self.number += 1
            message.metadata.__dict__["_message_id"] = str(self.number)
            self.sent.append(message)
            self.replies[str(self.number)] = self._reply(message)
            numbers.append(str(self.number))
        return numbers

    def pull_messages(self, message_ids):
        ready = [i for i in sorted(message_ids, reverse=True) if self.replies.get(i) is not None]
        return [self.replies.pop(i) for i in ready]

    def _reply(self, message):
        node, array = message.metadata.dst_node_id, read_array(message)
        if message.metadata.message_type == "query" and len(array.data) == 1:
            return Message(content(array), reply_to=message)
        damage = self.damage.get(self.names[node]) if message.metadata.message_type == "train" else None
        if damage == "silent":
            return None
        if damage == "raise":
            return Message(Error(2, "<class 'ValueError'>:<'no'>"), reply_to=message)
        station = self.stations[node]
        station.kept = self.kept[node]  # as Flower's context would carry it
        stype, data = station.answer(array.stype, read_turn(message), array.data)
        self.kept[node] = station.kept
        records = content(as_array(stype, data))
        if callable(damage):
            records = damage(stype, data)
        return Message(records, reply_to=message)


def hurry(monkeypatch):
    """Shortens what a real grid waits for, and gives messages made here an identity."""
    monkeypatch.setattr(roster, "PULL_S", 0.005)
    monkeypatch.setattr(roster, "AGAIN_S", 0.05)
    monkeypatch.setattr("fedtune.flower.client._stations", {})
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


KEEPING = "fedavg-lora by ternary"
"""A method whose clients keep something between rounds."""


SEEDED = {
    "fedkseed by adapter": {"train": "lora", "rank": 2, "optimizer": "sign"},
    "fedkseed by sparse pro": {"train": "sparse", "pro": True, "pool": "rademacher", "directions": 2, "clip_norm": 1.0},
    "fedkseed by conservative": {"optimizer": "conservative", "loss_clip": 10.0, "draws": "shared"},
    "fedkseed by krum": {"krum_byzantine": 1, "clip_norm": 50.0},
}
"""What FedKSeed may be told; Krum needs five nodes."""
FULL = "fedkseed by full size"
_FULL = {"seeds": 4096, "steps": 200, "train": "lora", "rank": 2, "pro": True}


def options(method):
    name, _, codec = method.partition(" by ")
    if name == "fedkseed":
        return {
            "name": name,
            "seeds": 128,
            "steps": 5,
            "learning_rate": 1e-4,
            "eps": 1e-2,
            **{FULL: _FULL, **SEEDED}.get(method, {}),
        }
    own = {} if name == "fedavg" else {"rank": 2}
    return {"name": name, **own, **({"uplink": {"codec": codec, "density": 0.1, "feedback": True}} if codec else {})}


def flattened(table, prefix=""):
    values = {}
    for key, value in table.items():
        values.update(flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return values


def make(folder, nodes=3, resident=True, method="flora", **rounds):
    """Makes configuration, grid, strategy, and the configuration as Flower has it."""
    model = toy_base(folder / "model")
    sections = {
        "run": {"folder": str(folder / "run"), "seed": 7},
        "model": {"name": str(model)},
        "method": options(method),
        "rounds": {"count": 3, "grace_s": 0.0, "deadline_s": 60.0, "attempts": 2, **rounds},
        "simulation": {"clients": nodes},
    }
    config = parse(sections)
    flat = flattened(sections)
    record = RunFolder(config.run.folder, Shared.of(config))
    strategy = FedtuneStrategy(config, open_base(model), record)
    return config, LoopGrid(flat, nodes, resident), strategy, flat


def events(config, name):
    lines = (config.run.folder / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == name]


def changed(edit):
    """Damage that edits the payload of an update and leaves a header that fits."""

    def damage(stype, data):
        packet = unpack(data)
        header = pb.SubmitHeader.FromString(packet.headers[0])
        payload = edit(header, bytes(packet.payload))
        return content(as_array(stype, pack([header.SerializeToString()], [payload])))

    return damage


def fixed(header, payload):
    from fedtune.wire.frames import sha256

    header.sha256, header.nbytes = sha256([payload]), len(payload)
    return payload
