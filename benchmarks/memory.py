"""What the coordinator holds while a round of FLoRA folds, for 10 to 1,000 clients.

Updates arrive one by one as bytes, are decoded, folded and dropped. The peer keeps every client's factors to the end of
the round, as a stack needs. The limit is two int64 digits for every entry of the products: factors that outgrow it
become such sums, so twice the limit is the most there can be. d = 576 (that of a 135M model), rank 16, 4 layers: 295 KB
a client.
"""

import os
import subprocess
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _table import Row, options, report
from stacking import _peak_rss

from fedtune.method import BaseModel, Member
from fedtune.methods import FLoRA
from fedtune.rounds import Round
from fedtune.tensors import Manifest, TensorSpec

WIDTH, RANK, LAYERS = 576, 16, 4
SPECS = tuple(TensorSpec(f"layers.{i}.q_proj.weight", (WIDTH, WIDTH), "float32") for i in range(LAYERS))
BASE = BaseModel("wide", Manifest(SPECS), "")


def main() -> None:
    arguments = options(__doc__, one={"default": "", "help": "internal: WAY:CLIENTS, print peak memory and CPU time"})
    if arguments.one:
        way, count = arguments.one.split(":")
        return print(*fold(way == "keep", int(count)))
    rows = []
    limit = LAYERS * WIDTH * WIDTH * 16 / 1e6
    for count in (10, 100) if arguments.quick else (10, 100, 300, 1000):
        ours, peer = apart("sum", count), apart("keep", count)
        rows.append(Row(f"{count} clients: memory", ours[0], "MB", peer[0], limit, "beyond the start; own process"))
        rows.append(Row(f"{count} clients: time to fold", ours[1], "s CPU", peer[1], note="with decoding"))
    report(f"Memory of a round (d = {WIDTH}, r = {RANK}, {LAYERS} layers, float32)", rows, arguments.json)
    return None


def fold(keep: bool, count: int) -> tuple[float, float]:
    """Folds one round; returns MB beyond the start, and seconds of CPU."""
    method = FLoRA(rank=RANK, target_modules=("q_proj",))
    if keep:
        method = FLoRA(rank=RANK, target_modules=("q_proj",), krum_byzantine=1)  # needs everybody's factors
    current = Round(method, method.init(BASE, 0), 1)
    member = method.admit(Member("c"))
    manifest = method.template(current.state, member)
    rng = np.random.Generator(np.random.Philox(key=0))
    update = {s.name: rng.normal(0, 0.05, s.shape).astype(np.float32) for s in manifest.specs}
    payload = b"".join(bytes(part) for part in method.encode(update, manifest))
    before, began = _peak_rss(), time.process_time()
    for i in range(count):
        current.add(method.admit(Member(f"c{i:04d}")), bytearray(payload), 1 + i % 7)
    return _peak_rss() - before, time.process_time() - began


def apart(way: str, count: int) -> tuple[float, ...]:
    """Runs `fold` in a process of its own."""
    command = [sys.executable, __file__, "--one", f"{way}:{count}"]
    return tuple(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


if __name__ == "__main__":
    main()
