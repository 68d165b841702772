"""A round of FedKSeed costs a client 18,000 bytes at most each way, whatever it tunes and however large the model is.

K = 4096 and 200 steps over real gRPC. The coordinator's ledger has every serialized message and frame; a relay between
client and coordinator counts what passes through the socket, with all that HTTP/2 adds.
"""

import contextlib
import csv
import socket
import threading
from collections import Counter

import pytest
from fedtune_client.main import run

from fedtune.config.members import member_config
from fedtune.directions import cpu
from fedtune.testing import open_toy, toy_base
from fedtune.wire.v1 import coordinator_pb2 as pb

KB = 1000
MOST = 18 * KB
PARTS = {
    "all": {},
    "sparse": {"train": "sparse"},
    "lora": {"train": "lora", "rank": 2, "target_modules": ["all-linear"]},
}


class Relay:
    """Passes one connection on to `address` and counts its bytes."""

    def __init__(self, address):
        self.nbytes = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, args=(address,), daemon=True)]
        self._threads[0].start()

    def close(self):
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _accept(self, address):
        host, port = address.rsplit(":", 1)
        with contextlib.suppress(OSError):
            client = self._listener.accept()[0]
            server = socket.create_connection((host, int(port)))
            self._ends += [client, server]
            for name, source, sink in (("up", client, server), ("down", server, client)):
                self._threads.append(threading.Thread(target=self._pass, args=(name, source, sink), daemon=True))
                self._threads[-1].start()

    def _pass(self, name, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                self.nbytes[name] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def traffic(start, tmp_path, monkeypatch):
    """Plays two rounds with one client; returns the ledger's rows by round, direction and kind, and the relay's."""
    monkeypatch.setattr("fedtune.testing.reference", cpu)  # the same bits, sooner

    def play(name, layers, width, pro, **part):
        model = toy_base(tmp_path / f"{name}-model", layers=layers, width=width)
        method = {"name": "fedkseed", "seeds": 4096, "steps": 200, "learning_rate": 1e-5, "pro": pro, **part}
        sections = {"run": {"folder": str(tmp_path / name)}, "model": {"name": str(model)}}
        served = start(**sections, method=method, rounds={"count": 2, "min_clients": 1, "grace_s": 0.0})
        relay = Relay(served.address)
        try:
            own = member_config(served.config, 0, relay.address)
            assert run(own, 0, open_toy) == 0
            served.join()
        finally:
            relay.close()
        with (tmp_path / name / "ledger.csv").open() as file:
            rows = {(int(r["round"]), r["direction"], r["kind"]): int(r["bytes"]) for r in csv.DictReader(file)}
        return rows, relay.nbytes

    return play


@pytest.mark.parametrize("pro", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_round_costs_18_kilobytes_each_way_at_most(traffic, part, pro):
    """The first round counts how the client came in, too."""
    small, through = traffic("small", 2, 16, pro, **PARTS[part])
    large, _ = traffic("large", 12, 40, pro, **PARTS[part])
    assert small == large
    step = pb.Progress(round=2**31, step=200, steps=200, loss=0.1)
    progress = 200 * pb.ClientMessage(progress=step).ByteSize()  # one a second, but never more than one a step
    for number in (1, 2):
        down, up = (sum(small[number, way, kind] for kind in ("control", "payload")) for way in ("down", "up"))
        assert 12 * KB < down <= MOST
        assert 200 * 8 < up <= MOST - progress
    for way in ("down", "up"):
        messages = sum(nbytes for (_, direction, _), nbytes in small.items() if direction == way)
        assert messages < through[way] <= 2 * MOST
