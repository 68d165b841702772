"""Memory of a client that tunes SmolLM2-135M with FedKSeed, beside inference and beside LoRA training.

Each is a process of its own on one thread: it opens a worker on rows of 64 tokens, works, and says how much memory of
its own it held at most (`anon`: what is neither mapped from a file nor shared, sampled every 10 ms), in MiB. Weights
mapped from the base's file are counted apart (`file`): every process on a machine shares them, and the system takes
them back when it must.

The second table is what a step takes (process CPU time): of a client with little memory, more and more, since it takes
all earlier steps of its turn again.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from _table import Row, options, report

WAYS = ("inference", "fedkseed", "fedkseed-low", "fedkseed-lora", "lora")


def sampled(done: threading.Event, most: dict[str, float]) -> None:
    """Keeps the largest RssAnon and RssFile of this process, in KiB."""
    while not done.wait(0.01):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                most[name] = max(most.get(name, 0), int(value.split()[0]))


def opened(way: str, model: str, steps: int, on_step: Callable[..., None]) -> Any:
    """Opens a worker on rows of 64 tokens."""
    from fedtune.config import Shared, parse
    from fedtune.training.worker import TorchWorker

    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.csv"
        rows.write_text("text\n" + "".join(f"{n} " + "some words that fill a row " * 12 + "\n" for n in range(20)))
        config = parse({
            "model": {"name": model}, "data": {"name": str(rows), "text": "text"},
            "training": {"batch_size": 1, "max_length": 64, "steps": steps, "packing": False},
            "client": {"low_memory": way == "fedkseed-low"},
        })  # fmt: skip
        return TorchWorker.open(config, Shared.of(config), on_step=on_step)


def turn_of(way: str, model: str, steps: int, worker: Any) -> Callable[[], object]:
    """Prepares what is measured: forward passes, or one turn of a client."""
    import torch

    from fedtune.base import open_base
    from fedtune.method import Member
    from fedtune.methods import FedAvgLoRA, FedKSeed
    from fedtune.rounds import Replica, Round
    from fedtune.rounds import work as turn
    from fedtune.training.models import resolve_model

    if way == "inference":
        ids = torch.arange(64)[None]
        return torch.inference_mode()(lambda: all(worker.base.model(input_ids=ids).logits.any() for _ in range(steps)))
    method: FedKSeed | FedAvgLoRA = FedAvgLoRA(rank=16)
    if way.startswith("fedkseed"):
        method = FedKSeed(steps=steps, learning_rate=1e-6, train="lora" if way == "fedkseed-lora" else "all")
    member = method.admit(Member("a"))
    task = Round(method, method.init(open_base(resolve_model(model)), 1), 1).task(member)
    return lambda: b"".join(turn(method, task, worker.job(method, member, 1), Replica()))


def work(way: str, model: str, steps: int) -> dict[str, float]:
    """Works one way and returns what it took: KiB, and milliseconds of early and of late steps."""
    ends: list[float] = []
    run = turn_of(way, model, steps, opened(way, model, steps, lambda *_: ends.append(time.process_time())))
    most: dict[str, float] = {}
    done = threading.Event()
    watch = threading.Thread(target=sampled, args=(done, most))
    watch.start()
    run()
    done.set()
    watch.join()
    took = [1e3 * (after - before) for before, after in pairwise(ends)] or [0.0]
    return {**most, "early": statistics.median(took[:4]), "late": statistics.median(took[-4:])}


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "--work":
        print(json.dumps(work(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
        return
    arguments = options(__doc__)
    model = "tiny" if arguments.quick else "smollm2-135m"
    steps, held = (8, {}) if arguments.quick else (40, {})
    for way in WAYS:
        command = [sys.executable, __file__, "--work", way, model, str(steps)]
        said = subprocess.run(command, check=True, capture_output=True, text=True)
        held[way] = json.loads(said.stdout.splitlines()[-1])
    rows = [
        Row(
            way, most["RssAnon"] / 1024, "MiB", held["lora"]["RssAnon"] / 1024, held["inference"]["RssAnon"] / 1024,
            f"file: {most['RssFile'] / 1024:.0f} MiB; peer: LoRA training, limit: inference",
        )
        for way, most in held.items()
    ]  # fmt: skip
    report(f"Memory of a client, {model}, one sequence of 64 tokens", rows, arguments.json)
    times = [
        Row(
            f"{way}, {when} steps of {steps}", held[way][when], "ms", limit=held["fedkseed"][when],
            note="limit: with a copy of the weights",
        )
        for way in ("fedkseed", "fedkseed-low")
        for when in ("early", "late")
    ]  # fmt: skip
    report("A step", times)


if __name__ == "__main__":
    main()
