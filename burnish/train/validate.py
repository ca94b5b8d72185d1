"""The loss on rows that are kept out of training, by the same forward pass that training uses."""

from collections.abc import Iterator
from itertools import islice

from burnish.data.batches import Batch, dummy_batch, on_device, plain_batches
from burnish.data.tokens import TokenSet
from burnish.parallel.shard import release
from burnish.parallel.world import World, total
from burnish.skeleton import Built


def validation_loss(built: Built, tokens: TokenSet, context: int, world: World) -> float:
    """Mean loss of every supervised token, in nats, over all ranks. Every rank calls it, inside `packed`, between two steps.

    Changes no weight and no random state. Costs one forward pass over the tokens, `context` of them at a time.
    """
    training = built.model.training
    built.model.eval()
    loss, count = 0.0, 0
    for batch in _mine(tokens, context, world):
        each_K = built.model.losses_of(on_device(batch, world.device))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        loss, count = loss + float(each_K.double().sum()), count + len(batch.targets)
    release(built.model)
    built.model.train(training)
    return total(loss, world.device) / total(float(count), world.device)


def _mine(tokens: TokenSet, context: int, world: World) -> Iterator[Batch]:
    """This rank's batches: as many as every other rank's, since under sharding all must run the same passes."""
    batches = plain_batches(tokens, context, 1)
    while some := list(islice(batches, world.size)):
        yield some[world.rank] if world.rank < len(some) else dummy_batch()
