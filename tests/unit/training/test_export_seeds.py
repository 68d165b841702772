"""`fedtune export` of a FedKSeed run: a model or an adapter that loads by itself and is what the run's clients hold."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedtune.base import open_base
from fedtune.cli.evaluate import _check_fit
from fedtune.cli.export import check_seeds, export
from fedtune.config import parse
from fedtune.config.schema import ModelConfig
from fedtune.errors import ModelError
from fedtune.method import Member
from fedtune.methods import FedKSeed
from fedtune.methods.fedkseed import FILE
from fedtune.training import zo
from fedtune.training.models import load_model, resolve_model

OPTIONS = {"all": {}, "sparse": {"density": 0.5}, "lora": {"rank": 2, "target_modules": ("q_proj", "down_proj")}}


def _run(tiny_folder, folder, train, name=""):
    """A run's result: one round, whose client sends ones."""
    method = FedKSeed(seeds=128, steps=40, learning_rate=1e-3, train=train, **OPTIONS[train])
    state = method.init(open_base(tiny_folder), 3)
    update = {
        "seeds": np.arange(40, dtype=np.int32), "scalars": np.ones(40, np.float32), "model": np.zeros(32, np.uint8),
    }  # fmt: skip
    state = method.finish(state, method.fold(None, update, Member("a"), 5), 5)
    folder.mkdir()
    method.export(state, folder, name or str(tiny_folder))


def test_another_base_of_the_same_shape_is_refused_by_evaluate_and_export(tiny_folder, tmp_path, capsys):
    _run(tiny_folder, tmp_path / "result", "all")
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = replace(parse({"method": {"name": "fedkseed"}}), model=ModelConfig(name=str(other)))
    with pytest.raises(ModelError, match=rf"a run on {other} .* got one of {tiny_folder} .*model\.name"):
        _check_fit(config, "result", tmp_path / "result")
    with pytest.raises(ModelError, match=rf"a run on {other} .* got one of {tiny_folder} .*--base"):
        export(tmp_path / "result", tmp_path / "out", 0, False, None, str(other), "float32")
    _check_fit(replace(config, model=ModelConfig(name=str(tiny_folder))), "result", tmp_path / "result")
    assert "note" not in capsys.readouterr().err


def test_a_result_of_an_older_version_is_taken_with_a_note(tiny_folder, tmp_path, capsys):
    _run(tiny_folder, tmp_path / "result", "all")
    with safe_open(tmp_path / "result" / FILE, framework="pt") as file:
        about = {key: text for key, text in file.metadata().items() if key != "base_digest"}
    save_file(load_file(tmp_path / "result" / FILE), tmp_path / "result" / FILE, about)
    check_seeds(tmp_path / "result", "runs/old", "mine", tiny_folder, "")
    assert f"runs/old does not say which weights it was made on ({tiny_folder})" in capsys.readouterr().err


def test_an_exported_adapter_names_a_base_that_loads_and_has_a_card(tmp_path):
    _run(resolve_model("tiny"), tmp_path / "result", "lora", "tiny")
    export(tmp_path / "result", tmp_path / "out", 0, False, None, "", "float32")
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == resolve_model("tiny").resolve()
    assert "resolve_model('tiny')" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("train", "merge"), [("all", False), ("sparse", False), ("lora", False), ("lora", True)])
def test_what_is_exported_loads_by_itself(tiny_folder, tmp_path, train, merge):
    _run(tiny_folder, tmp_path / "result", train)
    export(tmp_path / "result", tmp_path / "out", 0, merge, None, "", "float32")
    model, _ = load_model(tiny_folder, "float32", torch.device("cpu"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        held = zo.rebuilt(model, tmp_path / "result")
        if train == "lora":
            with held.walk(zo.Pool("hadamard", 3, 128)):
                want = model(ids).logits
        else:
            want = model(ids).logits
        if train == "lora" and not merge:
            plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
            got = PeftModel.from_pretrained(plain, tmp_path / "out").eval()(ids).logits
        else:
            got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert (want - before).abs().max() > 1e-3
