"""One optimizer step: its gradient does not depend on how the step was cut into ranks and micro-batches."""

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


@dataclass(frozen=True)
class Done:
    """What a step came to."""

    loss: float
    """Mean over the supervised tokens of the whole step."""
    gradient_norm: float
    """Before clipping."""


def take_step(
    built: Built,
    replicas: DistributedDataParallel | None,
    step: Step,
    optimizer: Optimizer,
    clip: float,
    world: World,
    describe: Callable[[tuple[int, ...]], str],
) -> Done:
    """Gradients, the check that they are finite, clipping, the update. Raises before the update, so that no bad value is ever learned."""
    losses = gradients(built, replicas, step, world)
    trainable = [parameter for parameter in built.adapters.trainable().values() if parameter.grad is not None]
    norm = gradient_norm([parameter.grad for parameter in trainable if parameter.grad is not None])
    loss = total(float(sum(losses)), world.device)
    if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(loss))):
        raise UserError(_not_finite(step, losses, loss, norm, describe))
    if clip:
        nn.utils.clip_grads_with_norm_(trainable, clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    built.adapters.switch.advance()
    return Done(loss, float(norm))


def gradients(built: Built, replicas: DistributedDataParallel | None, step: Step, world: World) -> list[float]:
    """Adds up the step's gradient over this rank's micro-batches, and over the ranks in the last of them.

    Each micro-batch's summed loss is divided by the supervised tokens of the whole step, so that adding shares gives the mean however the
    step was cut.
    Returns this rank's shares.
    """
    shares: list[Tensor] = []
    loss_of: Callable[[Batch], Tensor] = replicas or built.model.loss_of  # pyright: ignore[reportAssignmentType]
    for number, batch in enumerate(step.micro_batches, start=1):
        with gradient_sync(built.model, replicas, number == len(step.micro_batches), large=bool(built.adapters.whole)):
            loss = loss_of(on_device(batch, world.device)) / step.supervised
            loss.backward()
        shares.append(loss.detach())
    return torch.stack(shares).tolist()


def _not_finite(step: Step, losses: list[float], loss: float, norm: Tensor, describe: Callable[[tuple[int, ...]], str]) -> str:
    bad = [batch for batch, share in zip(step.micro_batches, losses, strict=True) if not torch.isfinite(torch.tensor(share))]
    samples = tuple(sample for batch in bad or step.micro_batches for sample in batch.samples)
    return (
        f"the loss ({loss:g}) or the gradient's norm ({norm.item():g}) is not finite; the step was not taken. "
        f"The rows of that batch: {describe(samples)}. "
        "Look at these rows, lower train.lr, or continue from the last checkpoint with other data."
    )
