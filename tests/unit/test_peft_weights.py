"""What of an adapter can be compressed: IA3, and LoRA's pairs, of embeddings too; all else is refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedtune.codecs.ternary import Ternary
from fedtune.compressed import compress, decompress, load_weights
from fedtune.errors import ModelError, WireError
from fedtune.peft_weights import balance_lora

LAYER = "base_model.model.m.q"
TABLE = "base_model.model.m.embed_tokens"


def drawn(*shape, seed=1, size=1.0):
    return np.random.Generator(np.random.Philox(seed)).normal(0, size, shape).astype(np.float32)


def adapter(folder, more=(), kind="LORA", **config):
    weights = {f"{LAYER}.lora_A.weight": drawn(4, 60), f"{LAYER}.lora_B.weight": drawn(50, 4, size=0.01)} | dict(more)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4, "lora_alpha": 8} | config))
    return folder


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (f"{LAYER}.lora_magnitude_vector", {"use_dora": True}),
        ("base_model.model.lm_head.weight", {"modules_to_save": ["lm_head"]}),
        (f"{LAYER}.bias", {"bias": "lora_only"}),
        (f"{LAYER}.lora_B.bias", {"lora_bias": True}),
        ("base_model.model.m.embed_tokens.token_adapter.trainable_tokens_delta", {}),
    ],
)
@pytest.mark.parametrize("balanced", [True, False])
def test_tensors_that_are_not_measured_from_zero_are_refused(tmp_path, name, config, balanced):
    source = adapter(tmp_path / "a", {name: np.full(50, 3, np.float32)}, **config)
    with pytest.raises(ModelError, match=f"{name}.*merge_and_unload.*--base"):
        compress(source, tmp_path / "small", Ternary(), balanced=balanced)
    assert not (tmp_path / "small").exists()


def test_so_are_those_of_ia3_and_factors_of_many_experts(tmp_path):
    ia3 = tmp_path / "ia3"
    adapter(ia3, kind="IA3")
    with pytest.raises(ModelError, match="lora_A"):
        compress(ia3, tmp_path / "small", Ternary())
    experts = adapter(tmp_path / "experts", target_parameters=["experts.down_proj"])
    with pytest.raises(ModelError, match="target_parameters"):
        compress(experts, tmp_path / "small", Ternary())


@pytest.mark.parametrize("shape", [(50, 3), (50,), (50, 4, 2)])
def test_factors_that_do_not_fit_each_other_are_named(tmp_path, shape):
    source = adapter(tmp_path / "a", {f"{LAYER}.lora_B.weight": drawn(*shape)})
    with pytest.raises(ModelError, match=r"q\.lora_A\.weight: expected .*q\.lora_B\.weight"):
        compress(source, tmp_path / "small", Ternary())


@pytest.mark.parametrize("name", [f"{LAYER}2.lora_A.weight", f"{TABLE}.lora_embedding_B"])
def test_one_factor_without_the_other_is_named(tmp_path, name):
    source = adapter(tmp_path / "a", {name: drawn(4, 4)})
    with pytest.raises(ModelError, match=f"{name}.*without the other"):
        compress(source, tmp_path / "small", Ternary())


def test_a_dtype_that_is_not_carried_is_named_with_its_tensor_and_folder(tmp_path):
    source = adapter(tmp_path / "a", {"flag": np.array([True])})
    with pytest.raises(WireError, match=r"/a: flag: expected one of float64.* got bool"):
        compress(source, tmp_path / "small", Ternary())


def test_embeddings_keep_their_product_as_linear_layers_do(tmp_path):
    """A is what was trained, B is still what it was drawn from: the other way round than in a linear layer."""
    moved = drawn(4, 60, seed=2, size=0.01), drawn(50, 4, seed=3)
    table = {f"{TABLE}.lora_embedding_{side}": array for side, array in zip("AB", moved, strict=True)}
    source = adapter(tmp_path / "a", table)
    compress(source, tmp_path / "small", Ternary(scale="least-squares", sigma="tensor"))
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = load_weights(source), load_weights(tmp_path / "back")
    lost = [apart(before, after, LAYER, "lora_{}.weight"), apart(before, after, TABLE, "lora_embedding_{}")]
    assert max(lost) < 0.9
    assert max(lost) / min(lost) < 1.2


def apart(before, after, layer, end):
    """Relative error of B A."""
    one, two = (w[f"{layer}.{end.format('B')}"] @ w[f"{layer}.{end.format('A')}"] for w in (before, after))
    return np.linalg.norm(one - two) / np.linalg.norm(one)


def test_convolutions_keep_their_product_and_their_shapes():
    weights = {"c.lora_A.weight": drawn(4, 3, 5, 5), "c.lora_B.weight": drawn(6, 4, 1, 1, size=0.01)}
    after = balance_lora(weights)
    assert [array.shape for array in after.values()] == [(4, 3, 5, 5), (6, 4, 1, 1)]
    flat = [w["c.lora_B.weight"].reshape(6, 4) @ w["c.lora_A.weight"].reshape(4, -1) for w in (weights, after)]
    np.testing.assert_allclose(flat[0], flat[1], atol=1e-6)
    norms = [np.linalg.norm(array) for array in after.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_rank_zero_is_nothing_to_balance():
    weights = {"c.lora_A.weight": np.zeros((0, 3), np.float32), "c.lora_B.weight": np.zeros((6, 0), np.float32)}
    assert [array.shape for array in balance_lora(weights).values()] == [(0, 3), (6, 0)]
