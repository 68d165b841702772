"""LoRA factors as plain arrays: which layers carry them, how they are named, and PEFT directories without torch.

Shapes: R rank, I input features, O output features. A_RI is the down projection, B_OR the up projection, and a layer
computes W x + scale * B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedtune.errors import ConfigError, ModelError, problem
from fedtune.tensors import Array, Manifest, Tensors

ALL_LINEAR = "all-linear"
# Vocabulary and position tables and the output head: PEFT's "all-linear" leaves them alone, and so do we.
_EMBEDDINGS = ("embed", "wte", "wpe", "shared")
_NOT_LINEAR = (*_EMBEDDINGS, "lm_head", "score", "norm", "ln_")


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted layer: dotted module name, input features I, output features O."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What one client trains: rank and scaling of a fresh pair of factors on `layers`."""

    layers: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732)."""
        return lora_scale(self.rank, self.alpha, self.rslora)


def lora_scale(rank: int, alpha: float, rslora: bool = False) -> float:
    """Returns the factor in front of B A."""
    return alpha / (sqrt(rank) if rslora else rank)


def key_a(layer: str) -> str:
    """Name of a layer's A_RI."""
    return f"{layer}/A"


def key_b(layer: str) -> str:
    """Name of a layer's B_OR."""
    return f"{layer}/B"


def overlaid(spec: LoraSpec, before: "tuple[LoraSpec, Tensors] | None", factors: Tensors) -> dict[str, Array]:
    """Copies the factors of an adapter as float32: those of `factors`, and where it has none those of `before`."""
    known = {**(before[1] if before else {}), **factors}
    names = [name for layer in spec.layers for name in (key_a(layer), key_b(layer))]
    return {name: np.array(known[name], np.float32) for name in names if name in known}


def layers_of(tensors: Tensors | Sequence[str]) -> list[str]:
    """Lists the layers whose factors are among `tensors`, in their order."""
    return [name[:-2] for name in tensors if name.endswith("/A")]


def find_layers(base: Manifest, targets: Sequence[str], transposed: bool = False) -> list[Layer]:
    """Finds the layers of `base` that `targets` name, in the base's order.

    Args:
        base: the base model's weights.
        targets: last parts of module names (`q_proj`), or just `all-linear`.
        transposed: weights are stored I x O (the Conv1D layers of GPT-2).

    Raises:
        ConfigError: a target matches no two-dimensional weight, or an embedding: its table may also be the output
            head, and a change merged into it would then change both, where an adapter changes one.
    """
    linear = {
        s.name.removesuffix(".weight"): s.shape for s in base.specs if len(s.shape) == 2 and s.name.endswith(".weight")
    }
    if ALL_LINEAR in targets:
        found = {n: s for n, s in linear.items() if not any(word in n.rsplit(".", 1)[-1] for word in _NOT_LINEAR)}
    else:
        for target in targets:
            if not any(_matches(name, target) for name in linear):
                choices = sorted({name.rsplit(".", 1)[-1] for name in linear})
                raise ConfigError(
                    problem("method.target_modules", f"names among {choices} or {ALL_LINEAR}", repr(target))
                )
        found = {n: s for n, s in linear.items() if any(_matches(n, target) for target in targets)}
    tables = [n for n in found if any(word in n.rsplit(".", 1)[-1] for word in _EMBEDDINGS)]
    if tables:
        why = "An embedding is often the output head too: merging would change both, an adapter only one"
        raise ConfigError(problem("method.target_modules", "linear layers", tables[0], why))
    if not found:
        raise ConfigError(problem("method.target_modules", "at least one linear layer of the base", list(targets)))
    return [Layer(n, *(s if transposed else s[::-1])) for n, s in found.items()]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def kaiming_uniform(rng: np.random.Generator, rank: int, inputs: int) -> npt.NDArray[np.float32]:
    """Draws A_RI as PEFT does: kaiming uniform with a = sqrt(5), which is U(-1/sqrt(I), 1/sqrt(I)), in float32."""
    bound = 1.0 / sqrt(inputs)
    return rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32)


def save_product(folder: Path, factors: Tensors, base_model: str = "") -> None:
    """Writes a PEFT adapter directory whose change is B A of each layer, whatever their ranks."""
    ranks = {layer: factors[key_a(layer)].shape[0] for layer in layers_of(factors)}
    rank = max([1, *ranks.values()])
    alphas = {layer: r for layer, r in ranks.items() if r not in (0, rank)}
    save_peft(folder, factors, rank=rank, alpha=rank, base_model=base_model, alphas=alphas)


def save_peft(
    folder: Path,
    factors: Tensors,
    *,
    rank: int,
    alpha: float,
    rslora: bool = False,
    base_model: str = "",
    alphas: Mapping[str, float] | None = None,
) -> None:
    """Writes `factors` (`layer/A`, `layer/B`) as a PEFT adapter directory, without torch.

    Layers whose rank is not `rank` go into PEFT's `rank_pattern`, and those in `alphas` into its `alpha_pattern`;
    layers with a factor of rank 0 are left out.
    """
    layers = [layer for layer in layers_of(factors) if factors[key_a(layer)].size and factors[key_b(layer)].size]
    ranks = {layer: int(factors[key_a(layer)].shape[0]) for layer in layers}
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = np.ascontiguousarray(factors[key_a(layer)])
        tensors[f"base_model.model.{layer}.lora_B.weight"] = np.ascontiguousarray(factors[key_b(layer)])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": layers,
        "rank_pattern": {layer: r for layer, r in ranks.items() if r != rank},
        "alpha_pattern": dict(alphas or {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_peft(folder: Path) -> dict[str, Array]:
    """Reads a PEFT LoRA directory into factors whose scale is folded into A, so that the change is B A.

    Returns:
        `layer/A` (R, I) and `layer/B` (O, R), in the file's dtype.

    Raises:
        ModelError: no such directory, a damaged one, or an adapter that is not plain LoRA.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        stored = load_file(folder / "adapter_model.safetensors")
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise ModelError(problem(str(folder), "a PEFT adapter directory", error)) from error
    if kind != "LORA" or config.get("use_dora"):
        why = "The magnitudes of DoRA, the singular values of AdaLoRA and the rest are no product B A"
        raise ModelError(problem(f"{folder}: peft_type", "plain LORA", "DoRA" if kind == "LORA" else kind, why))
    try:
        return _folded(config, stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(problem(str(folder), "a whole LoRA adapter", f"one without {error}")) from error


def _folded(config: dict[str, Any], stored: dict[str, Array]) -> dict[str, Array]:
    factors: dict[str, Array] = {}
    for name in (n for n in stored if n.endswith(".lora_A.weight")):
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a_ri, b_or = stored[name], stored[name.replace(".lora_A.", ".lora_B.")]
        alpha = config.get("alpha_pattern", {}).get(layer, config["lora_alpha"])
        scale = lora_scale(a_ri.shape[0], alpha, bool(config.get("use_rslora")))
        factors[key_a(layer)] = scale_array(a_ri, scale)
        factors[key_b(layer)] = b_or
    return factors


def scale_array(array: Array, factor: float) -> Array:
    """Multiplies in float64 and rounds once to the array's own dtype."""
    return (array.astype(np.float64) * factor).astype(array.dtype)
