"""The Triton kernels, proven on a CPU by Triton's interpreter: they give the reference's bits."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import ml_dtypes, numpy as np, torch
from fedtune.directions import Pool, gpu, reference
rng = np.random.default_rng(0)
pools = [Pool("hadamard", 2**63 + 5, 128), Pool("hadamard", 5, 512), Pool("rademacher", 5, 3), Pool("gaussian", 5, 3)]
for pool in pools:
    c = rng.integers(-2**20, 2**20, pool.size).astype(np.int32)
    more = (np.float64, np.float16) if pool.size == 128 else ()
    for dtype in (np.float32, ml_dtypes.bfloat16, *more):
        for count, first in ((1, 0), (4200, 2**35)):
            base = (rng.normal(size=count) * 0.05).astype(dtype)
            narrow = base.dtype == ml_dtypes.bfloat16
            t = torch.from_numpy(base.view(np.int16)).view(torch.bfloat16) if narrow else torch.from_numpy(base)
            for name, args in (("replay", (c, 30)), ("perturb", (pool.size - 1, 1e-3))):
                want, got = np.empty_like(base), torch.empty_like(t)
                getattr(reference, name)(pool, *args, base, first, want)
                getattr(gpu, name)(pool, *args, t, first, got)
                got = (got.view(torch.int16) if narrow else got).numpy().tobytes()
                assert got == want.tobytes(), (pool, dtype, count, name)
"""


def test_interpreter_gives_the_reference_bits():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
