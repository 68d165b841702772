"""What methods that average one shared adapter have in common: its first draw, whom it takes, the mean of its factors.

Shapes: R rank, I input features, O output features; A_RI, B_OR.
"""

from collections.abc import Sequence

import numpy as np

from fedtune import exact
from fedtune.errors import ProtocolError, problem
from fedtune.lora import find_layers, kaiming_uniform, key_a, key_b
from fedtune.method import BaseModel, Member
from fedtune.tensors import DTYPES, Array, Manifest, Tensors

Total = dict[str, exact.ExactSum]


def drawn(base: BaseModel, targets: Sequence[str], rank: int, dtype: str, seed: int) -> dict[str, Array]:
    """Draws the first shared adapter from `seed`: A as PEFT does, B zero."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    state: dict[str, Array] = {}
    for layer in find_layers(base.weights, targets, base.transposed):
        state[key_a(layer.name)] = kaiming_uniform(rng, rank, layer.inputs).astype(DTYPES[dtype])
        state[key_b(layer.name)] = np.zeros((layer.outputs, rank), DTYPES[dtype])
    return state


def same_for_all(member: Member, rank: int, alpha: float, why: str) -> Member:
    """Fills in the shared rank and alpha; raises ProtocolError, saying `why`, for a client that brings others."""
    if member.rank not in (0, rank) or member.alpha not in (0, alpha):
        want, got = f"rank {rank} and alpha {alpha:g}", f"rank {member.rank} and alpha {member.alpha:g}"
        raise ProtocolError(problem(f"client {member.id}", want, got, f"{why}; method.name = 'flora' takes any mix"))
    return Member(member.id, rank, alpha)


def add(total: Total | None, update: Tensors, member: Member, weight: int) -> Total:
    """Adds weight * array as integers, into `total` itself; a value too large changes nothing.

    Raises:
        WireError: a magnitude of 2048 and more.
    """
    for name, array in update.items():
        exact.check_magnitude(array, f"{name} of {member.id}")
    return {
        name: exact.add(total[name] if total else None, array, weight, f"{name} of {member.id}")
        for name, array in update.items()
    }


def means(state: Tensors, total: Total, weight: int) -> dict[str, Array]:
    """Returns `state` with the mean in place of every array that was summed."""
    return {n: total[n].mean(weight, array.dtype) if n in total else array for n, array in state.items()}


def only(state: Tensors, side: str) -> dict[str, Array]:
    """Picks one side, `A` or `B`, of every layer."""
    return {name: array for name, array in state.items() if name.endswith(f"/{side}")}


def as_sent(factors: Tensors, expected: Manifest) -> dict[str, Array]:
    """Picks what the template asks for, in its order and dtype."""
    return {spec.name: factors[spec.name].astype(DTYPES[spec.dtype], copy=False) for spec in expected.specs}
