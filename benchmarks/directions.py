"""FedKSeed's rebuild and its zeroth-order step: ours beside the authors' loop, in one run, on one thread or a GPU.

The peer's way is written from its description (alibaba/FederatedScope, branch FedKSeed, `mezo_optimizer.py`
and `server.py`): for every seed, for every tensor, draw z with the framework's generator and add it in place. A step
perturbs in place by +1, -2 and +1 eps and then updates, so it draws z four times. It cannot walk over all 4096 seeds
in a benchmark; it is timed on a few and its cost is per weight and seed. The limit is a copy of the same bytes.

Times are process CPU time in nanoseconds a weight, the least of several turns; variants take turns. With
`--device cuda` they are wall time until the device has nothing left to do, and ours are the Triton kernels.
"""

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from time import perf_counter, process_time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _table import Row, interleave, options, report
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.directions import KINDS, TILE, Pool, portable
from fedtune.directions.pool import Kind
from fedtune.training.encoding import Encoded
from fedtune.training.packing import collate
from fedtune.training.scoring import Scorer
from fedtune.training.seeded import SeedModel, backend, flat
from fedtune.training.zo import walking

K, FEW, ANSWER = 4096, 4, 4


def authors(weights: list[torch.Tensor], seeds: range, scale: float) -> None:
    """Adds scale * z of each seed: normal_ then add_, tensor by tensor."""
    for seed in seeds:
        torch.manual_seed(seed)
        for weight in weights:
            weight.add_(torch.empty_like(weight).normal_(), alpha=scale)


def rebuild(count: int, repeats: int, device: torch.device) -> list[Row]:
    """Rebuilds `count` weights from scalars of K seeds."""
    base = torch.randn(count, device=device) * 0.02
    out, w, ours = torch.empty_like(base), base.clone(), backend(base)
    c = np.random.default_rng(0).integers(-(2**17), 2**17, K).astype(np.int32)
    few = min(count, 64 * TILE) if device.type == "cpu" else count  # independent seeds cost K times as much
    pools = {kind: Pool(kind, 1, K) for kind in KINDS}
    some = np.where(np.arange(K) % 64 == 0, c, 0).astype(np.int32)

    def independent(kind: Kind) -> None:
        ours.replay(pools[kind], some, 40, flat(base[:few]), 0, flat(out[:few]))

    variants = {
        "authors": lambda: authors([w], range(FEW), 1e-9),
        "copy": lambda: out.copy_(base),
        "hadamard": lambda: ours.replay(pools["hadamard"], c, 40, flat(base), 0, flat(out)),
        "torch": lambda: portable.replay(pools["hadamard"], c, 40, base, 0, out),
        "rademacher": partial(independent, "rademacher"),
        "gaussian": partial(independent, "gaussian"),
    }
    best, name = _best(variants, repeats, device), _name(device)
    per_seed = best["authors"] / count / FEW * 1e9
    copy = best["copy"] / count * 1e9
    rows = [
        Row(f"replay, hadamard pool, {way}", best[key] / count * 1e9, "ns/weight", per_seed * K, copy, f"all {K} seeds")
        for key, way in (("hadamard", name), ("torch", "torch alone"))
    ]
    used = np.count_nonzero(some)
    for kind in ("rademacher", "gaussian"):
        rows.append(Row(f"replay, {kind} pool, {name}", best[kind] / few / used * 1e9, "ns/weight/seed", per_seed))
    return rows


def perturbation(count: int, repeats: int, device: torch.device) -> list[Row]:
    """One step's walks over the weights: the authors' four, our two."""
    w = torch.randn(count, device=device) * 0.02
    out, ours = torch.empty_like(w), backend(w)

    def walks(pool: Pool) -> None:
        ours.spread(pool, 2, (1e-3,), flat(w), 0, flat(out)[None], (1, -1e-7))
        ours.spread(pool, 2, (-1e-3,), flat(w), 0, flat(out)[None])

    variants = {"authors": lambda: [authors([w], range(1), s) for s in (1e-3, -2e-3, 1e-3, -1e-7)]}
    variants |= {kind: partial(walks, Pool(kind, 1, K)) for kind in KINDS}
    variants["copy"] = lambda: [out.copy_(w), out.copy_(w)]
    best = {name: seconds / count * 1e9 for name, seconds in _best(variants, repeats, device).items()}
    note = "limit: two copies"
    return [
        Row(f"walks of a step, {kind}", best[kind], "ns/weight", best["authors"], best["copy"], note) for kind in KINDS
    ]


def model_of(quick: bool) -> LlamaForCausalLM:
    """A Llama of SmolLM2-135M's shape, or of a fifth of its size, with drawn weights."""
    width, layers, vocabulary = (288, 12, 49152) if quick else (576, 30, 49152)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def steps(quick: bool, repeats: int, device: torch.device) -> list[Row]:
    """Whole steps on one row of T tokens whose last ANSWER are learned: two losses, and the walks around them.

    Each side takes its losses as it does in training: the authors from the model's own `loss`, which puts the output
    head on every token; ours where something is learned.
    """
    model = model_of(quick).to(device)
    return [_step(model, tokens, repeats) for tokens in ((64,) if quick else (64, 256))]


def _step(model: LlamaForCausalLM, tokens: int, repeats: int) -> Row:
    ids = np.random.default_rng(0).integers(0, 49152, tokens)
    batch = collate([Encoded.plain(ids.tolist(), (np.arange(tokens) >= tokens - ANSWER).tolist())], [[0]])
    line = torch.from_numpy(ids)[None].to(model.device)
    labels = torch.where(torch.arange(tokens, device=model.device) >= tokens - ANSWER, line, -100)
    weights, mine = list(model.parameters()), copy.deepcopy(model)
    scorers = {id(m): Scorer.probe(m) for m in (model, mine)}

    def losses(model: LlamaForCausalLM, copies: int = 1) -> list[float]:
        return scorers[id(model)](batch.repeated(copies)).view(copies, -1).mean(1).tolist()

    def theirs() -> None:
        for scale in (1e-3, -2e-3):
            authors(weights, range(1), scale)
            float(model(input_ids=line, labels=labels).loss)
        authors(weights, range(1), 1e-3)
        authors(weights, range(1), -1e-9)

    with torch.inference_mode(), ExitStack() as stack:
        lines = stack.enter_context(SeedModel(mine).walk(Pool("hadamard", 1, K)))
        walk = stack.enter_context(walking(mine, lines, "together", lambda step, copies: losses(mine, copies)))
        turn = [0]

        def ours() -> None:
            walk.move(turn[0], -1e-9)
            turn[0] += 1
            walk.losses(turn[0], (1e-3, -1e-3), 0)

        variants = {"ours": ours, "authors": theirs, "forwards": lambda: [losses(model) for _ in range(2)]}
        best = _best(variants, repeats, model.device)
    share = 100 * (1 - best["forwards"] / best["ours"])
    size = sum(weight.numel() for weight in weights) / 1e6
    note = f"hadamard; perturbation {share:.0f} % of ours, limit: two forward passes"
    times = best["ours"] * 1e3, "ms", best["authors"] * 1e3, best["forwards"] * 1e3
    return Row(f"step, {size:.0f} M weights, T = {tokens}", *times, note)


def _best(variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    for warm in variants.values():
        warm()
    return interleave(variants, repeats, process_time if device.type == "cpu" else partial(_idle, device))


def _idle(device: torch.device) -> float:
    """Waits until the device has done all it was given; returns the wall clock in seconds."""
    torch.cuda.synchronize(device)
    return perf_counter()


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "numba"
    return backend(torch.empty(0, device=device)).__name__.replace("fedtune.directions.gpu", "Triton")


def main() -> None:
    arguments = options(__doc__, device={"default": "cpu", "help": "cpu, or cuda for a GPU"})
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    count, repeats = (2**22, 2) if arguments.quick else (2**25, 3)
    if device.type != "cpu":
        count *= 8  # a launch is to cost nothing beside the work
    rows = rebuild(count, repeats, device) + perturbation(count, repeats, device)
    rows += steps(arguments.quick, repeats, device)
    where = "one thread" if device.type == "cpu" else torch.cuda.get_device_name(device)
    report(f"Directions (K = {K}, float32, {where})", rows, arguments.json)


if __name__ == "__main__":
    main()
