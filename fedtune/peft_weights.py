"""The tensors of a PEFT adapter, by the names PEFT gives them: what can be compressed, and LoRA's pairs of factors.

Shapes: R rank, I input features, O output features.

    *.lora_A.weight     (R, I)        *.lora_B.weight     (O, R)        convolutions have the kernel's sizes behind
    *.lora_embedding_A  (R, I)        *.lora_embedding_B  (O, R)        I is the number of tokens
    *.ia3_l             the factors of IA3, around one

Whatever else an adapter holds replaces weights of the base or scales them: it is not measured from zero, so leaving
out its smallest values would ruin it.
"""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from fedtune.balance import balance
from fedtune.errors import ModelError, problem
from fedtune.tensors import Array, Tensors

CONFIG = "adapter_config.json"
_SIDES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_NAMES = {"LORA": tuple(end for pair in _SIDES for end in pair), "IA3": (".ia3_l",)}
_REMEDY = "Merge it into its base with PEFT's merge_and_unload, then: fedtune compress MERGED OUT --base BASE"


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the configuration of a LoRA or IA3 adapter; raises ModelError for anything else."""
    try:
        config = dict(json.loads((folder / CONFIG).read_text()))
        kind = config.get("peft_type")
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(problem(str(folder / CONFIG), "a PEFT configuration", error)) from error
    if kind not in ("LORA", "IA3"):
        raise ModelError(problem(f"{folder}: peft_type", "LORA or IA3", kind))
    return config


def check_adapter(folder: Path, weights: Tensors) -> None:
    """Raises ModelError unless an adapter is made of whole pairs of LoRA factors alone, or of IA3 factors alone."""
    config = read_config(folder)
    kind = str(config["peft_type"])
    for name in weights:
        if not name.endswith(_NAMES[kind]):
            want = f"tensors that end in {', '.join(_NAMES[kind])}"
            got = "another (DoRA, bias, modules_to_save, new tokens), which is not measured from zero"
            raise ModelError(problem(f"{folder}: {name}", want, got, _REMEDY))
    if config.get("target_parameters"):
        why = "some, whose factors are of many experts side by side"
        raise ModelError(problem(f"{folder}: target_parameters", "none", why, _REMEDY))
    alone = (
        set(weights) - {name for pair in _pairs(weights, f"{folder}: ") for name in pair} if kind == "LORA" else set()
    )
    if alone:
        remedy = "Export or save the adapter again"
        raise ModelError(problem(f"{folder}: {min(alone)}", "A and B of each layer", "one without the other", remedy))


def balance_lora(weights: Tensors) -> dict[str, Array]:
    """Balances every pair of LoRA factors among PEFT's names (`fedtune.balance`); the product stays.

    Raises:
        ModelError: A and B of a layer do not fit each other.
    """
    out = dict(weights)
    for name_a, name_b in _pairs(weights):
        a, b = weights[name_a], weights[name_b]
        flat = (array.reshape(len(array), prod(array.shape[1:])) for array in (a, b))
        a_ri, b_or = balance(*flat)
        out[name_a], out[name_b] = a_ri.reshape(a.shape), b_or.reshape(b.shape)
    return out


def _pairs(weights: Tensors, where: str = "") -> Iterator[tuple[str, str]]:
    """Names the pairs of factors; raises ModelError when two do not fit each other."""
    for end_a, end_b in _SIDES:
        for name_a in (name for name in weights if name.endswith(end_a)):
            name_b = name_a.removesuffix(end_a) + end_b
            if name_b in weights:
                _check_fit(where + name_a, weights[name_a].shape, name_b, weights[name_b].shape)
                yield name_a, name_b


def _check_fit(name_a: str, a: tuple[int, ...], name_b: str, b: tuple[int, ...]) -> None:
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or prod(b[2:]) != 1:
        want, remedy = f"(R, I), and (O, R) for {name_b}", "One of the two belongs to another adapter"
        raise ModelError(problem(name_a, want, f"{a} and {b}", remedy))
