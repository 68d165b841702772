from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from fedtune.errors import ModelError
from fedtune.lora import LoraSpec, key_a, key_b, load_peft, save_peft
from fedtune.method import Member
from fedtune.training.job import TorchJob
from fedtune.training.lora import change, fresh_factors, injected, linear
from fedtune.training.merging import MergedBase

_LAYERS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.3.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
}
_IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(params=["llama", "gpt2"])
def case(request):
    return request.getfixturevalue(request.param), _LAYERS[request.param]


def _factors(model, spec: LoraSpec, seed: int = 0):
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.2, a.shape).astype(np.float32) for n, a in fresh_factors(model, spec, 1).items()}


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=_IDS).logits


def test_fresh_factors_change_nothing_and_follow_the_seed(case):
    model, layers = case
    spec = LoraSpec(layers, 4, 8)
    factors = fresh_factors(model, spec, 7)
    before = _logits(model)
    with injected(model, spec, factors):
        assert torch.equal(_logits(model), before)
    again = fresh_factors(model, spec, 7)
    assert all(np.array_equal(factors[name], again[name]) for name in factors)
    assert not np.array_equal(factors[key_a(layers[0])], fresh_factors(model, spec, 8)[key_a(layers[0])])
    assert factors[key_a(layers[0])].std() > 0


def test_the_model_is_left_bit_identical(case):
    model, layers = case
    before, names = _logits(model), [name for name, _ in model.named_modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    spec = LoraSpec(layers, 4, 8, dropout=0.1)
    with injected(model, spec, _factors(model, spec)):
        assert not torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), before)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert not hasattr(model, "peft_config")
    assert not any(weight.requires_grad for weight in model.parameters())


def test_the_model_is_left_as_it_was_when_training_fails(llama):
    spec = LoraSpec(_LAYERS["llama"], 2, 4)
    before = _logits(llama)
    with pytest.raises(KeyboardInterrupt), injected(llama, spec, _factors(llama, spec)):
        raise KeyboardInterrupt
    assert torch.equal(_logits(llama), before)


def test_factors_come_out_as_they_went_in_and_only_they_train(case):
    model, layers = case
    spec = LoraSpec(layers, 4, 8)
    factors = _factors(model, spec)
    with injected(model, spec, factors) as adapter:
        out = adapter.factors()
        trainable = {id(weight) for weight in model.parameters() if weight.requires_grad}
        assert trainable == {id(weight) for weight in adapter.weights.values()}
    assert list(out) == list(factors)
    assert all(np.array_equal(out[name], factors[name]) for name in factors)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_side_requires_no_gradient_and_the_other_does(case, frozen):
    model, layers = case
    spec = LoraSpec(layers, 4, 8)
    with injected(model, spec, _factors(model, spec), (frozen,)) as adapter:
        trainable = {id(weight) for weight in model.parameters() if weight.requires_grad}
        other = {id(weight) for name, weight in adapter.weights.items() if not name.endswith(frozen)}
        assert trainable == other == {id(weight) for weight in adapter.trained()}
        assert len(other) == len(layers)
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_equals_the_adapter(case, rslora):
    model, layers = case
    spec = LoraSpec(layers, 4, 6.0, rslora=rslora)
    factors = _factors(model, spec)
    with injected(model, spec, factors):
        want = _logits(model)
    base = MergedBase(model)
    base.merge({n: a * np.float32(spec.scale) if n.endswith("/A") else a for n, a in factors.items()})
    assert torch.allclose(_logits(model), want, atol=1e-4)


def test_reset_gives_the_base_back_bit_for_bit_however_much_was_merged(case):
    model, layers = case
    before = _logits(model)
    base = MergedBase(model)
    for seed in range(3):
        base.merge(_factors(model, LoraSpec(layers, 2 + seed, 4), seed))
    assert not torch.equal(_logits(model), before)
    base.reset()
    assert torch.equal(_logits(model), before)


def test_merging_in_two_steps_or_one(case):
    model, layers = case
    base = MergedBase(model)
    one, two = (_factors(model, LoraSpec(layers, 3, 3), seed) for seed in (1, 2))
    base.merge(one)
    base.merge(two)
    apart = _logits(model)
    base.reset()
    base.merge({n: np.concatenate([one[n], two[n]], axis=0 if n.endswith("/A") else 1) for n in one})
    assert torch.allclose(_logits(model), apart, atol=1e-4)


def test_a_bfloat16_weight_is_rounded_once_however_many_rounds_are_merged(llama):
    model, layer = llama.to(torch.bfloat16), _LAYERS["llama"][0]
    weight = linear(model, layer).get_parameter("weight")
    exact = weight.data.double().clone()
    base, total = MergedBase(model), torch.zeros_like(exact)
    for seed in range(64):
        small = {n: a * np.float32(0.02) for n, a in _factors(model, LoraSpec((layer,), 1, 1), seed).items()}
        total += change(linear(model, layer), small[key_a(layer)], small[key_b(layer)]).double()
        base.merge(small)
    merged = linear(model, layer).get_parameter("weight").data.double()
    assert torch.equal(merged, (exact + total).float().to(torch.bfloat16).double())
    base.reset()
    assert torch.equal(linear(model, layer).get_parameter("weight").data.double(), exact)


def test_rank_zero_is_nothing(llama):
    layer, before = _LAYERS["llama"][0], _logits(llama)
    MergedBase(llama).merge({key_a(layer): np.zeros((0, 64), np.float32), key_b(layer): np.zeros((64, 0), np.float32)})
    assert torch.equal(_logits(llama), before)


@pytest.mark.parametrize(("alpha", "rslora"), [(6.0, False), (6.0, True)])
def test_a_directory_we_write_is_loaded_by_peft_unchanged(case, tmp_path, alpha, rslora):
    model, layers = case
    spec = LoraSpec(layers, 4, alpha, rslora=rslora)
    factors = _factors(model, spec)
    save_peft(tmp_path, factors, rank=4, alpha=alpha, rslora=rslora)
    base = MergedBase(model)
    base.merge(load_peft(tmp_path))
    merged = _logits(model)
    base.reset()
    loaded = PeftModel.from_pretrained(model, tmp_path)
    assert torch.allclose(_logits(loaded), merged, atol=1e-4)


def test_mixed_ranks_survive_the_directory(llama, tmp_path):
    layers = _LAYERS["llama"][:2]
    factors = {
        **_factors(llama, LoraSpec(layers[:1], 5, 5)),
        **_factors(llama, LoraSpec(layers[1:], 2, 2)),
    }
    save_peft(tmp_path, factors, rank=5, alpha=5)
    loaded = PeftModel.from_pretrained(llama, tmp_path)
    got = {n: w.shape for n, w in loaded.named_parameters() if "lora_A" in n}
    assert sorted(got.values()) == [(2, 64), (5, 64)]


@pytest.mark.parametrize(
    ("layer", "rank", "says"),
    [("model.layers.9.self_attn.q_proj", 4, "layers.9"), ("model.norm", 4, "linear"), (_LAYERS["llama"][0], 5, "/A")],
)
def test_layers_and_factors_that_do_not_fit(llama, layer, rank, says):
    factors = {key_a(layer): np.zeros((4, 64), np.float32), key_b(layer): np.zeros((64, 4), np.float32)}
    before = _logits(llama)
    with pytest.raises(ModelError, match=says), injected(llama, LoraSpec((layer,), rank, 8), factors):
        pass
    assert torch.equal(_logits(llama), before)


def test_a_bad_layer_among_good_ones_merges_nothing(llama):
    good, before = _LAYERS["llama"][0], _logits(llama)
    factors = _factors(llama, LoraSpec((good,), 2, 2))
    factors |= {key_a("nowhere"): np.zeros((2, 3), np.float32), key_b("nowhere"): np.zeros((3, 2), np.float32)}
    with pytest.raises(ModelError, match="nowhere"):
        MergedBase(llama).merge(factors)
    assert torch.equal(_logits(llama), before)


class Int8Linear(nn.Linear):
    """A quantised layer: integers and one scale for each output."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).T


def test_a_quantised_base_is_never_merged_into(llama):
    """Stacks stay beside it: the integers keep every bit, outputs and gradients are those of a merged weight."""
    name = "model.layers.0.self_attn.q_proj"
    parent, old = llama.get_submodule("model.layers.0.self_attn"), llama.get_submodule(name)
    parent.q_proj = layer = Int8Linear(old)
    try:
        bits, rng = layer.weight.clone(), np.random.Generator(np.random.Philox(key=0))
        x = torch.from_numpy(rng.normal(size=(2, 5, 64)).astype(np.float32))
        plain, base, want = layer(x), MergedBase(llama), layer.weight.float() * layer.scale
        for rank in (3, 0, 2):
            a, b = rng.normal(size=(rank, 64)).astype(np.float32), rng.normal(size=(64, rank)).astype(np.float32)
            base.merge({key_a(name): a, key_b(name): b})
            want = want + torch.from_numpy(b @ a)
        assert torch.equal(layer.weight, bits)
        assert torch.allclose(layer(x), x @ want.T, atol=1e-4)
        spec = LoraSpec((name,), 2, 4.0)
        with injected(llama, spec, fresh_factors(llama, spec, 1)) as adapter:
            assert torch.allclose(llama.get_submodule(name)(x), x @ want.T, atol=1e-4)
            llama.get_submodule(name)(x).square().sum().backward()
            assert all(weight.grad is not None for weight in adapter.weights.values())
        base.reset()
        assert torch.equal(layer(x), plain)
    finally:
        parent.q_proj = old


def test_a_job_goes_back_to_its_base_bit_for_bit(llama):
    name = "model.layers.0.self_attn.q_proj"
    weight = llama.get_submodule(name).weight
    before, factors = weight.clone(), fresh_factors(llama, LoraSpec((name,), 2, 4.0), 1)
    factors[key_b(name)] += 1
    worker = SimpleNamespace(base=MergedBase(llama), attached=None, memory={})
    job = TorchJob(worker, Member("a", 2, 4.0), 0, 0)
    for _ in range(3):
        job.merge(factors)
    job.attach(LoraSpec((name,), 2, 4.0), factors)
    assert not torch.equal(weight, before)
    job.rebase()
    assert torch.equal(weight, before)
    assert worker.attached is None
    job.merge(factors)
    once = weight.clone()
    job.rebase()
    job.merge(factors)
    assert torch.equal(weight, once)
    job.rebase()
