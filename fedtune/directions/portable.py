"""The directions in plain torch integer operations, on any device: for GPUs without Triton, and as a fallback.

Philox' 32-bit words live in int64, whose products wrap: the low 64 bits are right, and a mask removes the sign that
an arithmetic shift brings in. Words are made for many tiles at once, weights are touched a few tiles at a time.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedtune.directions.philox import MULTIPLIERS, ROUNDS, WEYL
from fedtune.directions.pool import (
    STREAM_D,
    STREAM_E,
    STREAM_GAUSSIAN,
    STREAM_RADEMACHER,
    TILE,
    Coefficients,
    Move,
    Pool,
    check_first,
    check_replay,
    step_of,
    unit_of,
)
from fedtune.directions.quantiles import quantiles

MANY, FEW = 512, 16
_LOW = 0xFFFFFFFF


def replay(pool: Pool, coefficients: Coefficients, exponent: int, base: Tensor, first: int, out: Tensor) -> None:
    """Sets `out` to base + 2**-exponent * sum_k c_k z_k, rounded once; see `reference.replay`."""
    check_replay(pool, coefficients)
    if pool.kind == "hadamard":
        c = torch.from_numpy(coefficients).to(base.device)
        h = _sylvester(pool.size, base.device)
        totals: Iterator[Tensor] = (
            _transformed(pool, c, h, d, e) for d, e in _hadamard_words(pool, first, len(base), base.device)
        )
    else:
        totals = _summed(pool, coefficients, first, len(base), base.device)
    _add(totals, unit_of(pool, exponent), base, first, out)


def perturb(pool: Pool, k: int, scale: float, base: Tensor, first: int, out: Tensor) -> None:
    """Sets `out` to base + scale * z_k, rounded once; see `reference.perturb`."""
    step = step_of(pool, scale, out.dtype == torch.float64)
    _add(_direction(pool, k, first, len(base), base.device), step, base, first, out)


def advance(pool: Pool, moves: Sequence[Move], weights: Tensor, first: int) -> None:
    """Adds change * z_k to `weights` in place for each move (k, change) in turn, each sum rounded."""
    for move in moves:
        perturb(pool, *move, weights, first, weights)


def spread(
    pool: Pool, k: int, scales: Sequence[float], weights: Tensor, first: int, outs: Tensor, move: Move | None = None
) -> None:
    """Adds change * z_moved to `weights` in place, then sets each `outs[j]` to weights + scales[j] * z_k."""
    advance(pool, [move] if move else [], weights, first)
    for scale, out in zip(scales, outs, strict=True):
        perturb(pool, k, scale, weights, first, out)


def transform(x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Walsh-Hadamard transform along the last axis of float64 integers (N, K) below 2**53: exact in any order.

    H_K is the Kronecker product of H_p and H_q, so with a row seen as X of p x q its transform is H_p X H_q.
    """
    left, right = factors
    return (left @ (x.view(-1, len(left), len(right)) @ right)).view(x.shape)


def _sylvester(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns H_p and H_q with p * q = size."""
    levels = size.bit_length() - 1
    h = [torch.ones(1, 1, dtype=torch.float64, device=device)]
    for _ in range(levels - levels // 2):
        h.append(torch.cat((torch.cat((h[-1], h[-1]), 1), torch.cat((h[-1], -h[-1]), 1))))
    return h[levels // 2], h[-1]


def _transformed(pool: Pool, c: Tensor, h: tuple[Tensor, Tensor], d: Tensor, e: Tensor) -> Tensor:
    flip, turn = _masks(e).view(-1, pool.size), _masks(d)
    total = transform((c ^ flip).sub_(flip).double(), h).to(torch.int32).view_as(turn)
    return total.bitwise_xor_(turn).sub_(turn)


def _summed(pool: Pool, coefficients: Coefficients, first: int, count: int, device: torch.device) -> Iterator[Tensor]:
    wide = torch.int64 if pool.kind == "gaussian" else torch.int32
    used = np.flatnonzero(coefficients).tolist()
    for start in range(0, count, FEW * TILE):
        size = min(FEW * TILE, count - start)
        total = torch.zeros(-(-size // TILE), TILE, dtype=wide, device=device)
        for k in used:
            total.add_(next(_direction(pool, k, first + start, size, device)), alpha=int(coefficients[k]))
        yield total


def _direction(pool: Pool, k: int, first: int, count: int, device: torch.device) -> Iterator[Tensor]:
    """Yields z_k as integers (tiles, 4096), in units of 2**-pool.bits."""
    if pool.kind == "gaussian":
        yield from _few(lambda tiles: _words(pool, STREAM_GAUSSIAN, k, tiles, 512), _normals, first, count, device)
    elif pool.kind == "rademacher":
        yield from _few(lambda tiles: _words(pool, STREAM_RADEMACHER, k, tiles, 32), _signs, first, count, device)
    else:
        both = torch.arange(pool.size, device=device, dtype=torch.int32) & k
        for shift in (8, 4, 2, 1):
            both = both ^ (both >> shift)
        for d, e in _hadamard_words(pool, first, count, device):
            flip = _masks(e).view(-1, pool.size)[:, k : k + 1] ^ -(both & 1)
            yield flip.view(-1, TILE).bitwise_xor_(_masks(d)).mul_(2).add_(1)


def _hadamard_words(pool: Pool, first: int, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    def both(tiles: Tensor) -> Tensor:
        return torch.stack((_words(pool, STREAM_D, 0, tiles, 32), _words(pool, STREAM_E, 0, tiles, 32)), 1)

    for words in _few(both, lambda words: words, first, count, device):
        yield words[:, 0], words[:, 1]


def _few(
    make: Callable[[Tensor], Tensor],
    use: Callable[[Tensor], Tensor],
    first: int,
    count: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Makes words for many tiles, yields what `use` makes of a few."""
    begin, end = first // TILE, first // TILE - (-count // TILE)
    for start in range(begin, end, MANY):
        words = make(torch.arange(start, min(start + MANY, end), device=device))
        for part in torch.split(words, FEW):
            yield use(part)


def _add(totals: Iterator[Tensor], step: float, base: Tensor, first: int, out: Tensor) -> None:
    check_first(first)
    start = 0
    for total in totals:
        part = slice(start, start + total.numel())
        exact = total.view(-1)[: len(base[part])].double().mul_(step).add_(base[part])
        out[part] = exact if out.dtype == torch.float64 else exact.float()
        start += total.numel()


def _masks(words: Tensor) -> Tensor:
    """Returns signs as 0 and -1, int32 (tiles, 4096): (x ^ m) - m is x or -x."""
    up = 31 - torch.arange(32, device=words.device, dtype=torch.int32)[None, :, None]
    return (words.to(torch.int32)[:, None, :] << up).bitwise_right_shift_(31).view(len(words), TILE)


def _signs(words: Tensor) -> Tensor:
    return _masks(words).mul_(2).add_(1)


def _normals(words: Tensor) -> Tensor:
    u = torch.cat((words & 0xFFFF, words >> 16), 1)
    table = torch.from_numpy(quantiles().astype(np.int64)).to(words.device)
    z = table[u & 0x7FFF]
    return torch.where(u >= 0x8000, -z, z)


def _words(pool: Pool, stream: int, row: int, tiles: Tensor, lanes: int) -> Tensor:
    """Returns the words of `tiles`, int64 (tiles, 4 * lanes) below 2**32."""
    counter = tiles[:, None] * lanes + torch.arange(lanes, device=tiles.device)
    x0, x1 = counter & _LOW, counter >> 32
    x2, x3 = torch.full_like(counter, row), torch.full_like(counter, stream)
    k0, k1 = pool.keys
    for _ in range(ROUNDS):
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x2 = ((p1 >> 32) & _LOW) ^ x1 ^ k0, ((p0 >> 32) & _LOW) ^ x3 ^ k1
        x1, x3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return torch.cat((x0, x1, x2, x3), 1)
