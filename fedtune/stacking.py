"""Weighted sums of clients' products B A, kept as stacks of factors or, when that is smaller, as exact sums.

    A = [c_1 A_1 ; ... ; c_K A_K]    B = [B_1, ..., B_K]    B A = sum_k c_k B_k A_k

A round's stack is in order of client id. Where the clients' factors outgrow two int64 digits for every entry of the
product (R > 4 O I / (O + I) in float32), each client's product is added to those instead (`fedtune.exact`): what the
coordinator holds then no longer grows with the number of clients, and the order of arrival still leaves no trace.

Shapes: R rank, I input features, O output features; A_RI, B_OR. `factors` hold `layer/A` and `layer/B`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune import exact, lowrank
from fedtune.blas import one_thread
from fedtune.errors import WireError, problem
from fedtune.lora import key_a, key_b, layers_of
from fedtune.lowrank import Doubles, Pair
from fedtune.method import Member
from fedtune.tensors import Array, Tensors
from fedtune.trust import trusted

_DIGITS = 16  # bytes of an exact sum's entry
Weights: TypeAlias = float | Mapping[str, Doubles]
"""One factor for a whole stack, or one for each row of A by layer."""


class Reply(NamedTuple):
    """One client's update: `scale` s stands before its product B A."""

    member: Member
    weight: int
    scale: float
    factors: Tensors


class Mean(NamedTuple):
    """sum_k c_k s_k B_k A_k as `factors`, and the c_k beside their clients' ranks.

    c_k is p_k, less where the update was clipped. `left_out` and `clipped` are ids of clients.
    """

    factors: dict[str, Array]
    shares: list[tuple[int, float]]
    left_out: list[str]
    clipped: list[str]

    def covered(self, held: Tensors) -> dict[str, Doubles]:
        """Returns for each component of `held` the sum of the c_k of clients whose rank reaches it."""
        ranks = {layer: held[key_a(layer)].shape[0] for layer in layers_of(held)}
        return {
            layer: np.array([sum(c for r, c in self.shares if r > i) for i in range(n)]) for layer, n in ranks.items()
        }


@dataclass
class Stack:
    """The updates of a round so far."""

    replies: dict[str, Reply] = field(default_factory=dict)
    sums: dict[str, exact.ExactSum] = field(default_factory=dict)
    summed: list[tuple[int, int]] = field(default_factory=list)  # rank and weight of the clients in `sums`
    nbytes: int = 0
    dtype: npt.DTypeLike = np.float32  # of factors made from `sums`

    def add(self, reply: Reply, keep: bool) -> "Stack":
        """Adds an update; with `keep` its factors are kept whatever they take.

        Raises:
            WireError: s A, B or an entry of s B A might reach 2048 in magnitude: training diverged. Nothing changed.
        """
        _check(reply)
        self.replies[reply.member.id] = reply
        self.nbytes += sum(array.nbytes for array in reply.factors.values())
        self.dtype = np.result_type(self.dtype, *(array.dtype for array in reply.factors.values()))
        if not keep and self.nbytes > sum(_DIGITS * b.shape[0] * a.shape[1] for a, b in _pairs(reply.factors).values()):
            self._sum_up()
        return self

    def mean(self, weight: int, held: Tensors, byzantine: int = 0, limit: float = 0.0) -> Mean:
        """Returns the mean of the updates, `weight` being the sum of theirs.

        Args:
            weight: the sum of all weights.
            held: products s_i u_i v_i' of which each client began with as many as its rank; what it changed is the
                difference. Empty where clients began with nothing.
            byzantine: multi-Krum leaves out so many clients.
            limit: longest change of a client; 0 clips none.

        Raises:
            RoundError: too few clients for multi-Krum.
        """
        if self.sums:
            factors = {}
            for layer, total in self.sums.items():
                factors.update(_small(layer, total.mean(weight, np.dtype(np.float64)), self.dtype))
            return Mean(factors, [(rank, n / weight) for rank, n in sorted(self.summed)], [], [])
        replies = [self.replies[client] for client in sorted(self.replies)]
        ids = [reply.member.id for reply in replies]
        made = [changes(reply, held) for reply in replies] if byzantine or limit else [{}] * len(replies)
        kept, clips = trusted(made, byzantine, limit)
        weight = sum(replies[k].weight for k in kept)
        shares = [replies[k].weight / weight * clips[k] for k in kept]
        parts = [(share * replies[k].scale, replies[k].factors) for k, share in zip(kept, shares, strict=True)]
        stack = stacked(*parts, least="float32" if held else None)
        ranks = [replies[k].member.rank for k in kept]
        left_out = [name for k, name in enumerate(ids) if k not in kept]
        return Mean(stack, list(zip(ranks, shares, strict=True)), left_out, [ids[k] for k in kept if clips[k] < 1])

    def _sum_up(self) -> None:
        while self.replies:
            _, reply = self.replies.popitem()
            for layer, (a, b) in _pairs(reply.factors).items():
                with one_thread():
                    product = b.astype(np.float64) @ (a.astype(np.float64) * reply.scale)
                self.sums[layer] = exact.add(self.sums.get(layer), product, reply.weight, layer)
            self.summed.append((reply.member.rank, reply.weight))


def changes(reply: Reply, held: Tensors) -> dict[str, Pair]:
    """Returns what a client changed in each layer, as a pair: s B A, less the components of `held` it began with."""
    own = {layer: (a.astype(np.float64) * reply.scale, b) for layer, (a, b) in _pairs(reply.factors).items()}
    if not held:
        return own
    rank, began = reply.member.rank, _pairs(held)
    return {
        layer: (
            np.concatenate([a, -began[layer][0][:rank].astype(np.float64)]),
            np.hstack([b, began[layer][1][:, :rank]]),
        )
        for layer, (a, b) in own.items()
    }


def stacked(*parts: tuple[Weights, Tensors], least: str | None = None) -> dict[str, Array]:
    """Stacks factors, their products weighted; the weights go into A, taken in float64 and rounded once.

    A weight that is 1 changes no bit, and a part without factors counts for nothing. The dtype is the widest of the
    factors' and of `least`.
    """
    parts = tuple((weights, part) for weights, part in parts if part)
    if len(parts) == 1 and parts[0][0] == 1.0 and least is None:
        return dict(parts[0][1])
    dtypes = [array.dtype for _, part in parts for array in part.values()]
    dtype = np.result_type(*dtypes, *([least] if least else []))
    first = parts[0][1]
    factors: dict[str, Array] = {}
    for layer in layers_of(first):
        rows = [(part[key_a(layer)], w if isinstance(w, int | float) else w[layer][:, None]) for w, part in parts]
        factors[key_a(layer)] = _weighted(rows, dtype)
        factors[key_b(layer)] = np.concatenate([part[key_b(layer)] for _, part in parts], axis=1, dtype=dtype)
    return factors


def compact(factors: Tensors, rank: int, energy: float) -> tuple[dict[str, Array], float]:
    """Recompresses every layer; see `lowrank.recompress`.

    Returns:
        The factors in canonical form, float32 (float64 where they were), and the norm of what was cut off relative to
        that of the whole, all layers together.
    """
    small: dict[str, Array] = {}
    cut = whole = 0.0
    for layer, (a, b) in _pairs(factors).items():
        dtype = np.promote_types(a.dtype, np.float32)
        found = lowrank.recompress(a, b, rank=rank, energy=energy)
        small[key_a(layer)], small[key_b(layer)] = found.a_ri.astype(dtype), found.b_or.astype(dtype)
        norm = float((found.singular**2).sum()) / max(1.0 - found.error**2, 1e-300)
        cut, whole = cut + norm * found.error**2, whole + norm
    return small, (cut / whole) ** 0.5 if whole else 0.0


def _pairs(factors: Tensors) -> dict[str, Pair]:
    return {layer: (factors[key_a(layer)], factors[key_b(layer)]) for layer in layers_of(factors)}


def _small(layer: str, product: Doubles, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Factors of a matrix."""
    found = lowrank.recompress(product, np.eye(product.shape[0]))
    return {key_a(layer): found.a_ri.astype(dtype), key_b(layer): found.b_or.astype(dtype)}


def _check(reply: Reply) -> None:
    for layer, (a, b) in _pairs(reply.factors).items():
        exact.check_magnitude(a, f"{key_a(layer)} of {reply.member.id}", reply.scale)
        exact.check_magnitude(b, f"{key_b(layer)} of {reply.member.id}")
        # Cauchy-Schwarz: no entry of B A is larger than the longest row of B times the longest column of A.
        columns, rows = (x.astype(np.float32, copy=False) for x in (a, b))
        squares = np.einsum("ri,ri->i", columns, columns), np.einsum("or,or->o", rows, rows)
        largest = reply.scale * float(np.sqrt(squares[0].max(initial=0)) * np.sqrt(squares[1].max(initial=0)))
        if largest >= exact.LIMIT:
            want = f"a product below {exact.LIMIT:.0f}"
            raise WireError(problem(f"{layer} of {reply.member.id}", want, largest, "Training diverged"))


def _weighted(parts: Sequence[tuple[Array, float | Doubles]], dtype: np.dtype[Any]) -> Array:
    stack = np.empty((sum(a_ri.shape[0] for a_ri, _ in parts), parts[0][0].shape[1]), dtype)
    row = 0
    for a_ri, weight in parts:
        rows = stack[row : row + a_ri.shape[0]]
        np.multiply(a_ri, weight, out=rows, dtype=np.float64, casting="same_kind")
        row += a_ri.shape[0]
    return stack
