"""LoRA on a torch model: put an adapter in through PEFT, read its factors, take it out, merge factors into a base.

Shapes: R rank, I input features, O output features; A_RI, B_OR. Linear weights are O x I, those of Conv1D and of
embeddings (whose I is the number of tokens) I x O.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ModelError, problem
from fedtune.lora import LoraSpec, first_factors, is_table, key_a, key_b, layers_of
from fedtune.method import Tail
from fedtune.tensors import Array, Tensors

_NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """The factors of an injected adapter, by the names the rest of fedtune uses (`layer/A`, `layer/B`)."""

    weights: dict[str, nn.Parameter]

    def trained(self) -> list[nn.Parameter]:
        """Those that are not frozen."""
        return [weight for weight in self.weights.values() if weight.requires_grad]

    def penalty(self, tail: Tail) -> torch.Tensor:
        """Returns weight * sum of |B[:, start:]| |A[start:]|, Frobenius, over all layers."""
        norms = {
            name: (weight[tail.start :] if name.endswith("/A") else weight[:, tail.start :]).norm()
            for name, weight in self.weights.items()
        }
        parts = [norms[key_a(layer)] * norms[key_b(layer)] for layer in layers_of(list(norms))]
        return tail.weight * torch.stack(parts).sum()

    def factors(self) -> dict[str, Array]:
        """Copies the factors out as float32 arrays."""
        return {name: weight.detach().float().cpu().numpy().copy() for name, weight in self.weights.items()}


@contextmanager
def injected(
    model: PreTrainedModel, spec: LoraSpec, factors: Tensors, frozen: Collection[str] = ()
) -> Iterator[Adapter]:
    """Puts an adapter with these factors into `model` for the length of a `with` block.

    Exactly its factors require a gradient, but for the sides named in `frozen` (`A`, `B`).

    Guarantees: afterwards the model holds the very modules and weights it held before, and its outputs are the same
    bit for bit.

    Raises:
        ModelError: a layer is not in the model, or a factor does not fit it.
    """
    before = {layer: linear(model, layer) for layer in spec.layers}
    for layer, module in before.items():
        _check_fit(layer, module, factors, spec.rank)
    untrained = [weight for weight in model.parameters() if not weight.requires_grad]
    try:
        with torch.random.fork_rng(devices=[]):  # new layers draw weights, which are replaced at once
            inject_adapter_in_model(_peft_config(spec, before), model, adapter_name=_NAME)
        yield Adapter(_load(model, spec, factors, frozen))
    finally:
        for layer, module in before.items():
            parent, _, child = layer.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if hasattr(model, "peft_config"):
            del model.peft_config
        for weight in untrained:
            weight.requires_grad_(False)


def fresh_factors(model: PreTrainedModel, spec: LoraSpec, seed: int) -> dict[str, Array]:
    """Draws factors of every layer, in the order of `spec.layers`, from `seed`; all products are zero. float32."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    factors: dict[str, Array] = {}
    for layer in spec.layers:
        inputs, outputs = features(linear(model, layer))
        factors[key_a(layer)], factors[key_b(layer)] = first_factors(rng, layer, spec.rank, inputs, outputs)
    return factors


def change(module: nn.Module, a_ri: Array, b_or: Array) -> torch.Tensor:
    """Returns B A in float32, laid out as the module's weight."""
    device = module.get_parameter("weight").device
    a = torch.from_numpy(a_ri.astype(np.float32)).to(device)
    b = torch.from_numpy(b_or.astype(np.float32)).to(device)
    return a.T @ b.T if isinstance(module, Conv1D | nn.Embedding) else b @ a


def linear(model: PreTrainedModel, layer: str) -> nn.Module:
    """Finds a linear layer, or an embedding, by its dotted name.

    Raises:
        ModelError: there is none, or it is a table that is not looked up by tokens alone (OPT's `embed_positions`).
    """
    try:
        module: nn.Module = model.get_submodule(layer)
    except AttributeError as error:
        raise ModelError(problem("layer", f"one of {type(model).__name__}", layer)) from error
    want = "an embedding" if is_table(layer) else "a linear layer"
    if not isinstance(module, nn.Embedding if is_table(layer) else nn.Linear | Conv1D):
        raise ModelError(problem(f"layer {layer}", want, type(module).__name__))
    if is_table(layer) and len(signature(type(module).forward).parameters) != 2:
        why = "PEFT hands it indices, and it takes other things too"
        raise ModelError(problem(f"layer {layer}", "an embedding that takes indices", type(module).__name__, why))
    return module


def features(module: nn.Module) -> tuple[int, int]:
    """Input and output features (I, O) of a layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features  # a quantised weight has another shape
    rows, columns = module.get_parameter("weight").shape
    return rows, columns


def _check_fit(layer: str, module: nn.Module, factors: Tensors, rank: int) -> None:
    inputs, outputs = features(module)
    for key, want in ((key_a(layer), (rank, inputs)), (key_b(layer), (outputs, rank))):
        got = factors[key].shape if key in factors else "none"
        if got != want:
            raise ModelError(problem(f"factor {key}", want, got))


def _peft_config(spec: LoraSpec, modules: dict[str, nn.Module]) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        target_modules=list(spec.layers),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )


def _load(model: PreTrainedModel, spec: LoraSpec, factors: Tensors, frozen: Collection[str]) -> dict[str, nn.Parameter]:
    """Sets the adapter's weights, float32 whatever the base is, and makes trainable what is not frozen."""
    weights: dict[str, nn.Parameter] = {}
    for layer in spec.layers:
        for key, side in ((key_a(layer), "A"), (key_b(layer), "B")):
            place = f"lora_embedding_{side}.{_NAME}" if is_table(layer) else f"lora_{side}.{_NAME}.weight"
            weight = model.get_parameter(f"{layer}.{place}")
            weight.data = torch.from_numpy(factors[key].astype(np.float32)).to(weight.device)
            weights[key] = weight.requires_grad_(side not in frozen)
    return weights
