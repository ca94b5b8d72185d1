"""What every format offers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Format:
    """One way to hold a matrix W [out, in]; every tensor of it has `out` as its first axis."""

    name: str
    version: int
    """Part of the cache's key: goes up when `quantize` gives other bytes."""
    divides: Callable[[int], int]
    """block → what `in` must be a multiple of, so that no block crosses a row."""
    shapes: Callable[[int, int, int, torch.dtype], Shapes]
    """(out, in, block, compute dtype) → name: (shape, dtype)."""
    quantize: Callable[[Tensor, int, torch.dtype], Tensors]
    """(rows [n, in] in any float dtype, block, compute dtype) → tensors of those rows."""
    dequantize: Callable[[Tensors, int, torch.dtype], Tensor]
    """(tensors of n rows, block, compute dtype) → W of those rows [n, in]. May share memory with what it is given."""
    fold: Callable[[Tensors, Tensor], Tensors]
    """(tensors of n rows, d [n]) → tensors of d ⊙ W: scales change, codes do not."""
    adopt: Callable[[Tensors], Tensors] | None = None
    """(what a file that holds this very format gives for n rows: `Weights.stored_rows`) → tensors of n rows. None where no file does."""


def divided(x: Tensor, count: int) -> Tensor:
    """x / count as IEEE 754 rounds it on every device: divided by a number, a GPU multiplies with the number's rounded reciprocal."""
    return x / torch.full((), count, dtype=x.dtype, device=x.device)


def fold_scale(tensors: Tensors, d: Tensor) -> Tensors:
    """The fold of every format whose only float that grows with W is `scale` [n, blocks], in fp32: codes and zero points stay."""
    return tensors | {"scale": tensors["scale"] * d[:, None].to(torch.float32)}
