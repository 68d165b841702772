"""A base model into which adapters are merged, and which can always be had back as it was."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from fedtune.errors import ModelError, problem
from fedtune.lora import key_a, key_b, layers_of
from fedtune.tensors import Array, Tensors
from fedtune.training.lora import change, features, linear


class MergedBase:
    """A model plus the sum of all B A merged so far.

    Merging makes new weights and keeps the old ones, which cost nothing where they are mapped from a file. The sum is
    held in float32, so a bfloat16 weight is rounded once however many rounds are merged.

    Nothing is merged into a quantised weight (integers, or floats of one byte), which would round the change away: the
    factors stay beside it, and their product with the layer's input is added to its output.

    An embedding whose table is the output head as well is untied by merging: an adapter changes what goes in, and so
    does the merged model, alone.

    Attributes:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self._shared: dict[str, nn.Parameter] = {}
        self._original: dict[str, torch.Tensor] = {}
        self._exact: dict[str, torch.Tensor] = {}
        self._beside: dict[str, _Beside] = {}

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
        for layer, shared in self._shared.items():
            linear(self.model, layer).register_parameter("weight", shared)
            self.model.config.tie_word_embeddings = self._tied
        for beside in self._beside.values():
            beside.hook.remove()
        self._original, self._exact, self._beside, self._shared = {}, {}, {}, {}

    def _add(self, layer: str, module: nn.Module, factors: Tensors) -> None:
        weight = module.get_parameter("weight")
        if not weight.is_floating_point() or weight.element_size() == 1:
            if layer not in self._beside:
                self._beside[layer] = _Beside(module)
            self._beside[layer].add(factors[key_a(layer)], factors[key_b(layer)])
            return
        if isinstance(module, nn.Embedding) and layer not in self._shared:
            self._shared[layer] = weight
            weight = nn.Parameter(weight.data, requires_grad=False)
            module.register_parameter("weight", weight)
            self.model.config.tie_word_embeddings = False
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


class _Beside:
    """Factors beside a layer whose weight stays as it is, in the order in which they came."""

    def __init__(self, module: nn.Module) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._device = module.get_parameter("weight").device
        self.hook = module.register_forward_hook(self._added)

    def add(self, a_ri: Array, b_or: Array) -> None:
        """Adds B A to what the layer computes."""
        a, b = (torch.from_numpy(factor.astype(np.float32)).to(self._device) for factor in (a_ri, b_or))
        self._pairs.append((a, b))

    def _added(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        table = isinstance(module, nn.Embedding)
        down = [a.T[inputs[0]] if table else inputs[0].float() @ a.T for a, _ in self._pairs]
        change = torch.stack([x @ b.T for x, (_, b) in zip(down, self._pairs, strict=True)]).sum(0)
        scale = getattr(module, "embed_scale", 1.0)  # Gemma 3 multiplies what it has looked up
        return output + (change * scale).to(output.dtype)
