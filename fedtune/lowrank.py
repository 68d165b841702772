"""Products B A in factored form: made smaller, measured and compared without the matrix they stand for.

Shapes: R rank, I input features, O output features; A_RI, B_OR, and the product is O x I.

The exact way takes QR of both factors and the SVD of the small core between them (R x R at most):

    A' = Q_a R_a,  B = Q_b R_b,  R_b R_a' = U S V'    =>    B A = (Q_b U) S (Q_a V)'

When R reaches min(O, I) the factors' core is no smaller than the product, which is summed up then. Its leading
components are found by a randomised SVD (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedtune.blas import one_thread
from fedtune.errors import ConfigError, problem
from fedtune.tensors import Array

Pair: TypeAlias = tuple[Array, Array]
"""A_RI and B_OR of one layer."""
Doubles: TypeAlias = npt.NDArray[np.float64]

_OVERSAMPLE, _ITERATIONS = 16, 6
# Singular values below this share of what the products a_i b_i of single rows and columns amount to are rounding noise.
_NOISE = {np.dtype(np.float64): 2.0**-42, np.dtype(np.float32): 2.0**-22}


class Canonical(NamedTuple):
    """A product sum_i s_i u_i v_i' in order of falling s_i: the leading rows and columns are its best slice.

    `a_ri` holds sqrt(s_i) v_i' and `b_or` sqrt(s_i) u_i; the largest entry of each v_i is positive. `singular` are the
    s_i, float64. `error` is the Frobenius norm of what was left out, relative to that of the product.
    """

    a_ri: Array
    b_or: Array
    singular: Doubles
    error: float


def recompress(
    a_ri: Array, b_or: Array, *, rank: int = 0, energy: float = 1.0, dtype: npt.DTypeLike = np.float64
) -> Canonical:
    """Writes B A with as few components as it has.

    Args:
        a_ri: A (R, I), any float dtype.
        b_or: B (O, R).
        rank: keep at most so many components; 0 keeps all.
        energy: keep just so many components that they hold this share of the squared norm; 1 keeps all.
        dtype: to compute in and to return, float64 or float32.

    Returns:
        The canonical form. With `rank` 0 and `energy` 1 it is exact up to rounding: about 1e-15 of the norm in
        float64, below 5e-6 in float32. With a small `rank` and R >= min(O, I) it comes from a randomised SVD, whose
        error is within about 0.1 % of the best one even where the singular values do not fall.

    Guarantees: the same bits for the same input on the same machine, whatever the number of BLAS threads.

    Raises:
        ConfigError: `energy` is not in (0, 1], or `rank` is negative.
    """
    if not 0 < energy <= 1 or rank < 0:
        raise ConfigError(problem("rank and energy", "0 or more, and above 0 up to 1", (rank, energy)))
    with one_thread():
        a, b = a_ri.astype(dtype, copy=False), b_or.astype(dtype, copy=False)
        u, s, vt, rest = _svd(a, b, rank)
        squares = s.astype(np.float64) ** 2
        total = float(squares.sum()) + rest
        parts = (a.astype(np.float64) ** 2).sum(axis=1) @ (b.astype(np.float64) ** 2).sum(axis=0)
        kept = _kept(squares, total, rank, energy, _NOISE[s.dtype] ** 2 * parts)
        left_out = float(squares[kept:].sum()) + rest
        return _canonical(u[:, :kept], s[:kept], vt[:kept], float(np.sqrt(left_out / total)) if total > 0 else 0.0)


def inner(first: Pair, second: Pair) -> float:
    """Returns <B1 A1, B2 A2>, the sum over all entries, from two Gram matrices of R1 x R2 in float64."""
    (a1, b1), (a2, b2) = (_doubles(pair) for pair in (first, second))
    with one_thread():
        return float(((a1 @ a2.T) * (b1.T @ b2)).sum())


def squared_norm(a_ri: Array, b_or: Array) -> float:
    """Returns |B A|^2, Frobenius."""
    return max(inner((a_ri, b_or), (a_ri, b_or)), 0.0)


def inner_products(pairs: Sequence[Pair]) -> Doubles:
    """Returns <B_i A_i, B_j A_j> of all pairs, float64 (n, n), symmetric; ranks may differ, and be 0.

    The last bits depend on the order of `pairs`: give them in one of their own, such as that of client ids.
    """
    n = len(pairs)
    ranks = [a_ri.shape[0] for a_ri, _ in pairs]
    starts = np.cumsum([0, *ranks])
    a_ri, b_or = (
        np.concatenate([a for a, _ in pairs], dtype=np.float64),
        np.hstack([_doubles(pair)[1] for pair in pairs]),
    )
    gram = np.zeros((n, n))
    with one_thread():
        for i in range(n):
            own = slice(starts[i], starts[i + 1])
            columns = ((a_ri[own] @ a_ri[: starts[i + 1]].T) * (b_or[:, own].T @ b_or[:, : starts[i + 1]])).sum(axis=0)
            gram[i, : i + 1] = np.diff(np.concatenate([[0.0], np.cumsum(columns)])[starts[: i + 2]])
    return gram + np.tril(gram, -1).T


def squared_distances(gram: Doubles) -> Doubles:
    """Returns |P_i - P_j|^2 from inner products (n, n); what rounding makes negative is 0, as is the diagonal."""
    norms = np.diag(gram)
    distances: Doubles = np.maximum(norms[:, None] + norms[None, :] - 2.0 * gram, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def _svd(a: Array, b: Array, rank: int) -> tuple[Array, Array, Array, float]:
    """U, s, V' of B A, and the squared norm of what they leave out: only where few are wanted of a wide stack."""
    smaller = min(b.shape[0], a.shape[1])
    if a.shape[0] < smaller:
        return *_svd_of_factors(a, b), 0.0
    product = b @ a
    if rank > 0 and 4 * (rank + _OVERSAMPLE) <= smaller:
        return _leading(product, rank + _OVERSAMPLE)
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    return u, s, vt, 0.0


def _svd_of_factors(a: Array, b: Array) -> tuple[Array, Array, Array]:
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def _leading(product: Array, count: int) -> tuple[Array, Array, Array, float]:
    """`count` leading triples of a matrix by subspace iteration from a fixed draw, and the rest's squared norm."""
    rng = np.random.Generator(np.random.Philox(key=0))
    q = np.linalg.qr(product @ rng.normal(size=(product.shape[1], count)).astype(product.dtype))[0]
    for _ in range(_ITERATIONS):
        q = np.linalg.qr(product @ np.linalg.qr(product.T @ q)[0])[0]
    u, s, vt = np.linalg.svd(q.T @ product, full_matrices=False)
    norm, found = (float((x.astype(np.float64) ** 2).sum()) for x in (product, s))
    return q @ u, s, vt, max(norm - found, 0.0)


def _kept(squares: Doubles, total: float, rank: int, energy: float, noise: float) -> int:
    """How many components to keep."""
    count = int((squares > noise).sum())
    if energy < 1:
        count = min(count, 1 + int(np.searchsorted(np.cumsum(squares), energy * total)))
    return min(count, rank) if rank else count


def _canonical(u: Array, s: Array, vt: Array, error: float) -> Canonical:
    largest = np.abs(vt).argmax(axis=1)
    root = np.sqrt(s) * np.where(vt[np.arange(len(s)), largest] < 0, -1, 1).astype(s.dtype)
    a_ri, b_or = np.ascontiguousarray(vt * root[:, None]), np.ascontiguousarray(u * root)
    return Canonical(a_ri, b_or, s.astype(np.float64), error)


def _doubles(pair: Pair) -> tuple[Doubles, Doubles]:
    return pair[0].astype(np.float64, copy=False), pair[1].astype(np.float64, copy=False)
