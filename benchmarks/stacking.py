"""FLoRA's stacking: our fold and finish beside concatenation that grows client by client.

The peer's way is written from its description (FLoRA's published code, `fed_utils/model_aggregation.py` of
ATP-1010/FederatedLLM): client by client, A is multiplied by the client's share, and `torch.cat` joins each tensor to
the stack so far, so C clients move O(C^2) bytes. Both get the same updates in memory. The limit is one copy of the
stack's bytes.

d = 2048, rank 16, 4 layers: 262 144 parameters (1.05 MB in float32) a client.

What new memory costs depends on the allocator, so each way is timed twice:

- `coordinator`: in a process of its own with the coordinator's allocator (`fedtune.allocator`), the first time. It
  gives blocks of 1 MiB back when they are freed, so that every block costs page faults anew.
- `warm heap`: all ways in turn in one process with the C library's defaults, the best of several times. glibc has by
  then raised the size from which it gives blocks back to 32 MB, so the growing stack finds its memory again.

Past 256 such clients the coordinator holds exact sums instead of a stack (`benchmarks/memory.py`).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _table import Row, interleave, options, report

from fedtune.allocator import share_arenas
from fedtune.lora import key_a, key_b
from fedtune.method import BaseModel, Member
from fedtune.methods import FLoRA
from fedtune.tensors import Manifest, Tensors, TensorSpec

WIDTH, RANK = 2048, 16
LAYERS = [f"layers.0.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
METHOD = FLoRA(rank=RANK, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
BASE = BaseModel("wide", Manifest(tuple(TensorSpec(f"{n}.weight", (WIDTH, WIDTH), "float32") for n in LAYERS)), "")


def updates(count: int) -> list[Tensors]:
    """Draws one update and gives every client a copy of its own."""
    rng = np.random.Generator(np.random.Philox(key=0))
    manifest = METHOD.template(METHOD.init(BASE, 0), Member("c", RANK, 2.0 * RANK))
    one = {s.name: rng.normal(0, 0.1, s.shape).astype(np.float32) for s in manifest.specs}
    return [{name: array.copy() for name, array in one.items()} for _ in range(count)]


def ours(received: list[Tensors]) -> Tensors:
    """Folds all updates and closes the round."""
    total = None
    for i, update in enumerate(received):
        total = METHOD.fold(total, update, METHOD.admit(Member(f"c{i:04d}")), 1)
    state = METHOD.finish(METHOD.init(BASE, 0), total, len(received))
    return {name[7:]: array for name, array in state.items() if name.startswith("000001")}


def growing(received: list[Tensors]) -> Tensors:
    """Concatenates each update to what is there."""
    import torch

    torch.set_num_threads(1)
    shares = torch.full((len(received),), 1 / len(received))
    stack: dict[str, torch.Tensor] = {}
    for share, update in zip(shares, received, strict=True):
        own = {key: torch.from_numpy(array) for key, array in update.items()}
        for layer in LAYERS:
            a, b = key_a(layer), key_b(layer)
            own[a] = own[a] * share
            stack[a] = torch.cat([stack[a], own[a]], dim=0) if a in stack else own[a]
            stack[b] = torch.cat([stack[b], own[b]], dim=1) if b in stack else own[b]
    return {key: tensor.numpy() for key, tensor in stack.items()}


def copy(received: list[Tensors]) -> list[np.ndarray]:
    """Copies the bytes once."""
    return [array.copy() for update in received for array in update.values()]


WAYS = {"ours": ours, "peer": growing, "limit": copy}


def main() -> None:
    arguments = options(__doc__, one={"default": "", "help": argparse_help})
    if arguments.one:
        way, count = arguments.one.split(":")
        return print(*_once(way, int(count)))
    counts = (10, 100) if arguments.quick else (10, 30, 100, 200)
    rows, times = [], {}
    for count in counts:
        runs = [{way: _process(way, count) for way in WAYS} for _ in range(3)]
        times[count] = best = {way: min(run[way][0] for run in runs) for way in WAYS}
        rows.append(Row(f"{count} clients, coordinator", best["ours"], "s CPU", best["peer"], best["limit"]))
        rows.append(_warm(count))
        peaks = {way: min(run[way][1] for run in runs) for way in WAYS}
        rows.append(Row(f"{count} clients, memory beyond the updates", peaks["ours"], "MB", *list(peaks.values())[1:]))
    ratio = times[counts[-1]]["ours"] / times[counts[-2]]["ours"]
    more = counts[-1] / counts[-2]
    rows.append(Row(f"{more:.3g} times the clients take", ratio, "times the time", limit=more, note="linear at 1"))
    report("Stacking (d = 2048, r = 16, 4 layers, float32)", rows, arguments.json)
    return None


def _warm(count: int) -> Row:
    received = updates(count)
    _same(received)
    best = interleave({way: lambda w=work: w(received) for way, work in WAYS.items()}, 3)
    return Row(f"{count} clients, warm heap", best["ours"], "s CPU", best["peer"], best["limit"])


argparse_help = "internal: WAY:CLIENTS, print time and peak memory of one way"


def _same(received: list[Tensors]) -> None:
    """Both ways must give the same stack, but for the scale that ours folds in."""
    one, two = ours(received), growing(received)
    for name, array in one.items():
        if not np.allclose(array, two[name] * (2.0 if name.endswith("/A") else 1.0), rtol=1e-6):
            raise SystemExit(f"the two ways differ in {name}")


def _once(way: str, count: int) -> tuple[float, float]:
    """Runs one way as a coordinator would; returns its CPU seconds and by how many MB the peak RSS rose."""
    share_arenas()
    received = updates(count)
    if way == "peer":
        growing(received[:1])  # loads torch
    Path("/proc/self/clear_refs").write_text("5")  # Linux: lowers the mark of the peak to what is held now
    before, began = _peak_rss(), time.process_time()
    made = WAYS[way](received)
    seconds = time.process_time() - began
    del made
    return seconds, _peak_rss() - before


def _peak_rss() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1e3


def _process(way: str, count: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--one", f"{way}:{count}"]
    seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), float(peak)


if __name__ == "__main__":
    main()
