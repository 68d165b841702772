"""States that keep every closed round's change as factors: `000003/layer/A` is round 3's, `000000/...` are empty.

A client receives the rounds it lacks, and merges them into its base in order. What has no number in front of its name
is no part of the history.
"""

from collections.abc import Iterator

import numpy as np

from fedtune.lora import find_layers, key_a, key_b, layers_of
from fedtune.method import BaseModel
from fedtune.tensors import DTYPES, Array, Tensors

_EMPTY = "000000/"


def begun(base: BaseModel, targets: tuple[str, ...], dtype: str) -> dict[str, Array]:
    """Starts a history with round 0: factors of rank 0, which hold no numbers, only the layers' shapes."""
    factors: dict[str, Array] = {}
    for layer in find_layers(base.weights, targets, base.transposed):
        factors[key_a(layer.name)] = np.zeros((0, layer.inputs), DTYPES[dtype])
        factors[key_b(layer.name)] = np.zeros((layer.outputs, 0), DTYPES[dtype])
    return numbered(0, factors)


def numbered(number: int, factors: Tensors) -> dict[str, Array]:
    """Names the factors of one round."""
    return {f"{number:06d}/{name}": array for name, array in factors.items()}


def is_past(name: str) -> bool:
    """Whether a name is of the history."""
    return name.count("/") == 2


def last(state: Tensors) -> int:
    """Number of the latest round in a state."""
    return max(int(name[:6]) for name in state if is_past(name))


def of_round(state: Tensors, number: int) -> dict[str, Array]:
    """The factors of one round, by their plain names."""
    return {name[7:]: array for name, array in state.items() if is_past(name) and int(name[:6]) == number}


def after(state: Tensors, since: int) -> dict[str, Array]:
    """Leaves out the rounds up to `since`."""
    return {name: array for name, array in state.items() if not is_past(name) or int(name[:6]) > since}


def lacking(state: Tensors, since: int) -> dict[str, Array]:
    """Picks the history that a client of version `since` lacks.

    It is the rounds after `since`; all of it where some of the rounds that the client holds have been recompressed.
    """
    past = {name: array for name, array in state.items() if is_past(name)}
    first = min((int(name[:6]) for name in past if not name.startswith(_EMPTY)), default=0)
    return after(past, -1 if 0 < since < first else since)


def is_whole(received: Tensors) -> bool:
    """Whether a history begins with round 0, so that it is to be merged into the base alone."""
    return any(name.startswith(_EMPTY) for name in received)


def missed(received: Tensors) -> Iterator[dict[str, Array]]:
    """Yields the factors of each round received, in order; not those of round 0, which change nothing."""
    for number in sorted({int(name[:6]) for name in received if is_past(name)} - {0}):
        yield of_round(received, number)


def rank(state: Tensors) -> int:
    """The sum of all rounds' ranks, in the layer where it is largest."""
    ranks: dict[str, int] = {}
    for name in (name for name in state if is_past(name) and name.endswith("/A")):
        ranks[name[7:]] = ranks.get(name[7:], 0) + state[name].shape[0]
    return max(ranks.values(), default=0)


def joined(state: Tensors) -> dict[str, Array]:
    """Joins all rounds: `layer/A` (R, I) and `layer/B` (O, R), R the sum of their ranks."""
    rounds = [of_round(state, number) for number in sorted({int(name[:6]) for name in state if is_past(name)})]
    factors: dict[str, Array] = {}
    for layer in layers_of(rounds[0]):
        factors[key_a(layer)] = np.concatenate([r[key_a(layer)] for r in rounds], axis=0)
        factors[key_b(layer)] = np.concatenate([r[key_b(layer)] for r in rounds], axis=1)
    return factors
