"""How tensors travel one way, as a user configures it: which codec, how dense, and whether to carry what is left out.

A method that ships tensors has a field of this type; `fedtune.method.Method` encodes and decodes with it.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from fedtune.codecs import feedback, raw
from fedtune.codecs.blocks import Blocks
from fedtune.codecs.budget import Budget
from fedtune.codecs.codec import Codec
from fedtune.codecs.narrow import Narrow
from fedtune.codecs.reader import Reader
from fedtune.codecs.signs import Code
from fedtune.codecs.spectral import delta_come, ere
from fedtune.codecs.ternary import Ternary
from fedtune.codecs.ternary_format import unpack
from fedtune.errors import ConfigError, problem
from fedtune.tensors import Array, Manifest, Tensors

RESIDUAL = "residual/"
"""Names in a client's memory that begin so hold what compression has left out so far."""
_KEYS = {
    "ere": ("rank",),
    "delta-come": ("rank",),
    "ternary": ("density", "budget_kb", "alpha", "scale", "top", "sigma"),
}


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "allow_inf_nan": False})
class Compression:
    """How the tensors of one direction become bytes.

    Attributes:
        codec: `raw` (all bits), `bf16`, `int8` and `int4` (blocks of 64 values with one scale each), `ternary`
            (ComPEFT: the largest values, of each only the sign), or for whole matrices `ere` (their leading singular
            vectors in bf16) and `delta-come` (the first two in int8, the others in int4).
        rank: singular vectors of each matrix that `ere` and `delta-come` keep.
        density: share of the values that `ternary` keeps.
        budget_kb: thousand bytes an update may have; `ternary` then keeps what fits, at most half, whatever `density`
            is. 0 is no budget.
        alpha: `ternary` multiplies its scale by this.
        scale: of `ternary`: `least-squares` (mean magnitude of the kept values) or `std` (of all values: the paper's).
        top: `ternary` keeps the largest of the whole `vector`, as the paper does, or of each `tensor`.
        sigma: `ternary` has one scale for the whole `vector`, as the paper has, or one for each `tensor`.
        feedback: the client adds what was left out to its next update (error feedback).
    """

    codec: Literal["raw", "bf16", "int8", "int4", "ternary", "ere", "delta-come"] = "raw"
    rank: int = Field(default=32, ge=1, le=65536)
    density: float = Field(default=0.2, gt=0, le=1)
    budget_kb: float = Field(default=0.0, ge=0)
    alpha: float = Field(default=1.0, gt=0)
    scale: Literal["least-squares", "std"] = "least-squares"
    top: Literal["vector", "tensor"] = "vector"
    sigma: Literal["vector", "tensor"] = "tensor"
    feedback: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Compression":
        if self.budget_kb and self.codec != "ternary":
            raise ValueError(f"budget_kb needs codec = 'ternary', got {self.codec!r}: others have one size")
        if self.feedback and self.codec == "raw":
            raise ValueError("feedback needs a codec that leaves something out, got 'raw'")
        return self

    @property
    def exact(self) -> bool:
        """Whether every bit arrives."""
        return self.codec == "raw"

    @property
    def idle(self) -> list[str]:
        """Keys that are not as by default and have no effect beside the others."""
        used = {"codec", "feedback", *_KEYS.get(self.codec, ())} - ({"density"} if self.budget_kb else set())
        usual, names = Compression(), [field.name for field in fields(self)]
        return [name for name in names if name not in used and getattr(self, name) != getattr(usual, name)]

    def check(self, manifest: Manifest, key: str) -> None:
        """Raises ConfigError when no update of `manifest` fits into the budget; `key` is where this is configured."""
        coder = self.coder
        if isinstance(coder, Budget) and coder.nbytes < (least := coder.least(manifest)):
            want = f"at least {least / 1000:g} for {len(manifest.specs)} tensors"
            raise ConfigError(problem(f"{key}.budget_kb", want, self.budget_kb, "Raise it, or leave it out"))

    @property
    def coder(self) -> Codec:
        """The codec itself."""
        if self.codec == "raw":
            return raw
        if self.codec == "bf16":
            return Narrow()
        if self.codec in ("ere", "delta-come"):
            return ere(self.rank) if self.codec == "ere" else delta_come(self.rank)
        if self.codec != "ternary":
            return Blocks(bits=8 if self.codec == "int8" else 4)
        ternary = Ternary(density=self.density, alpha=self.alpha, scale=self.scale, top=self.top, sigma=self.sigma)
        return Budget(ternary=ternary, nbytes=int(self.budget_kb * 1000)) if self.budget_kb else ternary

    def codes(self, payload: memoryview | bytes, manifest: Manifest) -> list[Code]:
        """Reads the codes of a `ternary` payload without making arrays of them; raises WireError as decoding would."""
        Reader(payload, self.coder.largest(manifest))
        return unpack(payload, manifest)[0]

    def added(self, before: Tensors, payload: memoryview | bytes, manifest: Manifest) -> dict[str, Array]:
        """Returns `before` plus what a payload holds, for the names of `manifest`; ternary codes are added as they are.

        Guarantees: what `changed` makes of the decoded arrays, except that a -0 to which nothing is added stays.

        Raises:
            WireError: the bytes are no payload for `manifest`.
        """
        if self.codec != "ternary":
            return changed(before, self.coder.decode(payload, manifest))
        Reader(payload, self.coder.largest(manifest))
        codes, loose = unpack(payload, manifest)
        after = {code.spec.name: before[code.spec.name].copy() for code in codes}
        for code in codes:
            code.add_to(after[code.spec.name], 1.0)
        return {**after, **changed(before, loose)}

    def carry(self, update: Tensors, manifest: Manifest, memory: dict[str, Array]) -> Tensors:
        """Returns what to encode: `update`, and with `feedback` what earlier updates left out.

        What this one leaves out is put into `memory`, under names that begin with `RESIDUAL`.

        Raises:
            WireError: a value reaches 512 in magnitude: training diverged.
        """
        if not self.feedback:
            return update
        carried = {n.removeprefix(RESIDUAL): array for n, array in memory.items() if n.startswith(RESIDUAL)}
        wanted, left = feedback.carry(self.coder, update, manifest, carried)
        memory.update({RESIDUAL + name: array for name, array in left.items()})
        return wanted


def _named(value: Any) -> Any:
    """Takes the name of a codec for a table that holds only this."""
    return {"codec": value} if isinstance(value, str) else value


Link = Annotated[Compression, BeforeValidator(_named)]
"""The type of a method's field: a table of `Compression`'s keys, or just the name of a codec."""


def change(after: Tensors, before: Tensors) -> dict[str, Array]:
    """Returns `after` less `before`, taken in float64 and rounded to the dtypes of `after`."""
    return {n: (array.astype(np.float64) - before[n]).astype(array.dtype) for n, array in after.items()}


def changed(before: Tensors, by: Tensors) -> dict[str, Array]:
    """Returns `before` plus `by`, for the names of `by`, taken in float64 and rounded to the dtypes of `before`."""
    return {n: (before[n].astype(np.float64) + array).astype(before[n].dtype) for n, array in by.items()}
