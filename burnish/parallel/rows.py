"""Which rows of a parameter lie on this rank."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from burnish.parallel.private import compute_local_shape_and_global_offset


def row_range(parameter: Tensor) -> tuple[int, int]:
    """[start, stop) of the rows (axis 0) that this rank holds; all of them where the parameter is not sharded. Costs nothing on meta."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return (offset[0], offset[0] + shape[0]) if shape[0] else (parameter.shape[0], parameter.shape[0])


def local_rows(parameter: Tensor) -> Tensor:
    """This rank's rows as a plain tensor that shares the parameter's memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def here(tensor: Tensor) -> Tensor:
    """The tensor itself, or the part of it that lies on this rank: no operator is called."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(parameter: Tensor) -> Tensor:
    """The full tensor, on every rank: a collective where the parameter is sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def shards_of(parameter: Tensor) -> int:
    """Into how many parts the parameter's rows are cut: 1 where it is not sharded."""
    if not isinstance(parameter, DTensor):
        return 1
    return math.prod(parameter.device_mesh.size(axis) for axis, placement in enumerate(parameter.placements) if placement.is_shard())


def by_shard(parameter: Tensor, count: Callable[[int], int]) -> Tensor:
    """Zeros in fp32 beside a parameter, sharded as it is: on each rank as many as `count` says for the rows of the fullest."""
    shards = shards_of(parameter)
    length = count(-(-parameter.shape[0] // shards))
    local = torch.zeros(length, dtype=torch.float32, device=parameter.device)
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else local
