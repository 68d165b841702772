"""Factors as arrays: names, draws, and PEFT directories."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fedtune.errors import ConfigError, FedtuneError, ModelError
from fedtune.lora import (
    ALL_LINEAR,
    Layer,
    LoraSpec,
    factor_name,
    find_layers,
    is_table,
    kaiming_uniform,
    key_a,
    key_b,
    layers_of,
    load_peft,
    lora_scale,
    save_peft,
    save_product,
)
from fedtune.tensors import Manifest, TensorSpec, digest


def _manifest(**shapes):
    return Manifest(tuple(TensorSpec(name.replace("__", "."), shape, "float32") for name, shape in shapes.items()))


LLAMA = _manifest(
    lm_head__weight=(50, 8),
    model__embed_tokens__weight=(50, 8),
    model__layers__0__input_layernorm__weight=(8,),
    model__layers__0__mlp__down_proj__weight=(8, 24),
    model__layers__0__mlp__up_proj__weight=(24, 8),
    model__layers__0__self_attn__k_proj__weight=(4, 8),
    model__layers__0__self_attn__q_proj__bias=(8,),
    model__layers__0__self_attn__q_proj__weight=(8, 8),
)
GPT2 = _manifest(
    transformer__h__0__attn__bias=(1, 1, 9, 9),
    transformer__h__0__attn__c_attn__bias=(24,),
    transformer__h__0__attn__c_attn__weight=(8, 24),
    transformer__h__0__ln_1__weight=(8,),
    transformer__h__0__mlp__c_fc__weight=(8, 32),
    transformer__wpe__weight=(9, 8),
    transformer__wte__weight=(50, 8),
)


def test_scales():
    assert lora_scale(8, 16) == 2
    assert lora_scale(16, 16, rslora=True) == 4
    assert LoraSpec(("x",), 4, 6.0).scale == 1.5
    assert LoraSpec(("x",), 4, 6.0, rslora=True).scale == 3


def test_keys_and_layers():
    names = [key_a("m.q"), key_b("m.q"), key_a("m.k"), key_b("m.k")]
    assert names == ["m.q/A", "m.q/B", "m.k/A", "m.k/B"]
    assert layers_of(names) == layers_of(dict.fromkeys(names)) == ["m.q", "m.k"]


def test_find_layers_by_last_name_and_by_path():
    q = Layer("model.layers.0.self_attn.q_proj", inputs=8, outputs=8)
    k = Layer("model.layers.0.self_attn.k_proj", inputs=8, outputs=4)
    assert find_layers(LLAMA, ["q_proj", "k_proj"]) == [k, q]
    assert find_layers(LLAMA, ["self_attn.q_proj"]) == [q]
    assert find_layers(LLAMA, ["model.layers.0.self_attn.q_proj", "q_proj"]) == [q]


def test_all_linear_leaves_embeddings_head_and_norms_alone():
    found = {layer.name.rsplit(".", 1)[-1] for layer in find_layers(LLAMA, [ALL_LINEAR])}
    assert found == {"down_proj", "up_proj", "k_proj", "q_proj"}
    assert {layer.name for layer in find_layers(GPT2, [ALL_LINEAR], transposed=True)} == {
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.mlp.c_fc",
    }


def test_transposed_weights_are_input_by_output():
    assert find_layers(GPT2, ["c_attn"], transposed=True) == [Layer("transformer.h.0.attn.c_attn", 8, 24)]
    assert find_layers(GPT2, ["c_attn"]) == [Layer("transformer.h.0.attn.c_attn", 24, 8)]


@pytest.mark.parametrize("targets", [["q_proj", "v_projj"], ["proj"], ["q_proj.weight"], [""]])
def test_a_target_that_matches_nothing_is_named_with_the_choices(targets):
    with pytest.raises(ConfigError, match=r"method.target_modules: .*'down_proj'.*'q_proj'.*, got '" + targets[-1]):
        find_layers(LLAMA, targets)


def test_no_linear_layer_at_all():
    with pytest.raises(ConfigError, match="at least one linear layer"):
        find_layers(_manifest(a__norm__weight=(4,)), [ALL_LINEAR])


def test_kaiming_uniform_golden():
    a = kaiming_uniform(np.random.Generator(np.random.Philox(key=7)), 2, 3)
    assert a.dtype == np.float32
    assert a.tolist() == [
        [0.42963340878486633, -0.23629170656204224, -0.09226325154304504],
        [-0.10924362391233444, -0.48169177770614624, 0.22705210745334625],
    ]
    a = kaiming_uniform(np.random.Generator(np.random.Philox(key=7)), 64, 576)
    assert digest({"k": a}) == "d04b05e406a32017cbdc1b86f57054c4fbb5c8b32afea199b5ab3fad57b66f01"
    assert np.abs(a).max() <= 1 / 24
    assert abs(float(a.std()) * 24 * 3**0.5 - 1) < 0.02


def _factors(rng, *layers, dtype=np.float32):
    out = {}
    for name, rank, inputs, outputs in layers:
        out[key_a(name)] = rng.normal(size=(rank, inputs)).astype(dtype)
        out[key_b(name)] = rng.normal(size=(outputs, rank)).astype(dtype)
    return out


def test_peft_directory_has_the_golden_keys(tmp_path):
    rng = np.random.Generator(np.random.Philox(key=0))
    factors = _factors(rng, ("model.layers.0.q", 2, 3, 4), ("model.layers.0.v", 5, 3, 2), ("model.layers.1.q", 0, 3, 4))
    save_peft(tmp_path / "new" / "adapter", factors, rank=2, alpha=4.0, base_model="org/base")
    folder = tmp_path / "new" / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open(folder / "adapter_model.safetensors", "numpy") as stored:
        assert stored.metadata() == {"format": "pt"}
        assert {name: tuple(stored.get_tensor(name).shape) for name in stored.keys()} == {  # noqa: SIM118  # no mapping
            "base_model.model.model.layers.0.q.lora_A.weight": (2, 3),
            "base_model.model.model.layers.0.q.lora_B.weight": (4, 2),
            "base_model.model.model.layers.0.v.lora_A.weight": (5, 3),
            "base_model.model.model.layers.0.v.lora_B.weight": (2, 5),
        }
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 2,
        "lora_alpha": 4.0,
        "use_rslora": False,
        "target_modules": ["model.layers.0.q", "model.layers.0.v"],
        "rank_pattern": {"model.layers.0.v": 5},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-15), (np.float32, 1e-6), (ml_dtypes.bfloat16, 1e-2)])
def test_save_then_load_gives_the_scaled_product(tmp_path, rslora, dtype, error):
    rng = np.random.Generator(np.random.Philox(key=1))
    factors = _factors(rng, ("a.q", 4, 6, 5), ("a.v", 9, 6, 3), dtype=dtype)
    save_peft(tmp_path, factors, rank=4, alpha=6.0, rslora=rslora)
    back = load_peft(tmp_path)
    assert list(back) == list(factors)
    for layer, rank in (("a.q", 4), ("a.v", 9)):
        a, b = (factors[key(layer)].astype(np.float64) for key in (key_a, key_b))
        want = lora_scale(rank, 6.0, rslora) * b @ a
        got = back[key_b(layer)].astype(np.float64) @ back[key_a(layer)].astype(np.float64)
        assert np.abs(got - want).max() <= error * np.abs(want).max() * 4
        assert back[key_a(layer)].dtype == dtype


def test_save_writes_the_values_of_arrays_that_are_not_contiguous(tmp_path):
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4).T, np.arange(8, dtype=np.float32).reshape(4, 2).T
    save_peft(tmp_path, {"q/A": a, "q/B": b}, rank=4, alpha=4)
    back = load_peft(tmp_path)
    assert np.array_equal(back["q/A"], a)
    assert np.array_equal(back["q/B"], b)


def test_alpha_pattern_of_a_foreign_adapter_is_honoured(tmp_path):
    one = np.ones((1, 1), np.float32)
    save_peft(tmp_path, {"q/A": one, "q/B": one, "v/A": one, "v/B": one}, rank=1, alpha=2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {"v": 7}}))
    back = load_peft(tmp_path)
    assert (back["q/A"].item(), back["v/A"].item()) == (2, 7)


ONE = np.ones((1, 1), np.float32)
WHOLE = {"base_model.model.q.lora_A.weight": ONE, "base_model.model.q.lora_B.weight": ONE}


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (None, WHOLE),
        ("{", WHOLE),
        ("[]", WHOLE),
        ("5", WHOLE),
        ('{"peft_type": "LORA", "lora_alpha": 1}', None),
        ('{"peft_type": "LORA", "lora_alpha": 1}', b""),
        ('{"peft_type": "LORA", "lora_alpha": 1}', b"\xff" * 64),
        ('{"peft_type": "LORA"}', WHOLE),
        ('{"peft_type": "LORA", "lora_alpha": "x"}', WHOLE),
        ('{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": []}', WHOLE),
        ('{"peft_type": "LORA", "lora_alpha": 1}', dict(list(WHOLE.items())[:1])),
        ('{"peft_type": "LORA", "lora_alpha": 1, "use_dora": true}', WHOLE),
        ('{"peft_type": "IA3"}', WHOLE),
        ("{}", WHOLE),
    ],
)
def test_a_directory_that_is_no_lora_adapter_is_a_model_error(tmp_path, config, weights):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    if isinstance(weights, bytes):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    elif weights is not None:
        save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="expected"):
        load_peft(tmp_path)


def test_error_codes_are_distinct():
    codes = [kind.exit_code for kind in FedtuneError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


@pytest.mark.parametrize("transposed", [False, True])
def test_an_embedding_is_a_layer_whose_inputs_are_its_tokens(transposed):
    """Its weight is tokens x width whether linear weights are I x O or O x I; an output head is linear in any case."""
    base = _manifest(transformer__wte__weight=(50, 8), transformer__wpe__weight=(9, 8), lm_head__weight=(50, 8))
    found = find_layers(base, ("wte", "wpe", "lm_head"), transposed)
    assert found == [Layer("transformer.wte", 50, 8), Layer("transformer.wpe", 9, 8), Layer("lm_head", 8, 50)]


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens"])
def test_an_embedding_is_refused_with_the_reason_where_there_is_one(target):
    with pytest.raises(ConfigError, match=r"target_modules: expected linear layers, got model.embed_tokens. Because"):
        find_layers(LLAMA, ("q_proj", target), no_tables="Because")
    assert find_layers(LLAMA, ("q_proj",), no_tables="Because")


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("model.embed_tokens", True),
        ("transformer.wte", True),
        ("gpt_neox.embed_in", True),
        ("shared", True),
        ("embed_out", False),
        ("lm_head", False),
        ("model.layers.0.mlp.shared_expert_gate", False),
        ("model.embed.q_proj", False),
    ],
)
def test_embeddings_are_known_by_the_last_part_of_their_names(name, table):
    assert is_table(name) == table


def test_an_embedding_has_the_names_that_peft_gives_it(tmp_path):
    rng = np.random.Generator(np.random.Philox(key=3))
    factors = _factors(rng, ("m.embed_tokens", 2, 9, 4), ("m.q_proj", 2, 4, 4))
    save_peft(tmp_path, factors, rank=2, alpha=4.0)
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as stored:
        assert sorted(stored.keys()) == [
            "base_model.model.m.embed_tokens.lora_embedding_A",
            "base_model.model.m.embed_tokens.lora_embedding_B",
            "base_model.model.m.q_proj.lora_A.weight",
            "base_model.model.m.q_proj.lora_B.weight",
        ]
        assert {factor_name(name) for name in stored.keys()} == set(factors)  # noqa: SIM118  # no mapping
    back = load_peft(tmp_path)
    assert set(back) == set(factors)
    assert np.array_equal(back["m.embed_tokens/A"], 2 * factors["m.embed_tokens/A"])
    assert np.array_equal(back["m.embed_tokens/B"], factors["m.embed_tokens/B"])


def test_a_product_of_mixed_ranks_comes_back_as_it_was(tmp_path):
    rng = np.random.Generator(np.random.Philox(key=3))
    factors = {}
    for name, rank in (("m.0.q", 5), ("m.1.q", 2), ("m.2.q", 0), ("m.3.q", 5)):
        factors[key_a(name)] = rng.normal(size=(rank, 6)).astype(np.float32)
        factors[key_b(name)] = rng.normal(size=(7, rank)).astype(np.float32)
    save_product(tmp_path, factors)
    back = load_peft(tmp_path)
    assert layers_of(back) == ["m.0.q", "m.1.q", "m.3.q"]
    for name in layers_of(back):
        assert np.allclose(back[key_b(name)] @ back[key_a(name)], factors[key_b(name)] @ factors[key_a(name)])
