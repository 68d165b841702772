"""Whose update counts, and by how much: judged by the product B A it makes, never by its factors.

Two pairs of factors may be far apart and have the same product, and the other way round. Norms and distances of
products come from Gram matrices of the factors (`fedtune.lowrank`); multi-Krum and clipping are `fedtune.robust`'s.
Clients are in order of their ids everywhere, so who arrived first has no say.

Shapes: R rank, I input features, O output features; A_RI, B_OR.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedtune import lowrank
from fedtune.averaging import Kept
from fedtune.errors import RoundError, problem
from fedtune.lora import key_a, key_b
from fedtune.lowrank import Doubles, Pair
from fedtune.robust import clip_factors, multi_krum
from fedtune.tensors import PRIVATE, Array, Tensors

_NOTES = ("left_out", "clipped")
_HALVINGS = 60


class Judged(NamedTuple):
    """Means of factors over the clients that count, float64, and the ids of the others and of those scaled down."""

    means: dict[str, Array]
    left_out: list[str]
    clipped: list[str]


def trusted(made: Sequence[Mapping[str, Pair]], byzantine: int, limit: float) -> tuple[list[int], Doubles]:
    """Decides by the products alone which updates count, and by how much.

    Args:
        made: for each client what it changed in each layer, in order of client id.
        byzantine: how many multi-Krum leaves out; 0 leaves out none.
        limit: longest change, Frobenius norm over all layers; 0 clips none.

    Returns:
        The indices of those kept, and for every client the factor that shortens its change, at most 1.

    Raises:
        RoundError: too few clients for multi-Krum.
    """
    clips = np.ones(len(made))
    if limit:
        clips = clip_factors([sum(lowrank.squared_norm(*pair) for pair in one.values()) ** 0.5 for one in made], limit)
    return krum(made, byzantine), clips


def krum(made: Sequence[Mapping[str, Pair]], byzantine: int) -> list[int]:
    """Returns the indices of the clients whose products multi-Krum keeps: all but `byzantine`."""
    if not byzantine:
        return list(range(len(made)))
    gram = np.zeros((len(made), len(made)))
    for layer in made[0]:
        gram += lowrank.inner_products([one[layer] for one in made])
    return list(multi_krum(lowrank.squared_distances(gram), byzantine, len(made) - byzantine))


def averaged(state: Tensors, kept: Kept, scale: float, byzantine: int, limit: float) -> Judged:
    """Averages the factors of the trusted clients, weighted by examples.

    A client whose product s B_k A_k is farther than `limit` from the state's goes only part of the way there, A and B
    alike: just so far that its product is `limit` away.

    Args:
        state: the factors that every client began with; those that `kept` lacks are frozen.
        kept: the updates.
        scale: s.
        byzantine: how many multi-Krum leaves out.
        limit: longest change of the product, Frobenius norm over all layers; 0 clips none.

    Raises:
        RoundError: too few clients for multi-Krum.
    """
    ids = sorted(kept)
    moves = [_moves(state, kept[client][2], scale) for client in ids]
    counts = krum([{layer: _joined(*pairs) for layer, pairs in one.items()} for one in moves], byzantine)
    ways = {k: _way(list(moves[k].values()), limit) if limit else 1.0 for k in counts}
    weight = sum(kept[ids[k]][1] for k in counts)
    means: dict[str, Array] = {}
    for name in kept[ids[0]][2]:
        x = state[name].astype(np.float64)
        means[name] = x + sum(kept[ids[k]][1] / weight * ways[k] * (kept[ids[k]][2][name] - x) for k in counts)
    left_out = [client for k, client in enumerate(ids) if k not in counts]
    return Judged(means, left_out, [ids[k] for k in counts if ways[k] < 1])


def trimmed(kept: Kept, trim: int) -> dict[str, Array]:
    """Averages each entry over the clients but for its `trim` largest and `trim` smallest values (float64).

    Every client left counts the same, whatever its examples: Yin et al. 2018 (arXiv 1803.01498), definition 2.

    Raises:
        RoundError: fewer than 2 `trim` + 1 clients.
    """
    ids = sorted(kept)
    if len(ids) <= 2 * trim:
        raise RoundError(problem("updates for a trimmed mean", f"at least 2 * {trim} + 1", len(ids)))
    means: dict[str, Array] = {}
    for name in kept[ids[0]][2]:
        values = np.sort(np.stack([kept[client][2][name] for client in ids]).astype(np.float64), axis=0)
        means[name] = values[trim : len(ids) - trim].mean(axis=0)
    return means


def noted(left_out: Sequence[str], clipped: Sequence[str]) -> dict[str, Array]:
    """Keeps ids for the round's record in the coordinator's own part of the state."""
    ids = zip(_NOTES, (left_out, clipped), strict=True)
    return {PRIVATE + note: np.frombuffer("\n".join(who).encode(), np.uint8) for note, who in ids if who}


def notes(state: Tensors) -> dict[str, list[str]]:
    """Reads what `noted` has kept."""
    return {note: state[PRIVATE + note].tobytes().decode().split() for note in _NOTES if PRIVATE + note in state}


def _moves(state: Tensors, update: Tensors, scale: float) -> dict[str, tuple[Pair, Pair]]:
    """For each layer s (D_B A + B D_A) and s D_B D_A: the change of the product is their sum."""
    layers = dict.fromkeys(name[:-2] for name in update)
    found = {}
    for layer in layers:
        a, b = (state[key].astype(np.float64) for key in (key_a(layer), key_b(layer)))
        d_a, d_b = (
            update[k].astype(np.float64) - x if k in update else 0 * x
            for k, x in ((key_a(layer), a), (key_b(layer), b))
        )
        found[layer] = (np.concatenate([a, d_a]) * scale, np.hstack([d_b, b])), (d_a * scale, d_b)
    return found


def _joined(first: Pair, second: Pair) -> Pair:
    return np.concatenate([first[0], second[0]]), np.hstack([first[1], second[1]])


def _way(moves: Sequence[tuple[Pair, Pair]], limit: float) -> float:
    """How far to go from the state's factors to a client's, so that the product is at most `limit` away.

    At t of the way the change is t L + t^2 Q, with the pairs L and Q of `_moves`; its length is found by halving.
    """
    ll, lq, qq = (sum(lowrank.inner(m[i], m[j]) for m in moves) for i, j in ((0, 0), (0, 1), (1, 1)))

    def too_far(t: float) -> bool:
        return t * t * (ll + 2 * t * lq + t * t * qq) > limit**2

    if not too_far(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if too_far(middle) else (middle, high)
    return low
