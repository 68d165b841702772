"""The directions as Triton kernels: one program is one tile, read once and written once.

With `TRITON_INTERPRET=1` in the environment the kernels run on a CPU, slowly; tests prove them so.
"""
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# (the language of the kernels is Triton's, which has no types)

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedtune.directions.pool import TILE, Coefficients, Move, Pool, check_first, check_replay, step_of, unit_of
from fedtune.directions.quantiles import quantiles

_KINDS = {"rademacher": 0, "hadamard": 1, "gaussian": 2}


def replay(pool: Pool, coefficients: Coefficients, exponent: int, base: Tensor, first: int, out: Tensor) -> None:
    """Sets `out` to base + 2**-exponent * sum_k c_k z_k, rounded once; see `reference.replay`."""
    check_replay(pool, coefficients)
    check_first(first)
    used = np.flatnonzero(coefficients).astype(np.int32)
    if pool.kind == "hadamard":
        c, ks = coefficients, used
    else:
        c, ks = coefficients[used], used
    _launch(pool, c, ks, unit_of(pool, exponent), base, first, out, all_at_once=pool.kind == "hadamard")


def perturb(pool: Pool, k: int, scale: float, base: Tensor, first: int, out: Tensor) -> None:
    """Sets `out` to base + scale * z_k, rounded once; see `reference.perturb`."""
    check_first(first)
    step = step_of(pool, scale, out.dtype == torch.float64)
    _launch(pool, np.ones(1, np.int32), np.array([k], np.int32), step, base, first, out, all_at_once=False)


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


def _launch(
    pool: Pool,
    c: Coefficients,
    ks: Coefficients,
    step: float,
    base: Tensor,
    first: int,
    out: Tensor,
    *,
    all_at_once: bool,
) -> None:
    device = base.device
    # A float given to a kernel arrives as float32, so the step travels in memory.
    numbers = torch.from_numpy(c).to(device), torch.from_numpy(ks).to(device)
    factor = torch.tensor([step], dtype=torch.float64, device=device)
    keys = torch.tensor(pool.keys, device=device)
    size = pool.size if pool.kind == "hadamard" else TILE
    tiles = -(-len(base) // TILE)
    _tile[(tiles,)](
        base, out, len(base), first // TILE, *numbers, len(ks), factor, keys, _table(device),
        KIND=_KINDS[pool.kind], SIZE=size, LEVELS=size.bit_length() - 1, ALL=all_at_once,
        WIDE=out.dtype == torch.float64,
    )  # fmt: skip  # grouped by meaning


@cache
def _table(device: torch.device) -> Tensor:
    return torch.from_numpy(quantiles().astype(np.int32)).to(device)


@triton.jit
def _words(k0, k1, tile, row, stream, LANES: tl.constexpr):
    """Words of a tile (4 * LANES,); every output is computed and one of the four is kept."""
    v = tl.arange(0, 4 * LANES)
    c = tile.to(tl.uint64) * LANES + (v % LANES).to(tl.uint64)
    x0, x1 = c.to(tl.uint32), (c >> 32).to(tl.uint32)
    x2 = tl.zeros_like(x0) + row.to(tl.uint32)
    x3 = tl.zeros_like(x0) + stream
    for _ in tl.static_range(10):
        h0, h1 = tl.umulhi(x0, 0xD2511F53), tl.umulhi(x2, 0xCD9E8D57)
        l0, l1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = h1 ^ x1 ^ k0, l1, h0 ^ x3 ^ k1, l0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    which = v // LANES
    return tl.where(which == 0, x0, tl.where(which == 1, x1, tl.where(which == 2, x2, x3)))


@triton.jit
def _signs(k0, k1, tile, row, stream):
    """Signs of a tile, int32 (4096,)."""
    w = _words(k0, k1, tile, row, stream, 32)
    bits = (w[None, :] >> tl.arange(0, 32)[:, None].to(tl.uint32)) & 1
    return tl.reshape(1 - 2 * bits.to(tl.int32), (4096,))


@triton.jit
def _normals(k0, k1, tile, row, table):
    """Normal numbers of a tile in 1/4096, int32 (4096,)."""
    w = _words(k0, k1, tile, row, 4, 512)
    u = tl.reshape((w[None, :] >> (16 * tl.arange(0, 2))[:, None].to(tl.uint32)) & 0xFFFF, (4096,)).to(tl.int32)
    z = tl.load(table + (u & 0x7FFF))
    return tl.where(u >= 0x8000, -z, z)


@triton.jit
def _parity(x):
    for s in tl.static_range(4):
        x = x ^ (x >> (8 >> s))
    return 1 - 2 * (x & 1)


@triton.jit
def _transform(x, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """Walsh-Hadamard transform of each SIZE of x (4096,): a level on the last bit, then the bits move up by one."""
    for _ in tl.static_range(LEVELS):
        a, b = tl.split(tl.reshape(x, (4096 // SIZE, SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (4096,))
    return x


@triton.jit
def _tile(
    base, out, count, first, coefficients, ks, used, factor, keys, table,
    KIND: tl.constexpr, SIZE: tl.constexpr, LEVELS: tl.constexpr, ALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds the sum over one tile."""
    tile = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, 4096)
    inside = tile * 4096 + o < count
    here = first + tile
    k0, k1 = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    none = (tile * 0).to(tl.int32)
    if ALL:
        c = tl.load(coefficients + o % SIZE) * _signs(k0, k1, here, none, 3)
        total = (_transform(c, SIZE, LEVELS) * _signs(k0, k1, here, none, 2)).to(tl.int64)
    else:
        total = tl.zeros((4096,), tl.int64)
        for n in range(used):
            k = tl.load(ks + n)
            if KIND == 0:
                z = _signs(k0, k1, here, k, 1)
            elif KIND == 1:
                e = tl.gather(_signs(k0, k1, here, none, 3), (o // SIZE) * SIZE + k, 0)
                z = _signs(k0, k1, here, none, 2) * e * _parity((o % SIZE) & k)
            else:
                z = _normals(k0, k1, here, k, table)
            total += z.to(tl.int64) * tl.load(coefficients + n).to(tl.int64)
    at = tile * 4096 + o
    start = tl.load(base + at, inside)
    if base.dtype.element_ty != tl.float64:
        start = start.to(tl.float32)
    exact = start.to(tl.float64) + total.to(tl.float64) * tl.load(factor)
    if WIDE:
        tl.store(out + at, exact, inside)
    else:
        single = exact.to(tl.float32)
        if out.dtype.element_ty == tl.bfloat16:  # to nearest even by hand: the interpreter would cut
            bits = single.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            single = bits.to(tl.float32, bitcast=True)
        tl.store(out + at, single.to(out.dtype.element_ty), inside)
