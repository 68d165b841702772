"""Weighted sums of clients' products B A, kept as stacks of factors or, when that is smaller, as exact sums.

    A = [c_1 A_1 ; ... ; c_K A_K]    B = [B_1, ..., B_K]    B A = sum_k c_k B_k A_k

A round's stack is in order of client id. Where a layer's factors outgrow two int64 digits for every entry of the
product (R > 4 O I / (O + I) in float32), each client's product is added to those instead (`fedtune.exact`): what the
coordinator holds then no longer grows with the number of clients, and the order of arrival still leaves no trace.

A client may carry an adapter in part of the layers (`fedtune.depth`). A layer's mean is over those who carry it, each
with its share among them, as in LEGEND (arXiv 2412.20004): a layer that one client carries becomes
that client's, and is not thinned by those who left it alone.

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
from fedtune.robust import clip_factors
from fedtune.tensors import Array, Tensors
from fedtune.trust import trusted

_DIGITS = 16  # bytes of an exact sum's entry
Weights: TypeAlias = float | Mapping[str, Doubles]
"""One factor for a whole stack, or one for each row of A by layer."""


class Reply(NamedTuple):
    """One client's update: `scale` s stands before its product B A. It has the layers that carry its adapter."""

    member: Member
    weight: int
    scale: float
    factors: Tensors


class Mean(NamedTuple):
    """sum_k c_k s_k B_k A_k as `factors`, and for each layer the c_k beside their clients' ranks.

    c_k is p_k, the client's share among those who carry the layer, less where the update was clipped. A layer that
    nobody carries has rank 0. `left_out` and `clipped` are ids of clients.
    """

    factors: dict[str, Array]
    shares: dict[str, list[tuple[int, float]]]
    left_out: list[str]
    clipped: list[str]

    def covered(self, held: Tensors) -> dict[str, Doubles]:
        """Returns for each component of `held` the sum of the c_k of clients whose rank reaches it."""
        ranks = {layer: held[key_a(layer)].shape[0] for layer in layers_of(held)}
        return {
            layer: np.array([sum(c for r, c in self.shares[layer] if r > i) for i in range(n)])
            for layer, n in ranks.items()
        }


class _Part(NamedTuple):
    """One layer of one client's update."""

    rank: int
    weight: int
    scale: float
    pair: Pair


@dataclass
class Stack:
    """The updates of a round so far, layer by layer: each layer has the clients that carry it."""

    parts: dict[str, dict[str, _Part]] = field(default_factory=dict)
    sums: dict[str, exact.ExactSum] = field(default_factory=dict)
    summed: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # rank and weight of the clients in `sums`
    nbytes: dict[str, int] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    dtype: npt.DTypeLike = np.float32  # of factors made from `sums`

    def add(self, reply: Reply, *, keep: bool, limit: float = 0.0) -> "Stack":
        """Adds an update.

        Args:
            reply: the update.
            keep: its factors are kept whatever they take.
            limit: longest product; a longer one is scaled down to it. 0 scales none.

        Raises:
            WireError: s A, B or an entry of s B A might reach 2048 in magnitude: training diverged. Nothing changed.
        """
        _check(reply)
        client, pairs = reply.member.id, _pairs(reply.factors)
        scale = reply.scale
        if limit:
            clip = clip_factors([reply.scale * sum(lowrank.squared_norm(*p) for p in pairs.values()) ** 0.5], limit)
            scale *= float(clip[0])
        if scale < reply.scale:
            self.clipped.append(client)
        for layer, (a, b) in pairs.items():
            part = _Part(reply.member.rank, reply.weight, scale, (a, b))
            self.parts.setdefault(layer, {})[client] = part
            self.nbytes[layer] = self.nbytes.get(layer, 0) + a.nbytes + b.nbytes
            self.dtype = np.result_type(self.dtype, a.dtype, b.dtype)
            if not keep and self.nbytes[layer] > _DIGITS * b.shape[0] * a.shape[1]:
                self._sum_up(layer)
        return self

    def mean(
        self, empty: Tensors, held: Tensors, byzantine: int = 0, limit: float = 0.0, least: str | None = None
    ) -> Mean:
        """Returns the mean of the updates, each layer's over those who carry it.

        Args:
            empty: every layer's factors at rank 0.
            held: products s_i u_i v_i' of which each client began with as many as its rank; what it changed is the
                difference. Empty where clients began with nothing.
            byzantine: multi-Krum leaves out so many clients.
            limit: longest change of a client; 0 clips none.
            least: dtype that the factors have at least.

        Raises:
            RoundError: too few clients for multi-Krum.
        """
        ids = sorted({client for parts in self.parts.values() for client in parts})
        clips, kept = np.ones(len(ids)), list(range(len(ids)))
        if byzantine or limit:
            made = self._changes(layers_of(empty), held)
            kept, clips = trusted([made[client] for client in ids], byzantine, limit)
        counts = {ids[k]: float(clips[k]) for k in kept}
        least = least or ("float32" if held else None)
        means = {layer: self._mean(layer, counts, least) for layer in layers_of(empty)}
        factors = {key: empty[key] for layer in means for key in (key_a(layer), key_b(layer))}
        for found, _ in means.values():
            factors.update(found)
        left_out = [client for client in ids if client not in counts]
        clipped = sorted({*self.clipped, *(client for client, clip in counts.items() if clip < 1)})
        return Mean(factors, {layer: shares for layer, (_, shares) in means.items()}, left_out, clipped)

    def _mean(
        self, layer: str, counts: Mapping[str, float], least: str | None
    ) -> tuple[dict[str, Array], list[tuple[int, float]]]:
        """One layer's mean, nothing if nobody carries it, and the clients' ranks and shares."""
        if layer in self.sums:
            weight = sum(n for _, n in self.summed[layer])
            shares = [(rank, n / weight) for rank, n in sorted(self.summed[layer])]
            dtype = np.result_type(self.dtype, *([least] if least else []))
            return _small(layer, self.sums[layer].mean(weight, np.dtype(np.float64)), dtype), shares
        parts = [(part, counts[c]) for c, part in sorted(self.parts.get(layer, {}).items()) if c in counts]
        weight = sum(part.weight for part, _ in parts)
        shares = [(part.rank, part.weight / weight * clip) for part, clip in parts]
        scaled = [
            (share * part.scale, {key_a(layer): part.pair[0], key_b(layer): part.pair[1]})
            for (part, _), (_, share) in zip(parts, shares, strict=True)
        ]
        return (stacked(*scaled, least=least) if scaled else {}), shares

    def _changes(self, layers: Sequence[str], held: Tensors) -> dict[str, dict[str, Pair]]:
        """What every client changed, layer by layer."""
        made: dict[str, dict[str, Pair]] = {}
        for layer in layers:
            for client, part in self.parts.get(layer, {}).items():
                made.setdefault(client, {})[layer] = _change(part, _pairs(held).get(layer))
        return made

    def _sum_up(self, layer: str) -> None:
        parts = self.parts[layer]
        while parts:
            _, (rank, weight, scale, (a, b)) = parts.popitem()
            with one_thread():
                product = b.astype(np.float64) @ (a.astype(np.float64) * scale)
            self.sums[layer] = exact.add(self.sums.get(layer), product, weight, layer)
            self.summed.setdefault(layer, []).append((rank, weight))


def _change(part: _Part, began: Pair | None) -> Pair:
    """What a client changed in a layer, as a pair: s B A, less the components of `began` as far as its rank goes."""
    a, b = part.pair
    a = a.astype(np.float64) * part.scale
    if began is None:
        return a, b
    return np.concatenate([a, -began[0][: part.rank].astype(np.float64)]), np.hstack([b, began[1][:, : part.rank]])


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
        factors[key_b(layer)] = _side_by_side([part[key_b(layer)] for _, part in parts], dtype)
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
        if _is_small(a, b, reply.scale):
            continue
        exact.check_magnitude(a, f"{key_a(layer)} of {reply.member.id}", reply.scale)
        exact.check_magnitude(b, f"{key_b(layer)} of {reply.member.id}")
        # Cauchy-Schwarz: no entry of B A is larger than the longest row of B times the longest column of A.
        columns, rows = (x.astype(np.float32, copy=False) for x in (a, b))
        squares = np.einsum("ri,ri->i", columns, columns), np.einsum("or,or->o", rows, rows)
        largest = reply.scale * float(np.sqrt(squares[0].max(initial=0)) * np.sqrt(squares[1].max(initial=0)))
        if largest >= exact.LIMIT:
            want = f"a product below {exact.LIMIT:.0f}"
            raise WireError(problem(f"{layer} of {reply.member.id}", want, largest, "Training diverged"))


def _is_small(a: Array, b: Array, scale: float) -> bool:
    """Whether the Frobenius norms alone show that s A, B and s B A are far from the limit: one pass over each."""
    if a.dtype != np.float32 or b.dtype != np.float32:
        return False
    x, y = a.reshape(-1), b.reshape(-1)
    with np.errstate(over="ignore"):
        of_a, of_b = scale * float(np.dot(x, x)) ** 0.5, float(np.dot(y, y)) ** 0.5
    return bool(max(of_a, of_b, of_a * of_b) < 0.9 * exact.LIMIT)


def _side_by_side(parts: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    """Concatenates B of (O, R_k) to (O, R). Where shapes are alike each row is moved as one item, twice as fast."""
    alike = {(part.shape, part.dtype, part.flags.c_contiguous) for part in parts}
    if alike == {(parts[0].shape, dtype, True)} and parts[0].size:
        row = np.dtype((np.void, parts[0].shape[1] * dtype.itemsize))
        return np.concatenate([part.view(row) for part in parts], axis=1).view(dtype)
    return np.concatenate(parts, axis=1, dtype=dtype)


def _weighted(parts: Sequence[tuple[Array, float | Doubles]], dtype: np.dtype[Any]) -> Array:
    stack = np.empty((sum(a_ri.shape[0] for a_ri, _ in parts), parts[0][0].shape[1]), dtype)
    row = 0
    for a_ri, weight in parts:
        rows = stack[row : row + a_ri.shape[0]]
        np.multiply(a_ri, weight, out=rows, dtype=np.float64, casting="same_kind")
        row += a_ri.shape[0]
    return stack
