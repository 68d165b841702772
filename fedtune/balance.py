"""LoRA factors brought into the form that loses least when it is compressed: the same product, evenly spread.

Shapes: R rank, I input features, O output features.

    B A = (Q_b R_b) (Q_a R_a)^T = Q_b (U S V^T) Q_a^T        B' = Q_b U sqrt(S),  A' = sqrt(S) V^T Q_a^T

Trained factors are lopsided: A still holds the noise it was drawn from, B only what was learned. A threshold over both
would keep the noise. Balanced, both carry the same singular values, and B' A' = B A.
"""

import numpy as np
import numpy.typing as npt

from fedtune.blas import one_thread
from fedtune.lora import key_a, key_b, layers_of
from fedtune.tensors import Array, Tensors, check_finite


def balanced(factors: Tensors) -> dict[str, Array]:
    """Balances every layer of `factors` (`layer/A` (R, I), `layer/B` (O, R)); dtypes and shapes stay.

    Guarantees: the product of each layer is the same to the rounding of its dtype; directions that it does not use
        become zero.

    Raises:
        WireError: a value is not finite.
    """
    out = dict(factors)
    for layer in layers_of(factors):
        check_finite(factors[key_a(layer)], key_a(layer))
        check_finite(factors[key_b(layer)], key_b(layer))
        out[key_a(layer)], out[key_b(layer)] = balance(factors[key_a(layer)], factors[key_b(layer)])
    return out


def balance(a_ri: Array, b_or: Array) -> tuple[Array, Array]:
    """Balances one pair of factors, in float64, by QR of both and the SVD of an (R, R) matrix."""
    with one_thread():
        q_b, r_b = np.linalg.qr(b_or.astype(np.float64))
        q_a, r_a = np.linalg.qr(a_ri.astype(np.float64).T)
        u, s, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
        b, a = q_b @ (u * np.sqrt(s)), (np.sqrt(s)[:, None] * v) @ q_a.T
    rank = a_ri.shape[0]
    a_out, b_out = np.zeros(a_ri.shape), np.zeros(b_or.shape)  # of rank R, also where R is above I or O
    a_out[: min(rank, s.size)], b_out[:, : min(rank, s.size)] = a, b
    return a_out.astype(a_ri.dtype), b_out.astype(b_or.dtype)


def lengthened(a_ri: Array, b_or: Array, fresh_ri: Array) -> tuple[Array, Array]:
    """The same product with every row of A as long as those of `fresh_ri` are on average, B taking the rest.

    Rows of zeros stay as they are; so does all, where `fresh_ri` is zero.
    """
    lengths, want = _lengths(a_ri), np.sqrt((_lengths(fresh_ri) ** 2).mean())
    grown = np.divide(want, lengths, out=np.ones_like(lengths), where=(lengths > 0) & (want > 0))
    return (a_ri * grown[:, None]).astype(a_ri.dtype), (b_or / grown).astype(b_or.dtype)


def _lengths(a_ri: Array) -> npt.NDArray[np.float64]:
    return np.asarray(np.linalg.norm(a_ri.astype(np.float64), axis=1))
