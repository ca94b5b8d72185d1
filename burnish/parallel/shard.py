"""Spreading a model over ranks: FSDP2 shards every parameter by rows, DDP replicates. Gradients are summed, never averaged.

No `MixedPrecisionPolicy` anywhere: it would cast every float of its group, the quantized scales and the master adapters too. Compute dtypes
are explicit in the layers instead.
"""

import itertools
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from burnish.parallel.world import World

_MESHES = itertools.count()


def shard(
    model: nn.Module,
    layers: nn.ModuleList,
    apart: dict[nn.Module, tuple[str, ...]],
    methods: tuple[str, ...],
    world: World,
    shards: int,
    stays_gathered: bool = False,
    outside: Collection[nn.Parameter] = (),
) -> None:
    """FSDP2, each copy cut over `shards` ranks: a group for each decoder layer, for each module of `apart`, and for the rest (norms).

    On meta, before there are bytes. `methods` are the model's own verbs beside `forward` that need its parameters gathered, the values of
    `apart` those of its modules. A layer's frozen parameters and its adapters are one group: an adapter reads its base's tensors in its own
    forward, so that both are needed in the same moments, and only what is trained is reduced. What is `outside` is left as it is.
    """
    mesh, left = _mesh(world, shards), set(outside)
    for module in (*layers, *apart):
        fully_shard(module, mesh=mesh, reshard_after_forward=not (stays_gathered and module in layers), ignored_params=left)
    fully_shard(model, mesh=mesh, ignored_params=left)
    for module, names in (apart | {model: methods}).items():
        for name in names:
            register_fsdp_forward_method(module, name)
    for module in _sharded(model):
        # the loss is already divided by the whole step's tokens; gloo has no pre-multiplied sum, so it needs a plain one
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _mesh(world: World, shards: int) -> DeviceMesh:
    """All ranks in a row, or a row for each of several copies: neighbours in rank, which sit in one machine, share one."""
    assert world.mesh is not None
    if shards == world.size:
        return world.mesh
    # torch takes meshes that are equal for one, also where this process has left the groups of the first: names tell them apart
    names = f"copies {next(_MESHES)}", "shards"
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=names)


def release(model: nn.Module) -> None:
    """Lets go of what a forward pass without a backward pass left gathered: the rest of the model, and all layers under `fsdp-grad`.

    Else the next reader of parameters would take the gathered ones, which live only until the next backward pass, for the model's own.
    Does nothing where the model is not sharded.
    """
    for module in _sharded(model):
        module.reshard()


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


class Replicas(nn.Module):
    """One call that DDP can hook: the loss of a micro-batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model.loss_of(batch)


def replicate(model: nn.Module, world: World) -> DistributedDataParallel:
    """DDP with summed gradients. The model must be filled already, with the same bytes on every rank."""
    ids = [world.device.index] if world.device.type == "cuda" else None
    replicas = DistributedDataParallel(
        Replicas(model), device_ids=ids, forward_sync_buffers=False, init_sync=False, gradient_as_bucket_view=True
    )
    replicas.register_comm_hook(None, _sum_of_gradients)
    return replicas


def _sum_of_gradients(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def gradient_sync(
    model: nn.Module, replicas: DistributedDataParallel | None, last: bool, large: bool = False
) -> AbstractContextManager[None]:
    """Ranks exchange gradients in the last backward pass of a step alone; where they are `large`, FSDP2 does so in each, since it would
    otherwise hold them whole on every rank."""
    if replicas is not None:
        return nullcontext() if last else replicas.no_sync()  # pyright: ignore[reportReturnType]
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or large)
    return nullcontext()


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, over all ranks."""
    norm = nn.utils.get_total_norm(gradients)
    full = getattr(norm, "full_tensor", None)
    return full() if full else norm
