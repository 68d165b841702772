"""What a pool of directions is, how a model's tensors lie in it, and the bounds that keep its integers exact."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, ldexp
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fedtune.errors import ConfigError, problem

Kind: TypeAlias = Literal["rademacher", "hadamard", "gaussian"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Coefficients: TypeAlias = npt.NDArray[np.int32]
Move: TypeAlias = tuple[int, float]
"""A direction, and how far along it."""

TILE = 4096
STREAM_RADEMACHER, STREAM_D, STREAM_E, STREAM_GAUSSIAN = 1, 2, 3, 4
GAUSSIAN_BITS = 12


@dataclass(frozen=True, slots=True)
class Pool:
    """K directions; see `fedtune.directions` for what they are.

    Attributes:
        kind: `rademacher`, `hadamard` or `gaussian`.
        seed: of all K together, 64 bits.
        size: K.

    Raises:
        ConfigError: there is no such pool.
    """

    kind: Kind
    seed: int
    size: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(problem("pool", f"one of {', '.join(KINDS)}", self.kind))
        if not 0 <= self.seed < 2**64:
            raise ConfigError(problem("pool: seed", "0 to 2**64 - 1", self.seed))
        if not 1 <= self.size <= 2**20:
            raise ConfigError(problem("pool: size", "1 to 2**20 directions", self.size))
        if self.kind == "hadamard" and (not 128 <= self.size <= TILE or self.size & (self.size - 1)):
            remedy = "pool = 'rademacher' takes any number"
            raise ConfigError(problem("size of a hadamard pool", "128, 256, ..., 4096", self.size, remedy))

    @property
    def keys(self) -> tuple[int, int]:
        """The two words of Philox' key."""
        return self.seed & 0xFFFFFFFF, self.seed >> 32

    @property
    def bits(self) -> int:
        """Binary places of z: its integers are z * 2**bits."""
        return GAUSSIAN_BITS if self.kind == "gaussian" else 0


def layout(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns where each tensor begins in the pool, from the number of its weights."""
    first: dict[str, int] = {}
    position = 0
    for name in sorted(sizes):
        first[name] = position
        position += -(-sizes[name] // TILE) * TILE
    return first


def check_replay(pool: Pool, coefficients: Coefficients) -> None:
    """Raises ConfigError unless there is one int32 a direction and their magnitudes sum to less than 2**31."""
    if coefficients.shape != (pool.size,) or coefficients.dtype != np.int32:
        want, got = f"int32 of shape ({pool.size},)", f"{coefficients.dtype} of shape {coefficients.shape}"
        raise ConfigError(problem("coefficients", want, got))
    total = int(np.abs(coefficients.astype(np.int64)).sum())
    if total >= 2**31:
        raise ConfigError(problem("coefficients: sum of magnitudes", "less than 2**31", total, "Use a coarser unit"))


def check_first(first: int) -> None:
    """Raises ConfigError unless a tensor begins at a tile."""
    if first < 0 or first % TILE:
        raise ConfigError(problem("first", f"a multiple of {TILE}", first))


def unit_of(pool: Pool, exponent: int) -> float:
    """Value of one in the integer sum of a replay."""
    return ldexp(1.0, -exponent - pool.bits)


def step_of(pool: Pool, scale: float, double: bool) -> float:
    """Rounds `scale` so that its product with any z is exact in float64; returns the factor on z's integers.

    24 significant bits, or 38 when the weights are float64. With signs and float32 weights the factor is a float32,
    and adding it in float32 gives the same bits as adding in float64 and rounding: 53 >= 2 * 24 + 2.
    """
    bits = 38 if double else 24
    mantissa, power = frexp(scale)
    return ldexp(round(ldexp(mantissa, bits)), power - bits - pool.bits)
