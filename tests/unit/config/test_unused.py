"""Keys of [training] without effect are named, and only those."""

from dataclasses import fields

import pytest

from fedtune.config import parse
from fedtune.config.schema import TrainingConfig
from fedtune.config.unused import unused
from fedtune.methods import METHODS


def _said(method, **training):
    return unused(parse({"method": {"name": method}, "training": training}))


def test_what_a_method_without_gradients_does_not_use_is_named():
    said = _said("fedkseed", steps=4, learning_rate=1e-3, batch_size=2, max_length=64)
    assert said == "training.steps, training.learning_rate: not used by fedkseed; see its own in [method]"


def test_every_key_is_known_to_be_used_or_not():
    """A new key of [training] has to be put on one of the two lists."""
    used = {"batch_size", "accumulate", "max_length", "packing", "autocast"}
    assert used | set(METHODS["fedkseed"].unused) == {field.name for field in fields(TrainingConfig)}
    assert not used & set(METHODS["fedkseed"].unused)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_said_of_defaults(name):
    assert _said(name) == ""
    assert set(METHODS[name].unused) <= {field.name for field in fields(TrainingConfig)}


def test_methods_with_gradients_use_all_of_it():
    assert _said("flora", steps=4, learning_rate=1e-3, prox_mu=0.1, schedule="cosine") == ""


def test_a_rate_of_b_is_for_methods_that_have_one():
    assert _said("fedavg", lora_plus=4.0).startswith("training.lora_plus: not used by fedavg")
    assert _said("ffa-lora", lora_plus=4.0) == ""


def test_keys_that_a_codec_does_not_use_are_named():
    links = {"uplink": {"codec": "int8", "density": 0.5}, "downlink": {"codec": "ternary", "rank": 4, "alpha": 2.0}}
    said = unused(parse({"method": {"name": "fedavg-lora", **links}}))
    assert said == "method.uplink.density: not used by codec int8; method.downlink.rank: not used by codec ternary"
    budget = {"name": "flora", "uplink": {"codec": "ternary", "density": 0.5, "budget_kb": 50}}
    assert unused(parse({"method": budget})) == "method.uplink.density: not used beside budget_kb"
