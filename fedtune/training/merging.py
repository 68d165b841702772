"""A base model into which adapters are merged, and which can always be had back as it was."""

import torch
from torch import nn
from transformers import PreTrainedModel

from fedtune.errors import ModelError, problem
from fedtune.lora import key_a, key_b, layers_of
from fedtune.tensors import Tensors
from fedtune.training.lora import change, features, linear


class MergedBase:
    """A model plus the sum of all B A merged so far.

    Merging makes new weights and keeps the old ones, which cost nothing where they are mapped from a file. The sum is
    held in float32, so a bfloat16 weight is rounded once however many rounds are merged.

    Attributes:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._original: dict[str, torch.Tensor] = {}
        self._exact: dict[str, torch.Tensor] = {}

    def merge(self, factors: Tensors) -> None:
        """Adds B A to the weights of each layer of `factors` (`layer/A` (R, I), `layer/B` (O, R)).

        Raises:
            ModelError: a layer is not in the model, or its factors do not fit; nothing has been merged then.
        """
        layers = layers_of(factors)
        for layer in layers:
            self._check(layer, factors)
        for layer in layers:
            if factors[key_a(layer)].shape[0]:
                self._add(layer, linear(self.model, layer), factors)

    def reset(self) -> None:
        """Puts the original weights back, bit for bit."""
        for layer, weight in self._original.items():
            linear(self.model, layer).get_parameter("weight").data = weight
        self._original, self._exact = {}, {}

    def _add(self, layer: str, module: nn.Module, factors: Tensors) -> None:
        weight = module.get_parameter("weight")
        self._original.setdefault(layer, weight.data)
        start = self._exact.get(layer, weight.data)
        total = start.float() + change(module, factors[key_a(layer)], factors[key_b(layer)])
        if weight.dtype != torch.float32:
            self._exact[layer] = total
        weight.data = total.to(weight.dtype)

    def _check(self, layer: str, factors: Tensors) -> None:
        inputs, outputs = features(linear(self.model, layer))
        a_ri, b_or = factors[key_a(layer)], factors[key_b(layer)]
        want = (a_ri.shape[0], inputs), (outputs, a_ri.shape[0])
        if (a_ri.shape, b_or.shape) != want:
            raise ModelError(problem(f"factors of {layer}", want, (a_ri.shape, b_or.shape)))
