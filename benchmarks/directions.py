"""FedKSeed's rebuild and its zeroth-order step: ours beside the authors' loop, on one thread, in one run.

The peer's way is written from its description (alibaba/FederatedScope, branch FedKSeed, `mezo_optimizer.py`
and `server.py`): for every seed, for every tensor, draw z with the framework's generator and add it in place. A step
perturbs in place by +1, -2 and +1 eps and then updates, so it draws z four times. It cannot walk over all 4096 seeds
in a benchmark; it is timed on a few and its cost is per weight and seed. The limit is a copy of the same bytes.

Times are process CPU time in nanoseconds a weight, the least of several turns; variants take turns.
"""

import copy
import os
from contextlib import ExitStack
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from _table import Row, interleave, options, report
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.directions import TILE, Pool, cpu, portable
from fedtune.training.encoding import Encoded
from fedtune.training.packing import collate
from fedtune.training.scoring import Scorer
from fedtune.training.seeded import SeedModel
from fedtune.training.zo import walking

K, FEW, ANSWER = 4096, 4, 4


def authors(weights: list[torch.Tensor], seeds: range, scale: float) -> None:
    """Adds scale * z of each seed: normal_ then add_, tensor by tensor."""
    for seed in seeds:
        torch.manual_seed(seed)
        for weight in weights:
            weight.add_(torch.empty_like(weight).normal_(), alpha=scale)


def rebuild(count: int, repeats: int) -> list[Row]:
    """Rebuilds `count` weights from scalars of K seeds."""
    base = torch.randn(count) * 0.02
    out, w = torch.empty(count), base.clone()
    a, b = base.numpy(), out.numpy()
    c = np.random.default_rng(0).integers(-(2**17), 2**17, K).astype(np.int32)
    short = slice(0, min(count, 64 * TILE))  # independent seeds cost K times as much
    pools = {kind: Pool(kind, 1, K) for kind in ("hadamard", "rademacher", "gaussian")}
    some = np.where(np.arange(K) % 64 == 0, c, 0).astype(np.int32)
    variants = {
        "authors": lambda: authors([w], range(FEW), 1e-9),
        "copy": lambda: out.copy_(base),
        "hadamard": lambda: cpu.replay(pools["hadamard"], c, 40, a, 0, b),
        "torch": lambda: portable.replay(pools["hadamard"], c, 40, base, 0, out),
        "rademacher": lambda: cpu.replay(pools["rademacher"], some, 40, a[short], 0, b[short]),
        "gaussian": lambda: cpu.replay(pools["gaussian"], some, 40, a[short], 0, b[short]),
    }
    for warm in variants.values():
        warm()
    best = interleave(variants, repeats)
    per_seed = best["authors"] / count / FEW * 1e9
    copy = best["copy"] / count * 1e9
    rows = [
        Row(f"replay, {name}", best[key] / count * 1e9, "ns/weight", per_seed * K, copy, f"all {K} seeds")
        for key, name in (("hadamard", "hadamard pool, numba"), ("torch", "hadamard pool, torch alone"))
    ]
    used = np.count_nonzero(some)
    for kind in ("rademacher", "gaussian"):
        ours = best[kind] / len(a[short]) / used * 1e9
        rows.append(Row(f"replay, {kind} pool, numba", ours, "ns/weight/seed", per_seed))
    return rows


def perturbation(count: int, repeats: int) -> list[Row]:
    """One step's walks over the weights: the authors' four, our two."""
    w, out = torch.randn(count) * 0.02, torch.empty(count)
    a, b = w.numpy(), out.numpy()
    variants = {"authors": lambda: [authors([w], range(1), s) for s in (1e-3, -2e-3, 1e-3, -1e-7)]}

    def ours(pool: Pool) -> None:
        cpu.spread(pool, 2, (1e-3,), a, 0, b[None], (1, -1e-7))
        cpu.spread(pool, 2, (-1e-3,), a, 0, b[None])

    for kind in ("hadamard", "rademacher", "gaussian"):
        variants[kind] = partial(ours, Pool(kind, 1, K))
    variants["copy"] = lambda: [out.copy_(w), out.copy_(w)]
    for warm in variants.values():
        warm()
    best = {name: seconds / count * 1e9 for name, seconds in interleave(variants, repeats).items()}
    note = "limit: two copies"
    return [
        Row(f"walks of a step, {kind}", best[kind], "ns/weight", best["authors"], best["copy"], note)
        for kind in ("hadamard", "rademacher", "gaussian")
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


def steps(quick: bool, repeats: int) -> list[Row]:
    """Whole steps on one row of T tokens whose last ANSWER are learned: two losses, and the walks around them.

    Each side takes its losses as it does in training: the authors from the model's own `loss`, which puts the output
    head on every token; ours where something is learned.
    """
    model = model_of(quick)
    return [_step(model, tokens, repeats) for tokens in ((64,) if quick else (64, 256))]


def _step(model: LlamaForCausalLM, tokens: int, repeats: int) -> Row:
    ids = np.random.default_rng(0).integers(0, 49152, tokens)
    batch = collate([Encoded.plain(ids.tolist(), (np.arange(tokens) >= tokens - ANSWER).tolist())], [[0]])
    line = torch.from_numpy(ids)[None]
    labels = torch.where(torch.arange(tokens) >= tokens - ANSWER, line, -100)
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
        for warm in variants.values():
            warm()
        best = interleave(variants, repeats)
    share = 100 * (1 - best["forwards"] / best["ours"])
    size = sum(weight.numel() for weight in weights) / 1e6
    note = f"hadamard; perturbation {share:.0f} % of ours, limit: two forward passes"
    times = best["ours"] * 1e3, "ms", best["authors"] * 1e3, best["forwards"] * 1e3
    return Row(f"step, {size:.0f} M weights, T = {tokens}", *times, note)


def main() -> None:
    arguments = options(__doc__)
    torch.set_num_threads(1)
    count, repeats = (2**22, 2) if arguments.quick else (2**25, 3)
    rows = rebuild(count, repeats) + perturbation(count, repeats) + steps(arguments.quick, repeats)
    report(f"Directions (K = {K}, float32, one thread)", rows, arguments.json)


if __name__ == "__main__":
    main()
