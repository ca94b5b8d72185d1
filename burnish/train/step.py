"""One optimizer step: its gradient does not depend on how the step was cut into ranks and micro-batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from burnish.data.batches import Batch, Step, on_device
from burnish.errors import UserError
from burnish.parallel.shard import gradient_norm, gradient_sync
from burnish.parallel.world import World, total
from burnish.skeleton import Built
from burnish.train.scaler import Scaler


@dataclass(frozen=True)
class Done:
    """What a step came to."""

    loss: float
    """Mean over the supervised tokens of the whole step."""
    gradient_norm: float
    """Before clipping."""
    skipped: bool = False
    """Whether it was not taken, because its gradient was not finite in fp16."""


def take_step(
    built: Built,
    replicas: DistributedDataParallel | None,
    step: Step,
    optimizer: Optimizer,
    clip: float,
    world: World,
    describe: Callable[[tuple[int, ...]], str],
    scaler: Scaler | None = None,
) -> Done:
    """Gradients, the check that they are finite, clipping, the update. Raises before the update, so that no bad value is ever learned.

    With a scaler that is on, a gradient that is not finite is no error: the step is skipped, on every rank, and the scale halved.
    """
    scaler = scaler or Scaler(1.0, 0, False)
    losses = gradients(built, replicas, step, world, scaler.scale)
    trainable = [parameter for parameter in built.adapters.trainable().values() if parameter.grad is not None]
    found = [parameter.grad for parameter in trainable if parameter.grad is not None]
    scaler.unscale(found)
    norm = gradient_norm(found)
    loss = total(float(sum(losses)), world.device)
    if scaler.on and math.isfinite(loss) and not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        scaler.skipped()
        return Done(loss, float(norm), skipped=True)
    if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(loss))):
        raise UserError(_not_finite(step, losses, loss, norm, describe, built.products))
    if clip:
        nn.utils.clip_grads_with_norm_(trainable, clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    built.adapters.switch.advance()
    scaler.taken()
    return Done(loss, float(norm))


def gradients(built: Built, replicas: DistributedDataParallel | None, step: Step, world: World, scale: float = 1.0) -> list[float]:
    """Adds up the step's gradient over this rank's micro-batches, and over the ranks in the last of them.

    Each micro-batch's summed loss is divided by the supervised tokens of the whole step, so that adding shares gives the mean however the
    step was cut.
    Gradients are `scale` times as large as the loss says. Returns this rank's shares, which are not.
    """
    return torch.stack(backward_passes(built, replicas, step, world, scale)).tolist()


def backward_passes(
    built: Built,
    replicas: DistributedDataParallel | None,
    step: Step,
    world: World,
    scale: float = 1.0,
    begin: Callable[[int], None] = lambda number: None,
) -> list[Tensor]:
    """The passes of `gradients`, and each one's share of the loss. No value is looked at, so that it runs on tensors that have none.

    `begin` is told the number of each pass, from 1 on, before it begins.
    """
    shares: list[Tensor] = []
    loss_of: Callable[[Batch], Tensor] = replicas or built.model.loss_of  # pyright: ignore[reportAssignmentType]
    for number, batch in enumerate(step.micro_batches, start=1):
        begin(number)
        with gradient_sync(built.model, replicas, number == len(step.micro_batches), large=bool(built.adapters.whole)):
            loss = loss_of(on_device(batch, world.device)) / step.supervised
            (loss * scale if scale != 1.0 else loss).backward()
        shares.append(loss.detach())
    return shares


def _not_finite(step: Step, losses: list[float], loss: float, norm: Tensor, describe: Callable[[tuple[int, ...]], str], dtype: str) -> str:
    bad = [batch for batch, share in zip(step.micro_batches, losses, strict=True) if not torch.isfinite(torch.tensor(share))]
    samples = tuple(sample for batch in bad or step.micro_batches for sample in batch.samples)
    overflow = (
        " Or its numbers overflow fp16, which ends at 65504: then train with model.dtype=fp32 and no autocast." if dtype == "fp16" else ""
    )
    return (
        f"the loss ({loss:g}) or the gradient's norm ({norm.item():g}) is not finite; the step was not taken. "
        f"The rows of that batch: {describe(samples)}. "
        f"Look at these rows, lower train.lr, or continue from the last checkpoint with other data.{overflow}"
    )
