"""Merging against each paper's rule written out in numpy."""

import warnings

import numpy as np
import pytest

pytest.importorskip("peft")

from fedtune.errors import ConfigError, ModelError
from fedtune.merging import METHODS, Merge, merge


def draws(count=3, name="m.ia3_l", size=100):
    rng = np.random.Generator(np.random.Philox(1))
    return [{name: rng.normal(size=size).astype(np.float32)} for _ in range(count)]


def stack(changes):
    return np.stack([next(iter(c.values())) for c in changes]).astype(np.float64)


def value(out):
    return next(iter(out.values()))


def test_average_and_sum():
    changes = draws()
    t = stack(changes)
    np.testing.assert_allclose(value(merge(changes, Merge(method="task-arithmetic"))), t.sum(0), atol=1e-6)
    weighted = Merge(method="average", weights=(3, 1, 0))
    np.testing.assert_allclose(value(merge(changes, weighted)), (3 * t[0] + t[1]) / 4, atol=1e-6)


def test_ties():
    changes = draws()
    t = stack(changes)
    for row in t:
        row[np.argsort(-np.abs(row))[20:]] = 0
    sign = np.where(t.sum(0) >= 0, 1, -1)
    agree = np.sign(t) == sign
    want = (t * agree).sum(0) / np.maximum(agree.sum(0), 1)
    np.testing.assert_allclose(value(merge(changes, Merge(method="ties", density=0.2))), want, atol=1e-6)


def test_breadcrumbs_leaves_out_both_ends():
    changes = draws()
    t = stack(changes)
    for row in t:
        order = np.argsort(-np.abs(row))
        row[order[:1]] = 0
        row[order[21:]] = 0
    np.testing.assert_allclose(value(merge(changes, Merge(method="breadcrumbs", density=0.2))), t.sum(0), atol=1e-6)


def test_dare_is_unbiased_and_follows_its_seed():
    changes = [{"m.ia3_l": np.ones(20_000, np.float32)}] * 2
    one = value(merge(changes, Merge(method="dare", density=0.5)))
    np.testing.assert_array_equal(one, value(merge(changes, Merge(method="dare", density=0.5))))
    assert not np.array_equal(one, value(merge(changes, Merge(method="dare", density=0.5, seed=1))))
    assert set(np.unique(one)) == {0, 2, 4}
    assert one.mean() == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    "names", [("m.lora_A.weight", "m.lora_B.weight"), ("m.lora_embedding_A", "m.lora_embedding_B")]
)
def test_a_lora_weight_is_shared_between_a_and_b(names):
    rng = np.random.Generator(np.random.Philox(2))
    one = {name: rng.normal(size=s).astype(np.float32) for name, s in zip(names, ((2, 5), (4, 2)), strict=True)}
    for weight in (4.0, -4.0):
        out = merge([one, {n: 0 * a for n, a in one.items()}], Merge(method="task-arithmetic", weights=(weight, 1)))
        a, b = (out[name] for name in names)
        np.testing.assert_allclose(b @ a, weight * one[names[1]] @ one[names[0]], rtol=1e-5)


def test_the_torch_generator_is_left_alone():
    import torch

    before = torch.random.get_rng_state()
    merge(draws(), Merge(method="dare"))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("method", [method for method in METHODS if method != "stack"])
def test_dtypes_stay(method):
    changes = [{"m.ia3_l": c["m.ia3_l"].astype(np.float16)} for c in draws()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value(merge(changes, Merge(method=method, density=0.5))).dtype == np.float16


def test_mistakes_are_told_in_words():
    with pytest.raises(ConfigError, match="--method"):
        Merge(method="soup")
    with pytest.raises(ConfigError, match="--density"):
        Merge(density=0)
    with pytest.raises(ConfigError, match=r"fedtune\.merging\.stack"):
        merge(draws(), Merge(method="stack"))
    with pytest.raises(ConfigError, match="--weights"):
        merge(draws(), Merge(weights=(1, 2)))
    with pytest.raises(ConfigError, match="--weights"):
        merge(draws(2), Merge(method="average", weights=(1, -1)))
    with pytest.raises(ModelError, match="adapter 2"):
        merge([draws(1)[0], draws(1, size=5)[0]], Merge())


LINEAR = ("m.lora_A.weight", "m.lora_B.weight")


def adapters(count, names=LINEAR):
    rng = np.random.Generator(np.random.Philox(3))
    shapes = dict(zip(names, ((2, 5), (4, 2)), strict=True))
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)]


def product(adapter, names=LINEAR):
    a, b = (adapter[name].astype(np.float64) for name in names)
    return b @ a


@pytest.mark.parametrize("names", [LINEAR, ("m.lora_embedding_A", "m.lora_embedding_B")])
def test_an_average_is_the_mean_of_a_and_of_b(names):
    one, other = adapters(2, names)
    same = merge([one] * 3, Merge(method="average"))
    np.testing.assert_allclose(product(same, names), product(one, names), rtol=1e-4, atol=1e-6)
    mean = merge([one, other], Merge(method="average", weights=(3, 1)))
    for name in names:
        np.testing.assert_allclose(mean[name], (3 * one[name] + other[name]) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, -0.5), (4.0, 0.0)])
def test_a_sum_of_lora_adapters_is_that_of_peft(weights):
    import torch
    from peft import LoraConfig, get_peft_model

    ours = adapters(2)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["m"])
    model = get_peft_model(torch.nn.ModuleDict({"m": torch.nn.Linear(5, 4)}), config, adapter_name="0")
    model.add_adapter("1", config)
    layer = model.base_model.model["m"]
    for number, adapter in enumerate(ours):
        layer.lora_A[str(number)].weight.data = torch.from_numpy(adapter[LINEAR[0]])
        layer.lora_B[str(number)].weight.data = torch.from_numpy(adapter[LINEAR[1]])
    model.base_model.add_weighted_adapter(["0", "1"], list(weights), "both", combination_type="linear")
    merged = merge(ours, Merge(method="task-arithmetic", weights=weights))
    np.testing.assert_allclose(product(merged), layer.get_delta_weight("both").detach().numpy(), rtol=1e-4, atol=1e-6)


WHOLE = ("m.lora_magnitude_vector", "lm_head.weight", "m.bias", "m.lora_B.bias")


@pytest.mark.parametrize("name", WHOLE)
def test_whole_tensors_have_a_mean_and_no_sum(name):
    changes = [{**adapter, name: np.full(4, 3, np.float32)} for adapter in adapters(2)]
    np.testing.assert_allclose(merge(changes, Merge(method="average"))[name], 3)
    for method in set(METHODS) - {"average", "stack"}:
        with pytest.raises(ModelError, match=f"{name}.*average"):
            merge(changes, Merge(method=method))
