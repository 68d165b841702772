"""FedKSeed on a torch model: the same bits however it is computed, and weights that come back."""

import hashlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fedtune.config.schema import TrainingConfig  # noqa: E402  # after the check for torch
from fedtune.directions import Pool, portable, reference  # noqa: E402
from fedtune.errors import ModelError, TrainingError  # noqa: E402
from fedtune.kspace import unpacked  # noqa: E402
from fedtune.method import BaseModel, Member, ZeroOrder  # noqa: E402
from fedtune.methods.fedkseed import FILE, FedKSeed  # noqa: E402
from fedtune.tensors import Manifest  # noqa: E402
from fedtune.training import zo  # noqa: E402
from fedtune.training.adapt import Bench  # noqa: E402
from fedtune.training.encoding import Encoded  # noqa: E402
from fedtune.training.scoring import Scorer  # noqa: E402

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
            monkeypatch.setattr(zo, "backend", lambda _, module=reference if name == "reference" else portable: module)
        if name == "portable":
            monkeypatch.setattr(zo, "flat", lambda tensor: tensor.view(-1))
            monkeypatch.setattr(zo.SeedModel, "digest", lambda self: b"")
        try:
            zo.SeedModel(model).replay(pool, _coefficients(pool), 30)
        finally:
            torch.set_num_threads(before)
            monkeypatch.undo()
        seen.add(_hash(model))
    assert len(seen) == 1
    assert seen != {_hash(_model(dtype))}


def test_tied_weights_count_once_and_stay_tied():
    model = _model()
    zo.SeedModel(model).replay(POOL, _coefficients(POOL), 20)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_leaves_the_model_as_it_was_and_reset_gives_the_base(dtype):
    model = _model(dtype)
    base, seeds = _hash(model), np.arange(6, dtype=np.int32)
    held = zo.SeedModel(model)
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
    held, bench = zo.SeedModel(model), _bench(model)
    scalars, _ = zo.fit_seeds(bench, held, POOL, np.array([9], np.int32), ZeroOrder(1, 1, 1e-3, 0.0), 4)
    model.requires_grad_(True)
    part = next(iter(bench.plan().batches(4)[1]))[0]
    bench.scorer(part).mean().backward()
    slope = 0.0
    for name, weight in sorted(model.named_parameters()):
        z = reference.direction(POOL, 9, held._first[name], weight.numel())
        slope += float(weight.grad.reshape(-1).numpy() @ z)
    assert scalars[0] == pytest.approx(slope, rel=3e-3)  # the loss is a float32


def test_steps_lower_the_loss():
    model = _model()
    seeds = np.random.default_rng(0).integers(0, 256, 150).astype(np.int32)
    bench = _bench(model, epochs=1)
    _, metrics = zo.fit_seeds(bench, zo.SeedModel(model), POOL, seeds, ZeroOrder(150, 1, 1e-3, 3e-4), 0)
    assert metrics["loss_last"] < metrics["loss_first"] - 0.05


def test_a_loss_that_is_never_finite_is_an_error():
    model = _model()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="finite loss"):
        zo.fit_seeds(_bench(model), zo.SeedModel(model), POOL, np.zeros(2, np.int32), ZeroOrder(2, 1, 1e-3, 1e-4), 0)


def test_the_first_steps_agree_with_steps_by_hand():
    """One step's change, seen by the losses of the next: kernels and loop against plain numpy arithmetic."""
    model = _model()
    bench, plan = _bench(model), ZeroOrder(2, 1, 1e-2, 1e-2)
    scalars, metrics = zo.fit_seeds(bench, zo.SeedModel(model), POOL, np.array([1, 2], np.int32), plan, 4)
    held = zo.SeedModel(model)
    batches = list(bench.plan().batches(4)[1])

    def loss(moves, part):
        for name, weight in held._weights.items():
            flat = held._base[name].view(-1).numpy().astype(np.float64)
            for k, scale in moves:
                flat = flat + scale * reference.direction(POOL, k, held._first[name], flat.size)
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
    held = zo.SeedModel(model)
    held.load(tmp_path)
    got = _hash(model)
    held.replay(POOL, unpacked(state["coefficients"]), int(state["exponent"][0]))
    assert got == _hash(model) != _hash(_model())
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ModelError, match="FedKSeed"):
        held.load(tmp_path)
