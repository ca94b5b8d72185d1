"""The loss of each sample, by the same forward pass that training uses."""

from collections.abc import Callable

import numpy as np

from burnish.data.batches import on_device, plain_batches
from burnish.data.tokens import TokenSet
from burnish.evaluate.generate import inference
from burnish.model import network
from burnish.skeleton import Built


def losses(
    built: Built, tokens: TokenSet, context: int, micro_batch: int, advance: Callable[[int], None] = lambda _: None
) -> tuple[np.ndarray, np.ndarray]:
    """(summed loss float64 [S], supervised tokens int64 [S]) of each sample S, in nats.

    At most `context * micro_batch` tokens at a time, or one sample where that is longer. `advance` is told the samples done.
    """
    sums = np.zeros(len(tokens))
    counts = np.zeros(len(tokens), np.int64)
    with inference(built.model), network.packed(built.model):
        for batch in plain_batches(tokens, context, micro_batch):
            each_K = built.model.losses_of(on_device(batch, built.model.device))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            within_K = np.searchsorted(batch.segments, batch.source.numpy(), side="right") - 1
            samples_K = np.asarray(batch.samples)[within_K]
            sums += np.bincount(samples_K, each_K.double().cpu().numpy(), len(tokens))
            counts += np.bincount(samples_K, minlength=len(tokens))
            advance(len(batch.samples))
    return sums, counts
