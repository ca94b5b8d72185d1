"""Codes, scales and zero points of blocks, W ≈ (q − z)·s, by alternating minimization with a fixed number of iterations.

Half-quadratic quantization (HQQ, mobiusml.github.io/hqq_blog) finds codes and zero points in turn, each best for the other. Here
* s is fitted too, by least squares for the codes and z at hand;
* an integer z is rounded in every iteration, so that codes and scale are fitted to the zero point that is stored;
* a block starts from a few scales (and neighbouring integers z) and keeps the best that it met. Nothing stops early on a statistic of the
  matrix: that would give other bytes for half of it.
The error is the mean square. HQQ's proximal step for |·|^p, p < 1, at its published settings moves no weight whose error is below 0.17, so
none of a usual size; made strong enough to act, it took the mean absolute error of heavy-tailed weights at 2 bits down by a tenth and the
mean square up by a seventh, since it gives up outliers.

Every step is a rounded operation of IEEE 754 on single elements or a sum in a fixed order, so that a block's bytes depend on nothing but
the block: not on its place in the tensor, its neighbours, or the number of threads. (torch's own sums and powers do not promise that.)

Axes: I weights of a block, N blocks. Blocks are columns, so that whole rows [N] are added and scaled.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from burnish.model.formats.base import divided

Best = tuple[Tensor, Tensor, Tensor]
"""Scale, zero point and sum of squared errors of each block."""

ITERATIONS = 24
"""For each block, shared by its starts."""

SHARES = (1.0, 0.93)
"""Scales to start from, in terms of the one that spans the block: at four bits a slightly clipped block is often the better one."""

SHIFTS = (0, -1, 1)
"""Integer zero points to start from, around the one that centres the block: once it is rounded, no iteration moves it."""

FINEST = 2.0**-10
"""Smallest scale relative to the block's absmax: keeps the zero point of a block far from 0 below what fp16 holds."""

CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Weights solved at a time: a quarter MiB in fp32 stays in a core's cache between the passes of an iteration."""


def solve(rows: Tensor, block: int, levels: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, in] in any float dtype → codes uint8 [n, in] in 0 … levels, scales fp32 and zero points in `kind` [n, in / block].

    Zero points are integers in 0 … levels where `kind` is uint8. `block` is a power of two. Costs about `ITERATIONS` × 15 passes over the
    weights, and the codes' bytes beside the rows.
    """
    count, width = rows.shape
    step = max(1, CHUNK[rows.device.type] // block)
    parts = [_solve(blocks.to(torch.float32).T.contiguous(), levels, kind) for blocks in rows.reshape(-1, block).split(step)]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes.view(count, width), scales.view(count, width // block), zeros.view(count, width // block)


def _solve(w_IN: Tensor, levels: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, I], scales [N] and zero points [N] of some blocks."""
    size_N = w_IN.abs().amax(0)
    u_IN = w_IN / torch.where(size_N > 0, size_N, 1)  # sizes of 1: no square overflows or vanishes
    starts = list(_starts(u_IN, levels, kind))
    best = (*starts[0], torch.full_like(size_N, torch.inf))
    for s_N, z_N in starts:
        for _ in range(ITERATIONS // len(starts) + 1):  # the last one only judges what the one before it found
            s_N, z_N, best = _step(u_IN, s_N, z_N, best, levels, kind)
    s_N, z_N, _ = best
    codes_NI = _codes(u_IN / s_N, z_N, levels).T.to(torch.uint8, memory_format=torch.contiguous_format)
    return codes_NI, s_N * size_N, z_N.to(kind)


def _starts(u_IN: Tensor, levels: int, kind: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """What spans each block from its least to its largest weight (and 0, where the zero point is a code), or most of it."""
    low_N, high_N = u_IN.amin(0), u_IN.amax(0)
    if kind == torch.uint8:
        low_N, high_N = low_N.clamp(max=0), high_N.clamp(min=0)
    # equal weights span nothing: their own size as the scale holds them exactly, by the zero point −1 or 1
    span_N = torch.where(high_N > low_N, divided(high_N - low_N, levels), high_N.abs())
    for share in SHARES:
        s_N = (span_N * share).clamp(min=FINEST)
        z_N = -low_N / s_N - levels / 2 * (1 / share - 1)  # what is clipped is clipped at both ends
        for shift in SHIFTS if kind == torch.uint8 else (0,):
            yield s_N, _stored(z_N + shift, levels, kind)


def _step(u_IN: Tensor, s_N: Tensor, z_N: Tensor, best: Best, levels: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Best]:
    """The next scale and zero point of each block; the best so far with the given ones among them."""
    x_IN = u_IN / s_N
    q_IN = _codes(x_IN, z_N, levels)
    off_IN = (q_IN - z_N).sub_(x_IN)  # in units of a code
    mean_N = _sum(off_IN) / len(u_IN)
    best = _better(s_N, z_N, _sum(off_IN.square_()) * (s_N * s_N), best)
    z_N = _stored(z_N + mean_N, levels, kind)
    centred_IN = q_IN.sub_(z_N)
    fitted_N = _sum(centred_IN * u_IN) / _sum(centred_IN.square_())
    return torch.where((fitted_N > FINEST) & (fitted_N < torch.inf), fitted_N, s_N), z_N, best


def _codes(x_IN: Tensor, z_N: Tensor, levels: int) -> Tensor:
    """The nearest codes to weights in units of the scale, as floats."""
    return (x_IN + z_N).round_().clamp_(0, levels)


def _stored(z_N: Tensor, levels: int, kind: torch.dtype) -> Tensor:
    """Zero points as the file will hold them, in fp32."""
    return z_N.round().clamp(0, levels) if kind == torch.uint8 else z_N.to(kind).to(torch.float32)


def _better(s_N: Tensor, z_N: Tensor, error_N: Tensor, best: Best) -> Best:
    better = error_N < best[2]
    return torch.where(better, s_N, best[0]), torch.where(better, z_N, best[1]), torch.where(better, error_N, best[2])


def _sum(x_IN: Tensor) -> Tensor:
    """Over a block, by halves: one order of additions, whatever the shape."""
    while len(x_IN) > 1:
        half = len(x_IN) // 2
        x_IN = x_IN[:half] + x_IN[half:]
    return x_IN[0]
