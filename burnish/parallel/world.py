"""Joining and leaving the group of processes that train together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from burnish.errors import UserError

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class World:
    """This process and the others. A world of one has no mesh."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched_ranks() -> int:
    """Processes that torchrun, or burnish's own launcher, started beside this one; 1 where none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_machines() -> int:
    """Machines that the launched processes are spread over."""
    return max(1, launched_ranks() // int(os.environ.get("LOCAL_WORLD_SIZE", launched_ranks())))


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def alone(device: str) -> World:
    """This process by itself, whether or not others were launched."""
    return World(0, 1, torch.device(device), None)


@contextmanager
def world(device: str, ranks: int) -> Iterator[World]:
    """Joins the `ranks` processes that were launched, and leaves at the end of the block."""
    if launched_ranks() != ranks:
        raise UserError(f"the plan is for {ranks} processes and {launched_ranks()} were launched. Set plan.ranks={launched_ranks()}.")
    if ranks == 1:
        yield alone(device)
        return
    place = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(BACKENDS[device], timeout=timedelta(hours=2))
    try:
        yield World(dist.get_rank(), ranks, place, init_device_mesh(device, (ranks,)))
    except BaseException:
        if device != "cuda":  # NCCL's own end waits for ranks that wait for this one: the process ends without it
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(value: float, device: torch.device) -> float:
    """The sum of one number over the ranks."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank: what all ranks then do together."""
    return total(float(flag), device) > 0


def each_rank(tensor: Tensor, world: World) -> list[Tensor]:
    """The tensor of every rank, in order; of one shape on all. On the CPU."""
    if world.size == 1:
        return [tensor.cpu()]
    mine = tensor.to(world.device)
    gathered = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(gathered, mine)
    return [tensor.cpu() for tensor in gathered]
