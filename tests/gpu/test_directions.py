"""On a CUDA device the Triton kernels and the torch fallback give the bits of the reference."""

import numpy as np
import pytest

from fedtune.directions import TILE, Pool, cpu, reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

POOLS = [Pool("hadamard", 1, 128), Pool("hadamard", 1, 4096), Pool("rademacher", 1, 64), Pool("gaussian", 1, 64)]


@pytest.fixture(params=["gpu", "portable"])
def backend(request):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "gpu":
        pytest.importorskip("triton")
        from fedtune.directions import gpu

        return gpu
    from fedtune.directions import portable

    return portable


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("pool", POOLS, ids=lambda p: f"{p.kind}-{p.size}")
def test_bits_equal_the_reference(backend, pool, dtype):
    rng = np.random.default_rng(0)
    c = rng.integers(-(2**18), 2**18, pool.size).astype(np.int32)
    base = torch.from_numpy(rng.normal(size=3 * TILE + 77) * 0.05).to(getattr(torch, dtype))
    exact = base.double().numpy()
    for name, args in (("replay", (c, 30)), ("perturb", (pool.size - 1, 1e-3))):
        out = torch.empty_like(base, device="cuda")
        getattr(backend, name)(pool, *args, base.cuda(), TILE, out)
        # The oracle rounds to float32 or float64; narrower types round that once more, as everywhere.
        want = np.empty(len(exact), np.float64 if dtype == "float64" else np.float32)
        source = exact if dtype == "float64" else exact.astype(np.float32)
        getattr(reference if pool.size <= 128 else cpu, name)(pool, *args, source, TILE, want)
        assert torch.equal(out.cpu(), torch.from_numpy(want).to(base.dtype)), name


def test_spread(backend):
    pool = POOLS[1]
    weights = torch.randn(2 * TILE + 5)
    other, outs = weights.numpy().copy(), np.empty((2, 2 * TILE + 5), np.float32)
    cpu.spread(pool, 9, (1e-3, -1e-3), other, 0, outs, (5, 1e-4))
    moved, got = weights.cuda(), torch.empty(outs.shape, device="cuda")
    backend.spread(pool, 9, (1e-3, -1e-3), moved, 0, got, (5, 1e-4))
    assert torch.equal(moved.cpu(), torch.from_numpy(other))
    assert torch.equal(got.cpu(), torch.from_numpy(outs))
