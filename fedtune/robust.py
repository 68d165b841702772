"""Folding that a few hostile or broken clients cannot steer: whom to keep, and how far one may pull.

Both work on numbers that a method computes in its own space (FedKSeed: the K-vector of scalars; LoRA methods: the
product B A), so no update is touched here. Multi-Krum: Blanchard et al., NeurIPS 2017.
"""

import numpy as np
import numpy.typing as npt

from fedtune.errors import ConfigError, RoundError, problem

Doubles = npt.NDArray[np.float64]


def krum_scores(distances: npt.ArrayLike, byzantine: int) -> Doubles:
    """Returns each client's Krum score: the sum of its squared distances to its n - f - 2 nearest others.

    Args:
        distances: squared pairwise distances (n, n); the diagonal is not read.
        byzantine: f, how many clients may be hostile.

    Returns:
        Scores, float64 (n,); low is trusted.

    Raises:
        RoundError: n < 2 f + 3, so a majority near a client proves nothing.
        ConfigError: `byzantine` is negative, or `distances` are no square of numbers that are not NaN.
    """
    d = np.array(distances, np.float64)
    n = len(d)
    if d.shape != (n, n) or np.isnan(d[~np.eye(n, dtype=bool)]).any():
        raise ConfigError(problem("distances", "a square of numbers", f"shape {d.shape}, or NaN in it"))
    if byzantine < 0:
        raise ConfigError(problem("byzantine", "0 or more clients", byzantine))
    if n < 2 * byzantine + 3:
        remedy = "Wait for more clients a round, or expect fewer hostile ones"
        raise RoundError(problem("updates for Krum", f"at least 2 * {byzantine} + 3", n, remedy))
    np.fill_diagonal(d, np.inf)
    scores: Doubles = np.sort(d, axis=1)[:, : n - byzantine - 2].sum(axis=1)
    return scores


def multi_krum(distances: npt.ArrayLike, byzantine: int, keep: int) -> tuple[int, ...]:
    """Returns the `keep` clients with the lowest Krum scores, in rising order; of equal ones the first.

    Raises:
        RoundError: n < 2 f + 3.
        ConfigError: `keep` is not 1 to n - f, or as in `krum_scores`.
    """
    scores = krum_scores(distances, byzantine)
    if not 1 <= keep <= len(scores) - byzantine:
        raise ConfigError(problem("keep", f"1 to {len(scores) - byzantine} (all but the hostile)", keep))
    best: list[int] = np.argsort(scores, kind="stable")[:keep].tolist()
    return tuple(sorted(best))


def clip_factors(norms: npt.ArrayLike, limit: float) -> Doubles:
    """Returns min(1, limit / norm) of each norm, float64 (n,): what scales an update down to length `limit`.

    Raises:
        ConfigError: `limit` is not above 0, or a norm is negative or NaN.
    """
    n = np.asarray(norms, np.float64)
    if not limit > 0:
        raise ConfigError(problem("limit of a norm", "a number above 0", limit))
    if not (n >= 0).all():
        raise ConfigError(problem("norms", "0 or more", n.tolist()))
    factors: Doubles = limit / np.maximum(n, limit)
    return factors
