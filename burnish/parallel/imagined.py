"""Ranks that are only imagined: what one of several would do, in one process, with shapes alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from burnish.parallel.private import FakeStore
from burnish.parallel.world import World, alone


def can_imagine() -> bool:
    """Whether no process group stands here: there is room for one in a process."""
    return not dist.is_initialized()


@contextmanager
def imagined(ranks: int) -> Iterator[World]:
    """Rank 0 of so many, whose collectives return at once and exchange nothing. Inside the block it is the process's group."""
    if ranks == 1:
        yield alone("cpu")
        return
    assert can_imagine(), "this process has ranks already"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(0, ranks, torch.device("cpu"), init_device_mesh("cpu", (ranks,)))
    finally:
        dist.destroy_process_group()
