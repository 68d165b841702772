"""Personal factors: parts of the adapter that every client keeps to itself, from round to round.

In the coordinator's state a personal factor has rank 0. It says that the layer is there and how wide it is, and holds
no number: what clients receive and send then has no byte of it. A client puts its own, from its memory, in its place.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from fedtune.errors import ConfigError, problem
from fedtune.lora import LoraSpec
from fedtune.method import ClientJob
from fedtune.tensors import Array, Manifest, Tensors

KEPT = "personal/"
"""Prefix of personal factors in a client's memory."""


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
