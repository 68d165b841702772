"""Personal factors: parts of the adapter that every client keeps to itself, from round to round.

In the coordinator's state a personal factor has rank 0. It says that the layer is there and how wide it is, and holds
no number: what clients receive and send then has no byte of it. A client puts its own, from its memory, in its place.

The run's adapter has zeros where one factor of a layer is personal, and no layer of which both are; `own_adapter` puts
a client's factors in.
"""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtune.errors import ConfigError, ModelError, problem
from fedtune.lora import LoraSpec, factor_name, key_a, key_b, layers_of, save_peft
from fedtune.method import ClientJob
from fedtune.tensors import Array, Manifest, Tensors

KEPT = "personal/"
"""Prefix of personal factors in a client's memory."""
MEMORY = "memory.safetensors"
"""The file in a client's folder that holds its memory."""
_NOT_PERSONAL = (
    "This run's method keeps nothing personal, or the folder is not RUN/clients/ID: export without --own. "
    "fedsa-lora and fedavg-lora with method.personal keep some"
)


def is_personal(factor: str, patterns: Sequence[str]) -> bool:
    """Whether a factor (`layer/A`) belongs to the client.

    A pattern is a glob for the end of a layer's name (`v_proj`, `layers.3.*`) or of a factor's in PEFT's spelling
    (`lora_B`, `layers.3.*.lora_A`), beginning at a dot.
    """
    layer, _, side = factor.rpartition("/")
    names = (layer, f"{layer}.lora_{side}")
    return any(fnmatchcase(name, glob) for name in names for p in patterns for glob in (p, f"*.{p}"))


def withheld(state: Tensors, patterns: Sequence[str]) -> dict[str, Array]:
    """Empties the personal factors of a first state.

    Raises:
        ConfigError: a pattern fits no factor, or nothing is left to share.
    """
    for pattern in patterns:
        if not any(is_personal(name, [pattern]) for name in state):
            raise ConfigError(problem("method.personal", "names of adapted layers or factors", repr(pattern)))
    if all(is_personal(name, patterns) for name in state):
        raise ConfigError(problem("method.personal", "a part of the adapter", "all of it: nothing would be shared"))
    return {name: emptied(name, array) if is_personal(name, patterns) else array for name, array in state.items()}


def shared(state: Tensors) -> Manifest:
    """Describes the factors that travel."""
    return Manifest.of({name: array for name, array in state.items() if array.size})


def completed(job: ClientJob, spec: LoraSpec, received: Tensors) -> dict[str, Array]:
    """Puts the client's own factors where `received` has empty ones; the first time a fresh draw."""
    missing = [name for name, array in received.items() if not array.size]
    fresh = job.fresh(spec) if any(KEPT + name not in job.memory for name in missing) else {}
    own = {name: job.memory[KEPT + name] if KEPT + name in job.memory else fresh[name] for name in missing}
    return {**received, **own}


def keep(job: ClientJob, trained: Tensors, expected: Manifest) -> None:
    """Remembers the trained factors that are not sent."""
    sent = set(expected.names)
    job.memory.update({KEPT + name: array for name, array in trained.items() if name not in sent})


def emptied(name: str, array: Array) -> Array:
    """Returns a factor of rank 0 that is as wide as `array`."""
    return array[:0] if name.endswith("/A") else array[:, :0]


def exported(state: Tensors, rank: int) -> dict[str, Array]:
    """Puts zeros where one factor of a layer is personal, so that a client's own fits in."""
    factors: dict[str, Array] = {}
    for layer in layers_of(state):
        a, b = state[key_a(layer)], state[key_b(layer)]
        if a.size or b.size:
            factors[key_a(layer)] = a if a.size else np.zeros((rank, a.shape[1]), b.dtype)
            factors[key_b(layer)] = b if b.size else np.zeros((b.shape[0], rank), a.dtype)
    return factors


def own_adapter(adapter: Path, memory: Path, folder: Path) -> None:
    """Writes a client's own PEFT directory: the run's adapter with the personal factors of its memory put in.

    Args:
        adapter: the run's PEFT directory.
        memory: the client's `memory.safetensors`.
        folder: to write.

    Raises:
        ModelError: a file is missing or damaged, or nothing in the memory is personal.
    """
    try:
        kept = load_file(memory) if memory.exists() else {}
        own = {name.removeprefix(KEPT): array for name, array in kept.items() if name.startswith(KEPT)}
        if not own:
            raise ModelError(problem(str(memory), "personal factors", "none", _NOT_PERSONAL))
        config = json.loads((adapter / "adapter_config.json").read_text())
        stored = load_file(adapter / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(problem(f"{adapter} and {memory}", "a run's adapter and a client's memory", error)) from error
    factors = {**{factor_name(name): array for name, array in stored.items()}, **own}
    rank, alpha, rslora = int(config["r"]), float(config["lora_alpha"]), bool(config["use_rslora"])
    base = str(config["base_model_name_or_path"] or "")
    save_peft(folder, factors, rank=rank, alpha=alpha, rslora=rslora, base_model=base)
