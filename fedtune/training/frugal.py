"""What a seed method tunes on a device with room for inference alone: nothing is held but the base.

`fedtune.training.seeded.SeedModel` holds the rebuilt model, whose weights move in place. Here a layer makes its weights
whenever it needs them, a few rows at a time: it replays the coefficients on the base, which stays mapped from its file,
and then takes every step of the turn again, one after the other, with its rounding. So the bits are those of a client
with room for the model, and the price is time: step n costs n walks over each block while it is in the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.directions import Coefficients, Pool
from fedtune.tensors import TensorSpec, as_bytes, dtype_name, leaf_of, root_digest
from fedtune.training.seeded import Origin, Replayed, flat, origins
from fedtune.training.streaming import CHUNK, Room, array
from fedtune.zo import Line


class FrugalModel:
    """A `fedtune.training.seeded.Seeded` over a model's own weights that holds nothing but the base."""

    def __init__(self, model: nn.Module, density: float | None = None) -> None:
        self._weights = dict(sorted(model.named_parameters()))
        self._origins = origins(model, density)
        self._replayed: Replayed | None = None

    def replay(self, pool: Pool, coefficients: Coefficients, exponent: int) -> bytes:
        """Remembers that the weights are base + 2**-exponent * sum_k c_k z_k; returns their digest."""
        self._replayed = pool, coefficients, exponent
        return self.digest()

    def digest(self) -> bytes:
        """SHA-256 of all weights: their names, shapes, dtypes and values (32 bytes)."""
        room, leaves = Room(), []
        for name, origin in self._origins.items():
            weights = Anew(origin, self._replayed, room)
            spec = TensorSpec(name, tuple(origin.base.shape), dtype_name(array(origin.base[:0].cpu())))
            spans = (slice(start, start + CHUNK) for start in range(0, len(weights), CHUNK))
            leaves.append(leaf_of(spec, (as_bytes(array(weights.rebuilt(span).cpu())) for span in spans)))
        return bytes.fromhex(root_digest(leaves))

    def reset(self) -> None:
        """Goes back to the base."""
        self._replayed = None

    @contextmanager
    def walk(self, pool: Pool) -> Iterator[dict[nn.Parameter, Line]]:
        """Lets the weights move for the length of a `with` block; the model holds the base before and after."""
        room = Room()
        try:
            yield {
                weight: self._origins[name].line(pool, Anew(self._origins[name], self._replayed, room), anew=True)
                for name, weight in self._weights.items()
            }
        finally:
            for name, weight in self._weights.items():
                weight.data = self._origins[name].base


@dataclass(frozen=True)
class Anew:
    """The weights of one tensor before a turn's first step, made when a slice of whole tiles is taken.

    Slices share one room: what was taken before is gone.
    """

    origin: Origin
    replayed: Replayed | None
    room: Room

    def __len__(self) -> int:
        return self.origin.base.numel()

    def __getitem__(self, span: slice) -> Any:
        """Returns the weights of a span, float32 or float64."""
        narrow = self.rebuilt(span)
        dtype = torch.promote_types(narrow.dtype, torch.float32)
        if dtype == narrow.dtype:
            return flat(narrow)
        like = narrow.new_empty(0, dtype=dtype)
        return flat(self.room.take("wide", like, 1, narrow.numel()).copy_(narrow))

    def rebuilt(self, span: slice) -> Tensor:
        """Returns the weights of a span in the dtype of the base."""
        base = self.origin.base
        block = self.room.take("block", base, 1, len(range(*span.indices(len(self)))))[0]
        if self.replayed is None:
            return block.copy_(base.view(-1)[span])
        self.origin.rebuild(self.replayed, flat(block), span)
        return block
