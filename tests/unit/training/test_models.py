import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fedtune.base import open_base
from fedtune.errors import ModelError
from fedtune.locate import locate_model
from fedtune.training.models import choose_device, load_model, resolve_model
from fedtune.training.tiny import make_tiny

_CPU = torch.device("cpu")


def test_tiny_is_an_ordinary_folder_that_every_part_can_read(tiny_folder):
    model, tokenizer = load_model(tiny_folder, "float32", _CPU)
    base = open_base(tiny_folder)
    assert model.config.model_type == "llama"
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training
    shapes = {spec.name: spec.shape for spec in base.weights.specs}
    assert shapes["model.layers.0.self_attn.v_proj.weight"] == (32, 64)
    assert set(shapes) <= set(model.state_dict())
    text = "Größe, 42 and\n\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())


def test_tiny_is_a_function_of_its_seed(tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny(tmp_path / name, steps=2, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    digests = [open_base(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_bfloat16_weights(tiny_folder):
    model, _ = load_model(tiny_folder, "bfloat16", _CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_folder_is_its_own_answer(tiny_folder):
    assert resolve_model(str(tiny_folder)) == tiny_folder


def test_built_in_models_are_made_where_the_coordinator_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setitem(resolve_model.__globals__["BUILT_IN"], "tiny", lambda folder: make_tiny(folder, steps=0))
    assert resolve_model("tiny") == locate_model("tiny")


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere/at/all", "", "a/b/c"])
def test_names_of_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="smollm2-135m"):
        resolve_model(name)


def test_a_hub_model(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("fedtune.hub.hub_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("someone/some-model-that-is-nowhere", "v1") == tmp_path
    assert asked["revision"] == "v1"
    assert "*.bin" not in asked["patterns"]
    assert "*.py" not in asked["patterns"]


def test_damaged_folders(tiny_folder, tmp_path):
    for missing in ("config.json", "model.safetensors", "tokenizer.json"):
        copy = tmp_path / missing
        shutil.copytree(tiny_folder, copy)
        (copy / missing).unlink()
        if missing == "tokenizer.json":
            (copy / "tokenizer_config.json").unlink()
        with pytest.raises(ModelError):
            load_model(copy, "float32", _CPU)


def test_code_that_comes_with_a_model_is_not_run(tiny_folder, tmp_path):
    copy = tmp_path / "evil"
    shutil.copytree(tiny_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        load_model(copy, "float32", _CPU)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_read(tiny_folder, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_model(copy, "float32", _CPU)


def test_devices():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == _CPU
    for name in ("teapot", "cuda:99"):
        with pytest.raises(ModelError, match=name):
            choose_device(name)
