"""A base model whose own weights are changed, which can always be had back as it was.

    w = w_0 + change        rounded once; where the change is 0, w has the very bits of w_0

Tied weights are changed under the first of their names. Names that are no parameter of the model (a checkpoint may
hold tables that are computed) stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import nn
from transformers import PreTrainedModel

from fedtune.errors import ModelError, problem
from fedtune.methods.fedavg import FILE
from fedtune.tensors import Array, Tensors


class ShiftedBase:
    """A model, and how far its weights are from the base's.

    Attributes:
        model: the model.
        change: the last one, by name; a tensor that has not changed yet has one axis more, of length 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.change: Tensors = {}
        self._base: dict[nn.Parameter, torch.Tensor] = {}

    def shift(self, change: Tensors) -> None:
        """Sets each weight that `change` names to base + change.

        Raises:
            ModelError: a shape does not fit, or no name is a weight of the model; nothing has changed then.
        """
        weights = self._weights(change)
        self.change = dict(change)
        for name, weight in weights.items():
            base = self._base.setdefault(weight, weight.data)
            if change[name].size:
                by = torch.from_numpy(np.array(change[name], np.float32)).to(base.device)
                weight.data = torch.where(by == 0, base, (base.float() + by).to(base.dtype))

    def reset(self) -> None:
        """Puts the base back, bit for bit."""
        for weight, base in self._base.items():
            weight.data = base
        self._base, self.change = {}, {}

    @contextmanager
    def moving(self) -> Iterator[dict[str, nn.Parameter]]:
        """Lets the weights that `change` names be trained for the length of a `with` block; afterwards they are back.

        Raises:
            ModelError: they are not float32, and AdamW's small steps would be rounded away.
        """
        weights = self._weights(self.change)
        narrow = next((name for name, weight in weights.items() if weight.dtype != torch.float32), None)
        if narrow:
            remedy = "Set model.dtype = 'float32'; training.autocast computes in bfloat16"
            raise ModelError(problem(f"dtype of {narrow}", "torch.float32", weights[narrow].dtype, remedy))
        before = {weight: weight.data for weight in weights.values()}
        try:
            for weight, data in before.items():
                weight.data = data.clone()
                weight.requires_grad_(True)
            yield weights
        finally:
            for weight, data in before.items():
                weight.data, weight.grad = data, None
                weight.requires_grad_(False)

    def _weights(self, change: Tensors) -> dict[str, nn.Parameter]:
        known = dict(self.model.named_parameters(remove_duplicate=False))
        found: dict[str, nn.Parameter] = {}
        for name, array in change.items():
            weight = known.get(name)
            if weight is None or any(weight is other for other in found.values()):
                continue
            shape = array.shape if array.size else array.shape[1:]
            if tuple(weight.shape) != shape:
                raise ModelError(problem(f"change of {name}", tuple(weight.shape), shape))
            found[name] = weight
        if change and not found:
            raise ModelError(problem("change", "names of the model's weights", list(change)[:3]))
        return found


def moved(weights: dict[str, nn.Parameter], before: dict[str, torch.Tensor], names: Tensors) -> dict[str, Array]:
    """Returns how far weights are from where they were, float32; 0 for names that are no weight of their own."""
    return {
        name: (weights[name].detach() - before[name]).cpu().numpy()
        if name in weights
        else np.zeros(array.shape if array.size else array.shape[1:], np.float32)
        for name, array in names.items()
    }


def load_change(folder: Path) -> dict[str, Array]:
    """Reads what `fedtune.methods.fedavg.save_change` wrote; raises ModelError where there is nothing of the kind."""
    try:
        change: dict[str, Array] = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(problem(str(folder / FILE), "the change that a FedAvg run made", error)) from error
    return change
