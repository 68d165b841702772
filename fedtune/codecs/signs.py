"""One compressed tensor: the places that are kept, their signs, and the one magnitude they all have."""

from dataclasses import dataclass

import numpy as np

from fedtune.codecs.gaps import Positions, Signs
from fedtune.tensors import DTYPES, Array, TensorSpec

_BLOCK = 1 << 15


@dataclass(frozen=True, slots=True)
class Code:
    """A tensor of -scale, 0 and scale.

    Attributes:
        spec: name, shape and dtype of the tensor.
        count: how many values are not zero.
        scale: the magnitude of those; finite, at least 0.
        signs: -1 or 1 for each of `positions`; without positions -1, 0 or 1 for every value.
        positions: ascending places in the flattened tensor.
    """

    spec: TensorSpec
    count: int
    scale: float
    signs: Signs
    positions: Positions | None = None

    @property
    def magnitude(self) -> float:
        """The scale as the tensor's dtype has it."""
        return float(np.asarray(self.scale).astype(DTYPES[self.spec.dtype]))

    def sparse(self) -> tuple[Positions, Signs]:
        """Returns the places that are kept, and their signs."""
        if self.positions is not None:
            return self.positions, self.signs
        positions = np.flatnonzero(self.signs)
        return positions, self.signs[positions]

    def dense(self) -> Signs:
        """Returns -1, 0 or 1 for every value, flattened."""
        if self.positions is None:
            return self.signs
        signs = np.zeros(size_of(self.spec), np.int8)
        signs[self.positions] = self.signs
        return signs

    def values(self) -> Array:
        """Returns the tensor itself."""
        plus = np.asarray(self.scale).astype(DTYPES[self.spec.dtype])
        if self.positions is None:
            out = np.array([0, plus, -plus], plus.dtype)[self.signs]
        else:
            out = np.zeros(size_of(self.spec), plus.dtype)
            out[self.positions] = np.array([0, plus, -plus], plus.dtype)[self.signs]
        return out.reshape(self.spec.shape)

    def add_to(self, total: Array, factor: float) -> None:
        """Adds `factor` times the tensor to `total`, an array of its shape, touching only what is kept.

        Guarantees: the same bits as adding `factor * scale`, computed in float64, to each kept value in turn.
        """
        flat, step = total.reshape(-1), np.asarray(factor * self.scale).astype(total.dtype)
        places = self.positions
        for at in range(0, self.signs.size, _BLOCK):
            change = self.signs[at : at + _BLOCK].astype(total.dtype) * step  # signs times a number: exact
            if places is None:
                flat[at : at + _BLOCK] += change
            else:
                flat[places[at : at + _BLOCK]] += change
        if not np.may_share_memory(flat, total):
            total[...] = flat.reshape(total.shape)


def size_of(spec: TensorSpec) -> int:
    """Number of values of a tensor."""
    return spec.nbytes // DTYPES[spec.dtype].itemsize
