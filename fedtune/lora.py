"""LoRA factors as plain arrays: which layers carry them, how they are named, and PEFT directories without torch.

Shapes: R rank, I input features, O output features. A_RI is the down projection, B_OR the up projection, and a layer
computes W x + scale * B A x (Hu et al. 2021, arXiv 2106.09685, section 4.1).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtune.errors import ConfigError, ModelError, problem
from fedtune.tensors import Array, Manifest, Tensors
from fedtune.weights import save_weights

ALL_LINEAR = "all-linear"
_FACTOR = re.compile(r"\.lora_(embedding_[AB]|[AB]\.weight)$")
# Vocabulary and position tables and the output head: PEFT's "all-linear" leaves them alone, and so do we.
_TABLES = ("embed", "wte", "wpe")
_HEADS = ("lm_head", "embed_out", "score")
_NOT_LINEAR = (*_TABLES, *_HEADS, "shared", "norm", "ln_")


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted layer: dotted module name, input features I, output features O.

    An embedding of V tokens is a layer of I = V, whose inputs are one-hot.
    """

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


def is_table(layer: str) -> bool:
    """Whether a layer is an embedding, by the last part of its name. Its weight is I x O in every model."""
    last = layer.rsplit(".", 1)[-1]
    return last == "shared" or (any(word in last for word in _TABLES) and last not in _HEADS)


def find_layers(base: Manifest, targets: Sequence[str], transposed: bool = False, no_tables: str = "") -> list[Layer]:
    """Finds the layers of `base` that `targets` name, in the base's order.

    Args:
        base: the base model's weights.
        targets: last parts of module names (`q_proj`), or just `all-linear`.
        transposed: weights are stored I x O (the Conv1D layers of GPT-2).
        no_tables: why embeddings are refused; they are taken where this is empty.

    Raises:
        ConfigError: a target matches no two-dimensional weight, or an embedding that is refused.
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
    tables = [name for name in found if is_table(name)]
    if tables and no_tables:
        raise ConfigError(problem("method.target_modules", "linear layers", tables[0], no_tables))
    if not found:
        raise ConfigError(problem("method.target_modules", "at least one linear layer of the base", list(targets)))
    heads = [name for name in found if name.rsplit(".", 1)[-1] in _HEADS]  # linear in every model
    turned = [name for name in found if name in tables or (transposed and name not in heads)]
    return [Layer(name, *(shape if name in turned else shape[::-1])) for name, shape in found.items()]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def kaiming_uniform(rng: np.random.Generator, rank: int, inputs: int) -> npt.NDArray[np.float32]:
    """Draws A_RI as PEFT does: kaiming uniform with a = sqrt(5), which is U(-1/sqrt(I), 1/sqrt(I)), in float32."""
    bound = 1.0 / sqrt(inputs)
    return rng.uniform(-bound, bound, (rank, inputs)).astype(np.float32)


def first_factors(
    rng: np.random.Generator, layer: str, rank: int, inputs: int, outputs: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Draws a new adapter of one layer as PEFT does; its product is zero.

    Of a linear layer A is drawn and B is zero. Of an embedding B is drawn from N(0, 1) and A is zero: so a token that
    nobody trains on stays where it is.

    Returns:
        A_RI and B_OR, float32.
    """
    if is_table(layer):
        return np.zeros((rank, inputs), np.float32), rng.normal(size=(outputs, rank)).astype(np.float32)
    return kaiming_uniform(rng, rank, inputs), np.zeros((outputs, rank), np.float32)


def peft_name(factor: str) -> str:
    """Name of a factor (`layer/A`) in PEFT's files."""
    layer, _, side = factor.rpartition("/")
    return f"base_model.model.{layer}.lora_" + (f"embedding_{side}" if is_table(layer) else f"{side}.weight")


def factor_name(stored: str) -> str:
    """Name of a factor (`layer/A`) by its name in PEFT's files."""
    layer, _, side = stored.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
    return f"{layer}/{side[-1:]}"


def is_factor(stored: str) -> bool:
    """Whether a name in PEFT's files is that of A or B."""
    return bool(_FACTOR.search(stored))


def check_ranks(stored: Tensors, source: str) -> None:
    """Raises ModelError when an A (R, I) and its B (O, R), by their names in PEFT's files, differ in R."""
    sides = {factor_name(name): name for name in stored if is_factor(name)}
    for layer in layers_of(list(sides)):
        a, b = sides[key_a(layer)], sides.get(key_b(layer), "")
        if b and stored[a].shape[:1] != stored[b].shape[1:2]:
            got = f"{a} of shape {stored[a].shape} and {b} of shape {stored[b].shape}"
            raise ModelError(problem(source, "A and B of one rank", got))


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
    names = [key for layer in layers for key in (key_a(layer), key_b(layer))]
    tensors = {peft_name(name): factors[name] for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
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
    check_ranks(stored, str(folder))
    try:
        return _folded(config, stored)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(problem(str(folder), "a whole LoRA adapter", f"one without {error}")) from error


def _folded(config: dict[str, Any], stored: dict[str, Array]) -> dict[str, Array]:
    factors: dict[str, Array] = {}
    sides = {factor_name(name): array for name, array in stored.items() if is_factor(name)}
    for layer in layers_of(list(sides)):
        a_ri, b_or = sides[key_a(layer)], sides[key_b(layer)]
        alpha = config.get("alpha_pattern", {}).get(layer, config["lora_alpha"])
        scale = lora_scale(a_ri.shape[0], alpha, bool(config.get("use_rslora")))
        factors[key_a(layer)] = scale_array(a_ri, scale)
        factors[key_b(layer)] = b_or
    return factors


def scale_array(array: Array, factor: float) -> Array:
    """Multiplies in float64 and rounds once to the array's own dtype."""
    return (array.astype(np.float64) * factor).astype(array.dtype)
