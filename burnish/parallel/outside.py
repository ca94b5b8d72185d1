"""Frozen rows that ranks keep outside FSDP2, in host memory, and how ranks of one copy of the model bring them together on the device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Together:
    """The ranks that one copy of the model is cut over: neighbours, as FSDP2 has them."""

    ranks: int
    rank: int
    """This one's place among them."""
    host: DeviceMesh
    device: Any
    """The process group that FSDP2 gathers this copy's rows with."""

    def parameter(self, mine: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
        """A frozen parameter of this (whole) shape whose rows here are `mine`, in host memory; it shares `mine`'s memory.

        To whoever fills it or reads it whole it is what FSDP2 makes of a parameter; what is read whole comes over the host's network.
        """
        stride = mine.stride()  # of the whole too: the number of rows is no part of it
        sharded = DTensor.from_local(mine, self.host, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)
        return nn.Parameter(sharded, requires_grad=False)

    def gather(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> list[dist.Work]:
        """Begins to fill the second of each pair with the first of all ranks, one behind the other; on the device, in the order of calls.

        Every rank must make the same calls. Neither may be touched until `wait` of each returned work.
        """
        works = [dist.all_gather_single(everyones, mine, group=self.device, async_op=True) for mine, everyones in pairs]
        return [work for work in works if work is not None]


def together(sharded: Tensor) -> Together:
    """Those who hold the other rows of a parameter that FSDP2 shards. Every rank must call it: it makes a group of hosts."""
    assert isinstance(sharded, DTensor)
    mesh = sharded.device_mesh
    axis = next(axis for axis, placement in enumerate(sharded.placements) if placement.is_shard())
    device = mesh.get_group(axis)
    hosts, _ = dist.new_subgroups(mesh.size(axis), backend="gloo")
    assert isinstance(hosts, dist.ProcessGroup)
    assert dist.get_process_group_ranks(hosts) == dist.get_process_group_ranks(device), "ranks of one copy are not neighbours"
    # torch takes meshes that are equal for one, also where this process left the group of the first and joined another's: names tell apart
    name = f"hosts of {dist.get_world_size()}"
    return Together(mesh.size(axis), mesh.get_local_rank(axis), DeviceMesh.from_group(hosts, "cpu", mesh_dim_names=(name,)), device)
