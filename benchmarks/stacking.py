"""FLoRA's stacking: our fold and finish beside concatenation that grows client by client.

The peer's way is written from its description (FLoRA's published code, `fed_utils/model_aggregation.py` of
ATP-1010/FederatedLLM): for every client and every tensor the stack so far is concatenated with the new one, so C
clients move O(C^2) bytes. Both get the same updates in memory. The limit is one copy of the stack's bytes.

d = 2048, rank 16, 4 layers: 262 144 parameters (1.05 MB in float32) a client.

Past 256 such clients the coordinator holds exact sums instead of a stack (`benchmarks/memory.py`).
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _table import Row, interleave, options, report

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
    share = np.float32(1 / len(received))
    stack: dict[str, np.ndarray] = {}
    for update in received:
        for layer in LAYERS:
            for key, axis, array in (
                (key_a(layer), 0, update[key_a(layer)] * share),
                (key_b(layer), 1, update[key_b(layer)]),
            ):
                stack[key] = np.concatenate([stack[key], array], axis) if key in stack else array
    return stack


def copy(received: list[Tensors]) -> list[np.ndarray]:
    """Copies the bytes once."""
    return [array.copy() for update in received for array in update.values()]


def main() -> None:
    arguments = options(__doc__, one={"default": "", "help": argparse_help})
    if arguments.one:
        return print(_peak(*arguments.one.split(":")))
    counts = (10, 30, 100) if arguments.quick else (10, 30, 100, 200)
    rows, times = [], {}
    for count in counts:
        received = updates(count)
        variants = {
            "ours": lambda r=received: ours(r),
            "peer": lambda r=received: growing(r),
            "limit": lambda r=received: copy(r),
        }
        _same(received)
        times[count] = best = interleave(variants, 5 if count < 100 else 3)
        rows.append(Row(f"stack {count} clients", best["ours"], "s CPU", best["peer"], best["limit"]))
        del received, variants
    for count in counts[-2:]:
        peaks = [_peak_of(name, count) for name in ("ours", "growing", "copy")]
        rows.append(Row(f"memory beyond the {count} updates", peaks[0], "MB", *peaks[1:], note="peak RSS, own process"))
    ratio = times[counts[-1]]["ours"] / times[counts[-2]]["ours"]
    more = counts[-1] / counts[-2]
    rows.append(Row(f"{more:.3g} times the clients take", ratio, "times the time", limit=more, note="linear at 1"))
    report("Stacking (d = 2048, r = 16, 4 layers, float32)", rows, arguments.json)
    return None


argparse_help = "internal: WAY:CLIENTS, print the peak memory of one way"


def _same(received: list[Tensors]) -> None:
    """Both ways must give the same stack, but for the scale that ours folds in."""
    one, two = ours(received), growing(received)
    for name, array in one.items():
        if not np.allclose(array, two[name] * (2.0 if name.endswith("/A") else 1.0), rtol=1e-6):
            raise SystemExit(f"the two ways differ in {name}")


def _peak(way: str, count: str) -> float:
    """Runs one way; returns by how many MB the peak RSS rose."""
    received = updates(int(count))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: lowers the mark of the peak to what is held now
    before = _peak_rss()
    {"ours": ours, "growing": growing, "copy": copy}[way](received)
    return _peak_rss() - before


def _peak_rss() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1e3


def _peak_of(way: str, count: int) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--one", f"{way}:{count}"], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
