"""FedKSeed on a torch model: the same bits however it is computed, and weights that come back."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fedtune.config.schema import TrainingConfig  # noqa: E402  # after the check for torch
from fedtune.directions import TILE, Pool, layout, portable, reference  # noqa: E402
from fedtune.errors import ConfigError, ModelError, TrainingError  # noqa: E402
from fedtune.kspace import unpacked  # noqa: E402
from fedtune.lora import LoraSpec  # noqa: E402
from fedtune.method import BaseModel, Member, Part, ZeroOrder  # noqa: E402
from fedtune.methods.fedkseed import FILE, FedKSeed  # noqa: E402
from fedtune.tensors import Manifest  # noqa: E402
from fedtune.training import seeded as built  # noqa: E402
from fedtune.training import streaming, zo  # noqa: E402
from fedtune.training.adapt import Bench  # noqa: E402
from fedtune.training.encoding import Encoded  # noqa: E402
from fedtune.training.frugal import FrugalModel  # noqa: E402
from fedtune.training.lora import injected  # noqa: E402
from fedtune.training.merging import MergedBase  # noqa: E402
from fedtune.training.packing import collate  # noqa: E402
from fedtune.training.scoring import Scorer  # noqa: E402
from fedtune.training.seeded import SeedAdapter, SeedModel  # noqa: E402
from fedtune.zo import train  # noqa: E402

POOL = Pool("hadamard", 3, 256)


def _model(dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def _hash(model):
    sha = hashlib.sha256()
    for _, weight in sorted(model.named_parameters()):
        sha.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _gpt2(dtype=torch.float32):
    torch.manual_seed(2)
    config = transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval().requires_grad_(False)


def _untied():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=63,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def _bench(model, **settings):
    rng = np.random.default_rng(0)
    rows = [Encoded.plain(rng.integers(0, 64, 12).tolist(), [True] * 12) for _ in range(8)]
    config = TrainingConfig(batch_size=2, max_length=32, packing=False, **settings)
    return Bench(Scorer(model), None, rows, config)


def _coefficients(pool):
    drawn = np.random.default_rng(1).integers(-(2**22), 2**22, pool.size).astype(np.int32)
    return np.where(np.arange(pool.size) % max(1, pool.size // 8) == 0, drawn, 0).astype(np.int32)  # 8 seeds in use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["hadamard", "rademacher", "gaussian"])
def test_the_rebuilt_model_is_the_same_by_every_backend_and_number_of_threads(monkeypatch, dtype, kind):
    pool = Pool(kind, 3, 256 if kind == "hadamard" else 8)
    seen, before = set(), torch.get_num_threads()
    for name in ("cpu", "two threads", "reference", "portable"):
        model = _model(dtype)
        torch.set_num_threads(2 if name == "two threads" else 1)
        if name == "reference" or name == "portable":
            module = reference if name == "reference" else portable
            monkeypatch.setattr(built, "backend", lambda _, module=module: module)
        if name == "portable":
            monkeypatch.setattr(built, "flat", lambda tensor: tensor.view(-1))
            monkeypatch.setattr(SeedModel, "digest", lambda self: b"")
        try:
            SeedModel(model).replay(pool, _coefficients(pool), 30)
        finally:
            torch.set_num_threads(before)
            monkeypatch.undo()
        seen.add(_hash(model))
    assert len(seen) == 1
    assert seen != {_hash(_model(dtype))}


def test_tied_weights_count_once_and_stay_tied():
    model = _model()
    SeedModel(model).replay(POOL, _coefficients(POOL), 20)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_leaves_the_model_as_it_was_and_reset_gives_the_base(dtype):
    model = _model(dtype)
    base, seeds = _hash(model), np.arange(6, dtype=np.int32)
    held = SeedModel(model)
    digest = held.replay(POOL, _coefficients(POOL), 30)
    rebuilt = _hash(model)
    scalars, metrics = zo.fit_seeds(_bench(model), held, POOL, seeds, ZeroOrder(6, 1, 1e-2, 1e-3), 0)
    assert np.isfinite(scalars).all()
    assert np.abs(scalars).max() > 0
    assert metrics["steps"] == 6
    assert (_hash(model), held.digest()) == (rebuilt, digest)
    held.reset()
    assert _hash(model) == base


def test_the_scalar_is_the_gradient_along_the_direction():
    model = _model(torch.float64)
    held, bench = SeedModel(model), _bench(model)
    scalars, _ = zo.fit_seeds(bench, held, POOL, np.array([9], np.int32), ZeroOrder(1, 1, 1e-3, 0.0), 4)
    model.requires_grad_(True)
    part = next(iter(bench.plan().batches(4)[1]))[0]
    bench.scorer(part).mean().backward()
    slope = 0.0
    for name, weight in sorted(model.named_parameters()):
        z = reference.direction(POOL, 9, held._origins[name].first, weight.numel())
        slope += float(weight.grad.reshape(-1).numpy() @ z)
    assert scalars[0] == pytest.approx(slope, rel=3e-3)  # the loss is a float32


@pytest.mark.parametrize("looks", ["together", "apart", "whole"])
@pytest.mark.parametrize("kept", ["hadamard", "gaussian", "little memory", "adapter"])
def test_own_rows_are_measured_before_and_after_on_the_weights_there_are_then(monkeypatch, kept, looks):
    """After means after: a second measurement where a replay of the steps has brought the model says the same."""
    model, pool = _model(), Pool("gaussian" if kept == "gaussian" else "hadamard", 3, 256)
    spec = LoraSpec(("model.layers.0.self_attn.q_proj",), 2, 4.0)
    if kept == "adapter":
        held = SeedAdapter(model, spec, 5)
    else:
        held = (FrugalModel if kept == "little memory" else SeedModel)(model)
    start = held.replay(pool, _coefficients(pool), 20 if kept == "adapter" else 26)
    bench = _bench(model)
    batch = next(iter(bench.plan().batches(8)[1]))[0]

    def loss():
        return {"loss": float(bench.scorer(batch).mean()), "accuracy": 0.5, "rows": 2.0}

    monkeypatch.setattr(zo, "how", lambda scorer, lines: looks)
    rate = 10.0 if kept == "adapter" else 1e-2
    seeds, plan = np.array([7, 9], np.int32), ZeroOrder(2, 1, 1e-2, rate)
    plain, silent = zo.fit_seeds(bench, held, pool, seeds, plan, 1)
    scalars, metrics = zo.fit_seeds(replace(bench, measure=loss), held, pool, seeds, plan, 1)
    assert scalars.tobytes() == plain.tobytes()
    assert held.digest() == start
    own = {name: metrics[name] for name in metrics.keys() - silent.keys()}
    assert sorted(own) == ["own_accuracy", "own_accuracy_before", "own_loss", "own_loss_before"]
    # By hand: the weights that the walk begins with, and those that the two moves make of them.
    seen = []
    with torch.inference_mode(), held.walk(pool) as lines:
        for moves in ([], [(int(k), -rate * float(g)) for k, g in zip(seeds, scalars, strict=True)]):
            for line in lines.values():
                line.due.extend(moves)
            with zo.walking(model, lines, "apart", lambda step, copies: [seen.append(loss()["loss"])]) as walk:
                walk.losses(0, (0.0,), 0)
    assert [own["own_loss_before"], own["own_loss"]] == pytest.approx(seen, rel=1e-6)
    assert abs(seen[0] - seen[1]) > 1e-4


def test_steps_lower_the_loss():
    model = _model()
    seeds = np.random.default_rng(0).integers(0, 256, 150).astype(np.int32)
    bench = _bench(model, epochs=1)
    _, metrics = zo.fit_seeds(bench, SeedModel(model), POOL, seeds, ZeroOrder(150, 1, 1e-3, 3e-4), 0)
    assert metrics["loss_last"] < metrics["loss_first"] - 0.05


def test_a_loss_that_is_never_finite_is_an_error():
    model = _model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="finite loss"):
        zo.fit_seeds(_bench(model), SeedModel(model), POOL, np.zeros(2, np.int32), ZeroOrder(2, 1, 1e-3, 1e-4), 0)


def test_steps_too_steep_to_be_sent_are_an_error_where_all_are():
    """Logits a thousand million times too large: the losses are finite, and far apart."""
    model = _model()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 1e9)
    with pytest.raises(TrainingError, match="slope below 65536"):
        zo.fit_seeds(_bench(model), SeedModel(model), POOL, np.arange(2, dtype=np.int32), ZeroOrder(2, 1, 1e-3, 0.0), 0)


def test_the_first_steps_agree_with_steps_by_hand():
    """One step's change, seen by the losses of the next: kernels and loop against plain numpy arithmetic."""
    model = _model()
    bench, plan = _bench(model), ZeroOrder(2, 1, 1e-2, 1e-2)
    scalars, metrics = zo.fit_seeds(bench, SeedModel(model), POOL, np.array([1, 2], np.int32), plan, 4)
    held = SeedModel(model)
    batches = list(bench.plan().batches(4)[1])

    def loss(moves, part):
        for name, weight in held._weights.items():
            flat = held._origins[name].base.view(-1).numpy().astype(np.float64)
            for k, scale in moves:
                flat = flat + scale * reference.direction(POOL, k, held._origins[name].first, flat.size)
            weight.data = torch.from_numpy(flat.astype(np.float32)).view(weight.shape)
        with torch.no_grad():
            return float(bench.scorer(part).sum()) / len(part.at)

    ((first,), (second,)) = batches[0], batches[1]
    g = (loss([(1, 1e-2)], first) - loss([(1, -1e-2)], first)) / 2e-2
    moved = [(1, -1e-2 * float(scalars[0]))]
    h = (loss([*moved, (2, 1e-2)], second) - loss([*moved, (2, -1e-2)], second)) / 2e-2
    assert scalars == pytest.approx([g, h], rel=1e-3, abs=1e-4)
    assert metrics["skipped"] == 0


def test_an_exported_run_is_rebuilt_and_a_damaged_one_is_named(tmp_path):
    method = FedKSeed(seeds=256, learning_rate=1e-3)
    model, seeds = _model(), np.arange(200, dtype=np.int32)
    init = method.init(BaseModel("toy", Manifest(()), ""), 3)
    update = {"seeds": seeds, "scalars": np.ones(200, np.float32), "model": np.zeros(32, np.uint8)}
    state = method.finish(init, method.fold(None, update, Member("a"), 5), 5)
    method.export(state, tmp_path, "toy")
    held = zo.rebuilt(model, tmp_path)
    got = _hash(model)
    held.replay(POOL, unpacked(state["coefficients"]), int(state["exponent"][0]))
    assert got == _hash(model) != _hash(_model())
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ModelError, match="FedKSeed"):
        zo.rebuilt(model, tmp_path)


@pytest.mark.parametrize("looks", ["together", "apart"])
@pytest.mark.parametrize("make", [_model, _gpt2, _untied, lambda: _model(torch.bfloat16)])
@pytest.mark.parametrize(("kind", "density"), [("hadamard", None), ("gaussian", None), ("rademacher", 0.3)])
def test_weights_made_by_layers_give_the_losses_and_moves_of_weights_made_beforehand(
    monkeypatch, make, looks, kind, density
):
    """The same walk three ways; chunks of one tile, so that a matrix is made in pieces."""
    monkeypatch.setattr(streaming, "CHUNK", TILE)
    pool, plan = Pool(kind, 3, 256), ZeroOrder(5, 2, 1e-2, 1e-2, "conservative")
    ends, seeds = [], np.arange(10, dtype=np.int32)
    for way in (looks, "whole"):
        model = make()
        held = SeedModel(model, density)
        bench = replace(_bench(model), scorer=Scorer(model, packs=True))  # places are told: see the next test
        batches = list(bench.plan().batches(1)[1])[:5] * 5
        with torch.inference_mode(), held.walk(pool) as lines:
            with zo.walking(model, lines, way, zo._losses(bench, batches)) as walk:
                done = train(walk, seeds, plan)
            ends.append((done, [line.weights.copy() for line in lines.values()]))
    (done, weights), (want, expected) = ends
    loose = make().dtype == torch.bfloat16
    assert done.losses == pytest.approx(want.losses, rel=2e-2 if loose else 1e-5)
    assert done.scalars == pytest.approx(want.scalars, rel=0.2 if loose else 2e-2, abs=0.5 if loose else 2e-3)
    moved = max(np.abs(a - b.float().numpy().ravel()).max() for a, b in zip(expected, _bases(make), strict=True))
    apart = max(np.abs(a - b).max() for a, b in zip(weights, expected, strict=True))
    assert apart < (0.5 if loose else 0.02) * moved


def _bases(make):
    return [weight for _, weight in sorted(make().named_parameters())]


@pytest.mark.parametrize(("make", "want"), [(_model, "together"), (_gpt2, "apart"), (_untied, "together")])
def test_how_a_model_may_be_looked_at_is_found_out(make, want):
    """GPT-2 numbers its places once for the whole batch, unless it is told them: then it has no halves."""
    model = make()
    with torch.inference_mode(), SeedModel(model).walk(POOL) as lines:
        assert zo.how(Scorer(model), lines) == want
        assert zo.how(Scorer(model, packs=True), lines) == "together"


def test_a_module_that_reads_the_weights_of_another_is_looked_at_as_a_whole():
    model = _model()
    head = model.lm_head

    class Borrowing(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.linear(x, head.weight)

    model.lm_head = Borrowing()
    bench, seeds = _bench(model), np.arange(3, dtype=np.int32)
    with torch.inference_mode(), SeedModel(model).walk(POOL) as lines:
        assert zo.how(bench.scorer, lines) == "whole"
    got, _ = zo.fit_seeds(bench, SeedModel(model), POOL, seeds, ZeroOrder(3, 1, 1e-2, 1e-3), 0)
    plain = _model()
    want, _ = zo.fit_seeds(_bench(plain), SeedModel(plain), POOL, seeds, ZeroOrder(3, 1, 1e-2, 1e-3), 0)
    assert got.tobytes() == want.tobytes()
    assert np.abs(got).min() > 0


def test_a_module_that_mixes_the_batch_is_looked_at_one_look_at_a_time():
    model = _model()
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: plain(x.flip(0)).flip(0)
    with torch.inference_mode(), SeedModel(model).walk(POOL) as lines:
        assert zo.how(Scorer(model), lines) == "apart"


@pytest.mark.parametrize("make", [_model, _gpt2, _untied, lambda: _model(torch.bfloat16)])
@pytest.mark.parametrize(("kind", "density"), [("hadamard", None), ("gaussian", None), ("rademacher", 0.3)])
def test_a_client_with_little_memory_has_the_same_bits(monkeypatch, make, kind, density):
    """Chunks of one tile, and more steps than a table leaves due."""
    monkeypatch.setattr(streaming, "CHUNK", TILE)
    pool, plan = Pool(kind, 3, 256), ZeroOrder(20, 2, 1e-2, 1e-3, "conservative")
    seeds, ends = np.random.default_rng(5).integers(0, 256, 40).astype(np.int32), []
    for kept in (SeedModel, FrugalModel):
        model = make()
        base, held, turns = _hash(model), kept(model, density), []
        turns.append(zo.fit_seeds(_bench(model), held, pool, seeds[:4], replace(plan, steps=2), 0)[0].tobytes())
        turns.append(held.replay(pool, _coefficients(pool), 30))
        turns.append(zo.fit_seeds(_bench(model), held, pool, seeds, plan, 0)[0].tobytes())
        turns.append(held.digest())
        ends.append(turns)
        assert (_hash(model) == base) == (kept is FrugalModel)
        held.reset()
        assert held.digest() == SeedModel(make(), density).digest() != turns[-1]
    assert ends[0] == ends[1]


def test_a_client_with_little_memory_makes_all_weights_where_a_module_needs_them():
    got = []
    for kept in (SeedModel, FrugalModel):
        model = _model()
        head = model.lm_head
        model.lm_head = torch.nn.Module()
        model.lm_head.forward = lambda x, head=head: torch.nn.functional.linear(x, head.weight)
        base, held = _hash(model), kept(model)
        plan, seeds = ZeroOrder(3, 1, 1e-2, 1e-3), np.arange(3, dtype=np.int32)
        got.append(zo.fit_seeds(_bench(model), held, POOL, seeds, plan, 0)[0].tobytes())
        assert _hash(model) == base
    assert got[0] == got[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_smallest_weights_of_the_base_move(dtype):
    model, base = _model(dtype), _model(dtype)
    held = SeedModel(model, 0.25)
    held.replay(POOL, _coefficients(POOL), 30)
    scalars, _ = zo.fit_seeds(_bench(model), held, POOL, np.arange(4, dtype=np.int32), ZeroOrder(4, 1, 1e-2, 1e-3), 0)
    assert np.isfinite(scalars).all()
    pairs = zip(sorted(model.named_parameters()), sorted(base.named_parameters()), strict=True)
    for (name, now), (_, before) in pairs:
        changed, sizes = (now != before).ravel(), before.float().abs().ravel()
        smallest = torch.zeros_like(changed)
        smallest[torch.sort(sizes, stable=True).indices[: int(0.25 * len(sizes))]] = True
        assert not (changed & ~smallest).any(), name
        assert changed.sum() > 0.9 * smallest.sum() or len(sizes) < 100


def _slope(model, held, bench):
    """The loss's gradient along direction 9, by backpropagation through PEFT's adapter."""
    with injected(model, held.spec, held.factors()) as adapter:
        bench.scorer(next(iter(bench.plan().batches(4)[1]))[0]).mean().backward()
        first = layout({name: weight.numel() for name, weight in adapter.weights.items()})
        return sum(
            float(w.grad.numpy().ravel() @ reference.direction(POOL, 9, first[name], w.numel()))
            for name, w in adapter.weights.items()
        )


def test_an_adapter_moves_alone_and_both_looks_share_the_base():
    model = _model()
    spec = LoraSpec(("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"), 4, 8.0)
    before, held = _hash(model), SeedAdapter(model, spec, 5)
    start = held.digest()
    assert held.replay(POOL, np.zeros(256, np.int32), 30) == start
    moved = held.replay(POOL, _coefficients(POOL), 24)
    assert moved != start
    bench = _bench(model)
    with torch.inference_mode(), held.walk(POOL) as lines:
        assert len(lines) == 4
        assert zo.how(bench.scorer, lines) == "together"
    scalars, _ = zo.fit_seeds(bench, held, POOL, np.array([9], np.int32), ZeroOrder(1, 1, 1e-2, 1e-3), 4)
    slope = _slope(model, held, bench)
    assert scalars[0] == pytest.approx(slope, abs=2e-4)
    assert abs(slope) > 1e-3
    assert (held.digest(), _hash(model)) == (moved, before)
    # What PEFT computes with the factors is the base with B A added.
    ids = torch.arange(10)[None]
    with injected(model, spec, held.factors()), torch.no_grad():
        want = model(ids).logits
    merged = MergedBase(model)
    merged.merge(held.scaled())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, want, atol=1e-5)
    merged.reset()
    assert _hash(model) == before


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (_model, ("model.embed_tokens", "model.layers.0.self_attn.q_proj")),
        (_gpt2, ("transformer.wpe", "transformer.wte")),
    ],
)
def test_an_adapter_on_embeddings_is_tuned_along_its_directions(make, layers):
    model = make()
    before, held, bench = _hash(model), SeedAdapter(model, LoraSpec(layers, 2, 4.0), 5), _bench(model)
    held.replay(POOL, _coefficients(POOL), 24)
    scalars, _ = zo.fit_seeds(bench, held, POOL, np.array([9], np.int32), ZeroOrder(1, 1, 1e-3, 1e-3), 4)
    slope = _slope(model, held, bench)
    assert scalars[0] == pytest.approx(slope, rel=0.03, abs=1e-3)
    assert abs(slope) > 5e-3
    assert _hash(model) == before


def test_tokens_are_the_same_in_a_batch_laid_out_twice():
    model = _model()
    scorer = Scorer(model, short_head=True, packs=True)
    rows = [Encoded.plain(list(range(n, n + 5 + n)), [True] * (5 + n)) for n in range(4)]
    batch = collate(rows, [[0, 1], [2, 3]])
    with torch.no_grad():
        assert torch.allclose(scorer(batch.repeated(3)).view(3, -1), scorer(batch).expand(3, -1), rtol=1e-5)
    assert batch.repeated(3).rows.tolist() == batch.rows.tolist() * 3


def test_a_device_without_float64_is_refused_with_the_reason():
    elsewhere = SimpleNamespace(device=torch.device("mps"))
    with pytest.raises(ConfigError, match=r"client\.device: expected cpu or cuda .* got mps.*no float64"):
        zo.seeded(elsewhere, Part())
