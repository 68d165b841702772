"""Weights that exist only while a layer needs them: each layer makes its own, just before its product.

A step without gradients looks at weights + eps z and weights - eps z. Made for the whole model, both are written to
memory and read back. Made layer by layer, in a room that stays in the processor's cache, they never leave it: a step
reads every weight once and writes it once. Both looks go through the model together, as the halves of one batch, and
only where there are weights do they part:

    x = [x+ ; x-]        y+ = x+ (W + eps Z)'        y- = x- (W - eps Z)'        y = [y+ ; y-]

While this lasts, the model's own parameters are empty, so a module that reads weights other than its own fails; and
not every module keeps its batch in front. `fedtune.training.zo.how` finds out what an architecture allows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import gcd
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.directions import TILE
from fedtune.zo import Line

CHUNK = 2**18  # weights made at a time on a CPU: 1 MiB a look
_CHUNK_GPU = 2**25
_LATE = 32  # moves after which a table that is only looked up is brought up to date
Losses = Callable[[int, int], list[float]]


@dataclass
class Room:
    """Scratch memory, one piece a use, which grows to what the largest layer needs."""

    pieces: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, use: str, like: Tensor, looks: int, count: int) -> Tensor:
        """Returns a tensor (looks, count) of the dtype and on the device of `like`; its contents are anything."""
        piece = self.pieces.get((use, like.dtype))
        if piece is None or piece.numel() < looks * count:
            piece = self.pieces[use, like.dtype] = torch.empty(looks * count, dtype=like.dtype, device=like.device)
        return piece[: looks * count].view(looks, count)


@dataclass
class Streamed:
    """A `fedtune.zo.Walk` through a model whose layers make their weights as they need them; see `streaming`.

    Attributes:
        lines: the weights on their way.
        compute: losses of a step's batch (step, copies): the batch is laid out so many times, one loss each.
        together: several looks may share a forward pass.
    """

    lines: Sequence[Line]
    compute: Losses
    together: bool = True
    k: int = 0
    scales: tuple[float, ...] = ()

    def losses(self, k: int, scales: Sequence[float], step: int) -> list[float]:
        """Looks at weights + scale * z_k, all at once if they may share a pass."""
        groups = [tuple(scales)] if self.together else [(scale,) for scale in scales]
        found: list[float] = []
        for group in groups:
            self.k, self.scales = k, group
            found += self.compute(step, len(group))
        return found

    def move(self, k: int, change: float) -> None:
        """Adds change * z_k to the weights, when their layers are next run."""
        for line in self.lines:
            line.due.append((k, change))

    def settle(self) -> None:
        """Makes the moves that are due."""
        for line in self.lines:
            line.settle()


@contextmanager
def streaming(model: nn.Module, lines: Mapping[nn.Parameter, Line], walk: Streamed) -> Iterator[None]:
    """Lets the layers of `model` make the parameters of `lines` themselves; afterwards these hold what they held."""
    room, before = Room(), {weight: weight.data for weight in lines}
    changed = []
    try:
        for module in model.modules():
            own = {n: w for n, w in module.named_parameters(recurse=False) if w in lines}
            if own:
                layer = _Layer(module, walk, room, {n: lines[w] for n, w in own.items()}, dict(own), module.forward)
                module.forward = layer.forward()
                changed.append(module)
        for weight in lines:
            weight.data = weight.data.new_empty(0)
        yield
    finally:
        for module in changed:
            del module.forward
        for weight, data in before.items():
            weight.data = data


@dataclass
class _Layer:
    """One module with weights of its own."""

    module: nn.Module
    walk: Streamed
    room: Room
    lines: dict[str, Line]
    weights: dict[str, nn.Parameter]
    plain: Callable[..., Tensor]
    shapes: dict[str, torch.Size] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = {name: weight.shape for name, weight in self.weights.items()}

    def forward(self) -> Callable[..., Tensor]:
        """Returns what takes the place of the module's forward."""
        if type(self.module).forward is nn.Linear.forward and "weight" in self.lines:
            return self.linear
        table = isinstance(self.module, nn.Embedding) and self.weights["weight"].device.type == "cpu"
        return self.lookup if table else self.whole

    def linear(self, x: Tensor) -> Tensor:
        """Multiplies by a few rows of the weights at a time."""
        looks, (outputs, inputs) = len(self.walk.scales), self.shapes["weight"]
        apart = self._apart(x).reshape(looks, -1, inputs)
        bias = self._made("bias") if "bias" in self.lines else getattr(self.module, "bias", None)
        y: Tensor | None = None
        for rows in _rows(outputs, inputs, x.device):
            weights = self._made("weight", slice(rows.start * inputs, rows.stop * inputs))
            for n in range(looks):
                b = None if bias is None else (bias[n] if "bias" in self.lines else bias)[rows]
                piece = functional.linear(apart[n], weights[n].view(-1, inputs), b)
                if y is None:
                    y = piece.new_empty(looks, apart.shape[1], outputs)
                y[n, :, rows] = piece
        self._arrived()
        if y is None:
            raise RuntimeError("a layer without outputs")
        return y.view(*x.shape[:-1], outputs)

    def lookup(self, ids: Tensor) -> Tensor:
        """Makes the rows of a table that are looked up, and no others; its moves stay due."""
        looks, (_, width), line = len(self.walk.scales), self.shapes["weight"], self.lines["weight"]
        if len(line.due) > _LATE:
            line.settle()
        used, places = np.unique(ids.numpy(), return_inverse=True)
        table = self.room.take("table", self.weights["weight"], looks, len(used) * width)
        _look_up(line, used, width, self.walk.k, self.walk.scales, array(table).reshape(looks, len(used), width))
        places_of = self._apart(torch.from_numpy(places.reshape(ids.shape)))
        # A plain attribute: the padding row is one of the whole table, and for gradients only.
        module = self.module.__dict__
        padding, module["padding_idx"] = module["padding_idx"], None
        try:
            return self._each(places_of, {"weight": table.view(looks, len(used), width)})
        finally:
            module["padding_idx"] = padding

    def whole(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Makes all weights of the module and runs it once a look."""
        made = {name: self._made(name).view(len(self.walk.scales), *self.shapes[name]) for name in self.lines}
        self._arrived()
        return self._each(self._apart(x), made, *args, **kwargs)

    def _each(self, apart: Tensor, made: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        parts = []
        for n, x in enumerate(apart):
            for name, weights in made.items():
                self.weights[name].data = weights[n]
            parts.append(self.plain(x, *args, **kwargs))
        for name in made:
            self.weights[name].data = self.weights[name].data.new_empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _apart(self, x: Tensor) -> Tensor:
        """Views the looks of a batch apart (S, N, ...); fails unless they lie one behind the other."""
        looks = len(self.walk.scales)
        return x.view(looks, x.shape[0] // looks, *x.shape[1:])

    def _made(self, name: str, span: slice = slice(None)) -> Tensor:
        """Makes weights + scale * z_k of a span (S, N)."""
        line, walk = self.lines[name], self.walk
        count = len(line.weights[span])
        outs = self.room.take(name, self.weights[name], len(walk.scales), count)
        line.spread(walk.k, walk.scales, array(outs), span)
        return outs

    def _arrived(self) -> None:
        for line in self.lines.values():
            line.arrived()


def _rows(outputs: int, inputs: int, device: torch.device) -> list[slice]:
    """Cuts O rows of I weights into pieces of whole tiles."""
    least = TILE // gcd(TILE, inputs)
    chunk = CHUNK * torch.get_num_threads() if device.type == "cpu" else _CHUNK_GPU
    step = max(least, chunk // inputs // least * least)
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]


def _look_up(line: Line, used: Any, width: int, k: int, scales: Sequence[float], table: Any) -> None:
    """Sets `table` (S, rows, width) to rows `used` of weights + scale * z_k, with the moves that are due."""
    first, last = used * width // TILE, ((used + 1) * width - 1) // TILE
    bounds = [0, *(np.flatnonzero(first[1:] > last[:-1]) + 1).tolist(), len(used)]
    for a, b in pairwise(bounds):
        start = int(first[a]) * TILE
        span = slice(start, min((int(last[b - 1]) + 1) * TILE, len(line.weights)))
        copy = replace(
            line, weights=line.weights[span].copy(), first=line.first + start, place=start, due=list(line.due)
        )
        outs = np.empty((len(scales), len(copy.weights)), table.dtype)
        copy.spread(k, scales, outs)
        for row in range(a, b):
            at = int(used[row]) * width - start
            table[:, row] = outs[:, at : at + width]


def array(tensor: Tensor) -> Any:
    """Views a contiguous tensor as a numpy array when it is on the CPU; elsewhere returns it."""
    if tensor.device.type != "cpu":
        return tensor
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


__all__ = ["CHUNK", "Streamed", "array", "streaming"]
