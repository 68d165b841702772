"""Random directions that are the same everywhere: z(pool seed, k, i), a pure function in integer arithmetic.

A pool holds K directions over the weights of a model. Weight i lies in tile T = i // 4096 at offset o = i % 4096. All
randomness is Philox4x32-10 (Salmon et al., SC 2011) with key (seed mod 2^32, seed div 2^32) and counter
(c mod 2^32, c div 2^32, row, stream).

**Signs.** A stream of signs gives each tile 128 words; word v is output number v // 32 at c = 32 T + v % 32. The sign
at offset o is bit o // 128 of word o % 128, counted from the lowest; 0 is +1 and 1 is -1.

`rademacher`  z_k(i) is the sign at i of stream 1, row k. Directions are independent, as in the paper, but signs.
`hadamard`    K is 128, 256, ..., 4096; i lies in block b = i // K at j = i % K; z_k(i) = D(i) H[k, j] E(b K + k), with
              H[k, j] = (-1)^popcount(k and j), D the signs of stream 2 and E those of stream 3 (row 0). Each
              direction alone is independent signs, and different ones are orthogonal on whole blocks. All K are
              replayed at once by a fast Walsh-Hadamard transform, log2 K additions a weight. This is not the
              pool of the FedKSeed authors, whose directions are drawn independently.
`gaussian`    stream 4, row k gives each tile 2048 words; word v is output number v // 512 at c = 512 T + v % 512. The
              lower (o < 2048) or upper half u of word o % 2048 makes z: `quantiles` has the magnitude of u mod 2^15,
              in 1/4096, at a midpoint of 2^16 equal shares of the normal distribution; u div 2^15 is the sign.

**Layout.** Tensors are laid end to end in the order of their names, each beginning at a multiple of 4096.

**Replay.** w = round(base + 2^-e * sum_k c_k z_k) with int32 c_k whose magnitudes sum to less than 2^31. The sum is an
integer; it is scaled and added in float64 and rounded once, through float32 for narrower weights. So the order of
seeds, tiles and threads cannot matter, and every processor gives the same bits.

Backends with the same four functions `replay`, `perturb`, `advance`, `spread`: `reference` (numpy, plain), `cpu`
(numba), `portable` (torch, any device), `gpu` (Triton).
"""

from fedtune.directions.pool import KINDS, TILE, Coefficients, Move, Pool, layout

__all__ = ["KINDS", "TILE", "Coefficients", "Move", "Pool", "layout"]
