"""`fedtune export` of a FedKSeed run: a model or an adapter that loads by itself and is what the run's clients hold."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedtune.base import open_base
from fedtune.cli.export import export
from fedtune.method import Member
from fedtune.methods import FedKSeed
from fedtune.training import zo
from fedtune.training.models import load_model

OPTIONS = {"all": {}, "sparse": {"density": 0.5}, "lora": {"rank": 2, "target_modules": ("q_proj", "down_proj")}}


def _run(tiny_folder, folder, train):
    """A run's result: one round, whose client sends ones."""
    method = FedKSeed(seeds=128, steps=40, learning_rate=1e-3, train=train, **OPTIONS[train])
    state = method.init(open_base(tiny_folder), 3)
    update = {
        "seeds": np.arange(40, dtype=np.int32), "scalars": np.ones(40, np.float32), "model": np.zeros(32, np.uint8),
    }  # fmt: skip
    state = method.finish(state, method.fold(None, update, Member("a"), 5), 5)
    folder.mkdir()
    method.export(state, folder, str(tiny_folder))


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
