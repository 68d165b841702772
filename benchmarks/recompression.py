"""Recompressing a stack: QR of both factors and a small SVD, beside the SVD of the dense product.

The peer's way is what FlexLoRA's published code does (its paper, section 3.2): form B A and take its SVD. The limit is
one reading of both factors (their squared norms). "error" rows give |B' A' - B A| / |B A|: of the full rank, and of a
slice of 16 beyond the best one that a dense SVD in float64 finds.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from _table import Row, interleave, options, report

from fedtune.lowrank import recompress

SLICE = 16


def stack(width: int, rank: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws a stack whose parts fall in size, as those of a run's rounds do."""
    rng = np.random.Generator(np.random.Philox(key=rank))
    fall = (1.0 + np.arange(rank)) ** -0.5
    a, b = rng.normal(size=(rank, width)) * fall[:, None], rng.normal(size=(width, rank))
    return a.astype(dtype), b.astype(dtype)


def dense(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
    """Takes the SVD of the product."""
    return np.linalg.svd(b @ a, full_matrices=False)


def main() -> None:
    arguments = options(__doc__)
    cells = [(576, 80), (576, 800), (2048, 160)] + ([] if arguments.quick else [(2048, 800), (2048, 3200)])
    rows = []
    for width, rank in cells:
        a, b = stack(width, rank, "float32")
        what = f"d = {width}, R = {rank}"
        wide = rank >= width
        variants = {
            "ours": lambda a=a, b=b, r=SLICE if wide else 0: recompress(a, b, rank=r, dtype="float32"),
            "peer": lambda a=a, b=b: dense(a, b),
            "limit": lambda a=a, b=b: (np.vdot(a, a), np.vdot(b, b)),
        }
        best = interleave(variants, 3 if width < 2048 else 2)
        note = f"randomised, slice of {SLICE}" if wide else "all ranks"
        rows.append(Row(f"{what}, float32", best["ours"], "s CPU", best["peer"], best["limit"], note))
        if not wide:
            both = {"double": lambda a=a, b=b: recompress(a, b), "peer": variants["peer"]}
            best = interleave(both, 2)
            rows.append(Row(f"{what}, float64 inside", best["double"], "s CPU", best["peer"], note="as the methods do"))
        rows += errors(what, a, b)
    report("Recompression of a stack B A (one thread)", rows, arguments.json)


def errors(what: str, a: np.ndarray, b: np.ndarray) -> list[Row]:
    """Measures how far the results are from the product, in float64."""
    product = b.astype(np.float64) @ a.astype(np.float64)
    norm = np.linalg.norm(product)
    s = np.linalg.svd(product, compute_uv=False)
    least = np.sqrt((s[SLICE:] ** 2).sum()) / norm
    full, few = recompress(a, b, dtype="float32"), recompress(a, b, rank=SLICE, dtype="float32")
    off = [np.linalg.norm(c.b_or.astype(np.float64) @ c.a_ri.astype(np.float64) - product) / norm for c in (full, few)]
    return [
        Row(f"{what}: error, full rank", off[0], "of the norm", limit=5e-6, note="float32; limit = what is asked"),
        Row(f"{what}: excess error, slice", off[1] - least, "of the norm", note=f"best {least:.3f}"),
    ]


if __name__ == "__main__":
    main()
