"""What is checked at every start, before the first step and before a checkpoint is read."""

import logging

import torch

from burnish.adapt.methods import METHODS
from burnish.data.batches import Batches, on_device
from burnish.errors import UserError
from burnish.model.network import packed
from burnish.parallel.shard import release
from burnish.parallel.world import World, any_rank
from burnish.skeleton import Built

log = logging.getLogger("burnish")
NATS = 1e-4
"""A silent block adds zeros, so nothing differs on one machine's kernels; room for those that are chosen anew at each call."""


def check_start(built: Built, batches: Batches, world: World) -> None:
    """Compares an expanded model with its base on the run's own first tokens, and says what came out. Every rank calls it.

    Does nothing for methods that add no blocks. Costs two forward passes of one micro-batch. Raises a `UserError` where they differ.
    """
    if not METHODS[built.adapters.method].grows:
        return
    batch = on_device(batches.step(0).micro_batches[0], world.device)
    with packed(built.model):
        grown = _losses(built, batch, on=True)
        base = _losses(built, batch, on=False)
    release(built.model)
    apart = (grown - base).abs().max().item() if len(base) else 0.0
    if any_rank(not apart <= NATS, world.device):  # NaN too
        raise UserError(
            f"with its new blocks the model should equal its base before the first step, and differs from it by {apart:.2g} nats: this "
            "architecture is not supported by adapt.method=expand. Choose adapt.method=dora."
        )
    if world.is_main:
        log.info("with its new blocks the model equals its base: %.2g nats apart at most, on %d tokens", apart, len(base))


def _losses(built: Built, batch: object, on: bool) -> torch.Tensor:
    switch = built.adapters.switch
    before, switch.on = switch.on, on
    try:
        return built.model.losses_of(batch)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    finally:
        switch.on = before
