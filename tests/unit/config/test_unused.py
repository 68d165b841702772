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
    assert said == "training.steps, training.learning_rate: not used by fedkseed, whose keys are in [method]"


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_said_of_defaults(name):
    assert _said(name) == ""
    assert set(METHODS[name].unused) <= {field.name for field in fields(TrainingConfig)}


def test_methods_with_gradients_use_all_of_it():
    assert _said("flora", steps=4, learning_rate=1e-3, prox_mu=0.1, schedule="cosine") == ""
