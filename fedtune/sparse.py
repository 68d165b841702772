"""The smallest weights of a tensor, as a rule that everyone can apply and nobody needs to send.

Sparse MeZO (Liu et al. 2024, arXiv 2402.15751) moves only the weights of smallest magnitude in each tensor. It takes
them anew from the current weights at every step; then a rebuild from coefficients would need every past model. Here
they are those of the base, for the whole run: |w| below a threshold, which is one of the base's own values, and of the
weights at the threshold the first ones. Comparisons of stored numbers are exact, so every machine finds the same ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.tensors import Array

Flat = Any  # a one-dimensional numpy array or torch tensor


@dataclass(frozen=True)
class Smallest:
    """The `floor(density * N)` smallest weights of a tensor.

    Attributes:
        base: the tensor, flat; what stands in it is never changed.
        threshold: magnitude of the largest of them; below 0 if there is none.
        last: place of the last one at the threshold.
    """

    base: Flat
    threshold: float
    last: int

    @classmethod
    def of(cls, base: Flat, values: Array, density: float) -> "Smallest":
        """Finds them.

        Args:
            base: the tensor, flat, as `left_out` shall compare it.
            values: the same numbers, flat, in numpy.
            density: which fraction to take, 0 to 1.
        """
        count = int(density * len(values))
        if count == 0:
            return cls(base, -1.0, -1)
        sizes = np.abs(values if values.dtype == np.float64 else values.astype(np.float32))
        threshold = np.partition(sizes, count - 1)[count - 1]
        at = np.flatnonzero(sizes == threshold)
        return cls(base, float(threshold), int(at[count - 1 - int((sizes < threshold).sum())]))

    def left_out(self, start: int, count: int) -> Any:
        """Says of the weights at `start`, ... which are not among them: booleans (count,), of the base's library."""
        sizes = abs(self.base[start : start + count])
        left = sizes >= self.threshold
        first = left[: max(0, self.last + 1 - start)]
        first &= sizes[: len(first)] != self.threshold
        return left
