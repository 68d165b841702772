"""What the LoRA methods have in common: the first draw, whom they take, means of factors, slices, templates.

Shapes: R rank, I input features, O output features; A_RI, B_OR.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import numpy as np

from fedtune import exact
from fedtune.codecs.compression import Compression, change, changed
from fedtune.codecs.signs import Code
from fedtune.errors import ProtocolError, problem
from fedtune.lora import find_layers, first_factors, key_a, key_b, layers_of, scale_array
from fedtune.method import BaseModel, ClientJob, Member
from fedtune.outer import ServerOptimizer
from fedtune.tensors import DTYPES, PRIVATE, Array, Manifest, Tensors, TensorSpec, dtype_name

Total = dict[str, exact.ExactSum]
Kept = dict[str, tuple[Member, int, Tensors]]


def drawn(
    base: BaseModel, targets: Sequence[str], rank: int, dtype: str, seed: int, no_tables: str = ""
) -> dict[str, Array]:
    """Draws the first shared adapter from `seed` as PEFT does; `no_tables` is why embeddings are refused, if so."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    state: dict[str, Array] = {}
    for layer in find_layers(base.weights, targets, base.transposed, no_tables):
        a_ri, b_or = first_factors(rng, layer.name, rank, layer.inputs, layer.outputs)
        state[key_a(layer.name)], state[key_b(layer.name)] = a_ri.astype(DTYPES[dtype]), b_or.astype(DTYPES[dtype])
    return state


def same_for_all(member: Member, rank: int, alpha: float, why: str) -> Member:
    """Fills in the shared rank and alpha; raises ProtocolError, saying `why`, for a client that brings others."""
    if member.rank not in (0, rank) or member.alpha not in (0, alpha):
        want, got = f"rank {rank} and alpha {alpha:g}", f"rank {member.rank} and alpha {member.alpha:g}"
        raise ProtocolError(problem(f"client {member.id}", want, got, f"{why}; method.name = 'flora' takes any mix"))
    return replace(member, rank=rank, alpha=alpha)


def any_mix(member: Member, rank: int, alpha: float, largest: int, key: str) -> Member:
    """Fills in the rank and alpha of a client that names none; an alpha of 0 means 2 r.

    Raises:
        ProtocolError: a rank that is not from 1 to `largest` (see the configuration's `key`), an alpha not above 0.
    """
    rank = member.rank or rank
    if not 1 <= rank <= largest:
        raise ProtocolError(problem(f"rank of {member.id}", f"1 to {largest}", rank, f"See {key}"))
    alpha = member.alpha or alpha or 2.0 * rank
    if not 0 < alpha < inf:
        raise ProtocolError(problem(f"alpha of {member.id}", "a number above 0", alpha))
    return replace(member, rank=rank, alpha=alpha)


def add(total: Total | None, update: Tensors, member: Member, weight: int) -> Total:
    """Adds weight * array as integers, into `total` itself; a value too large changes nothing.

    Raises:
        WireError: a magnitude of 2048 and more.
    """
    check(update, member)
    return {
        name: exact.add(total[name] if total else None, array, weight, f"{name} of {member.id}")
        for name, array in update.items()
    }


def add_codes(total: Total | None, codes: Sequence[Code], member: Member, weight: int) -> Total:
    """Adds ternary codes without making arrays of them; raises, and gives the same sums, as `add` of their values."""
    for code in codes:
        exact.check_magnitude(np.array([code.magnitude]), f"{code.spec.name} of {member.id}")
    sums = total or {
        code.spec.name: exact.ExactSum(np.zeros(code.spec.shape, np.int64), np.zeros(code.spec.shape, np.int64))
        for code in codes
    }
    for code in codes:
        exact.add_at(sums[code.spec.name], code.positions, code.signs, code.magnitude, weight)
    return sums


def keep(total: Kept | None, update: Tensors, member: Member, weight: int) -> Kept:
    """Keeps the factors under the client's id, for those who compare clients; raises as `add` does."""
    check(update, member)
    return {**(total or {}), member.id: (member, weight, update)}


def exact_means(total: Total, weight: int) -> dict[str, Array]:
    """Returns the means of the arrays that were summed, float64."""
    return {name: array.mean(weight, np.dtype(np.float64)) for name, array in total.items()}


def check(update: Tensors, member: Member, scale: float = 1.0) -> None:
    """Raises WireError when B, or `scale` times A, holds a magnitude of 2048 and more: training diverged."""
    for name, array in update.items():
        exact.check_magnitude(array, f"{name} of {member.id}", scale if name.endswith("/A") else 1.0)


def means(state: Tensors, total: Total, weight: int) -> dict[str, Array]:
    """Returns `state` with the mean in place of every array that was summed."""
    return {n: total[n].mean(weight, array.dtype) if n in total else array for n, array in state.items()}


def closed(state: Tensors, mean: Tensors, outer: ServerOptimizer) -> dict[str, Array]:
    """Returns the shared part of `state` after the server optimiser's step to `mean` (float64), and its moments."""
    shared = public(state)
    if outer.is_plain:
        return {**shared, **{name: array.astype(shared[name].dtype) for name, array in mean.items()}}
    return {**shared, **outer.step({name: shared[name] for name in mean}, mean, state)}


def public(state: Tensors) -> dict[str, Array]:
    """Leaves out the coordinator's own part."""
    return {name: array for name, array in state.items() if not name.startswith(PRIVATE)}


def only(state: Tensors, side: str) -> dict[str, Array]:
    """Picks one side, `A` or `B`, of every layer."""
    return {name: array for name, array in public(state).items() if name.endswith(f"/{side}")}


def as_sent(factors: Tensors, expected: Manifest) -> dict[str, Array]:
    """Picks what the template asks for, in its order and dtype."""
    return {spec.name: factors[spec.name].astype(DTYPES[spec.dtype], copy=False) for spec in expected.specs}


def moved(job: ClientJob, factors: Tensors, expected: Manifest, uplink: Compression) -> Tensors:
    """Returns factors as they are to be encoded: how far they moved from the attached ones, unless all bits travel."""
    return factors if uplink.exact else uplink.carry(change(factors, job.attached()), expected, job.memory)


def arrived(state: Tensors, update: Tensors, uplink: Compression) -> Tensors:
    """Returns the factors that `moved` was given, as far as the uplink kept them."""
    return update if uplink.exact else changed(state, update)


def onward(state: Tensors, mean: Tensors, uplink: Compression) -> Tensors:
    """Returns the mean of the factors, float64, from the mean of what clients sent: that is how far they moved."""
    return mean if uplink.exact else {name: state[name].astype(np.float64) + array for name, array in mean.items()}


def layers_in(factors: Tensors) -> tuple[str, ...]:
    """Lists the layers of which there is a factor, of either side, in their order."""
    return tuple(dict.fromkeys(name[:-2] for name in factors if name.endswith(("/A", "/B"))))


def of_rank(factors: Tensors, rank: int) -> Manifest:
    """Describes the factors of these layers at another rank: A of (rank, I) and B of (O, rank)."""
    specs = []
    for layer in layers_of(factors):
        a, b = factors[key_a(layer)], factors[key_b(layer)]
        specs.append(TensorSpec(key_a(layer), (rank, a.shape[1]), dtype_name(a)))
        specs.append(TensorSpec(key_b(layer), (b.shape[0], rank), dtype_name(b)))
    return Manifest(tuple(specs))


def sliced(factors: Tensors, rank: int, of_a: float, of_b: float) -> dict[str, Array]:
    """Takes the leading `rank` rows of every A times `of_a`, and columns of every B times `of_b`; float32."""
    wide = {name: array.astype(np.float32) for name, array in factors.items()}
    return {
        name: scale_array(a[:rank], of_a) if name.endswith("/A") else scale_array(a[:, :rank], of_b)
        for name, a in wide.items()
    }
