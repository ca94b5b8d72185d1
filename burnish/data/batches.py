"""Position in training → one rank's micro-batches. Knows nothing of the model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from burnish.data.packing import Packed, pack
from burnish.data.tokens import TokenSet


@dataclass(frozen=True)
class Batch:
    """Samples end to end, T tokens of which K are predicted and trained. There is no padding."""

    ids: Tensor
    """int64 [1, T]."""
    positions: Tensor
    """int64 [1, T]: from 0 in each sample."""
    segments: tuple[int, ...]
    """Boundaries of the samples: 0, …, T. One sample must not see another."""
    source: Tensor
    """int64 [K]: positions in T whose hidden state predicts a trained token."""
    targets: Tensor
    """int64 [K]: those tokens."""
    samples: tuple[int, ...]
    """Numbers of the samples, one for each segment; empty in a batch that only keeps ranks in step."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step needs."""

    micro_batches: tuple[Batch, ...]
    """This rank's; the same number on every rank."""
    supervised: int
    """Trained tokens of the whole step, over all ranks."""
    tokens: int
    """Tokens of the whole step, over all ranks."""


@dataclass(frozen=True)
class Cut:
    """How a step is cut up, and which piece is this rank's."""

    ranks: int
    rank: int
    micro_batch: int
    accumulation: int


class Batches:
    """Steps by position, where position counts packed contexts since the start of training.

    Remembers the packing of the last two epochs, and of each epoch how many contexts it has.
    """

    def __init__(
        self, tokens: TokenSet, context: int, rows_per_step: int, ranks: int, rank: int, micro_batch: int, accumulation: int, seed: int
    ):
        assert 0 <= rank < ranks, "no such rank"
        assert rows_per_step <= ranks * micro_batch * accumulation, "the cut has too few places for a step"
        assert len(tokens), "no samples"
        self.tokens, self.context, self.rows_per_step, self.seed = tokens, context, rows_per_step, seed
        self.cut = Cut(ranks, rank, micro_batch, accumulation)
        self._packed: dict[int, Packed] = {}
        self._contexts: list[int] = []

    def total_contexts(self, epochs: float) -> int:
        """Contexts in so many epochs; of a part of an epoch, the nearest whole number."""
        whole = int(epochs)
        total = sum(self._contexts_in(epoch) for epoch in range(whole))
        return total + (round((epochs - whole) * self._contexts_in(whole)) if epochs > whole else 0)

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch from 0, position in that epoch)."""
        epoch = 0
        while position >= self._contexts_in(epoch):
            position -= self._contexts_in(epoch)
            epoch += 1
        return epoch, position

    def step(self, position: int, stop: int | None = None) -> Step:
        """The next `rows_per_step` contexts, across the end of an epoch if need be; none from position `stop` on."""
        end = position + self.rows_per_step if stop is None else min(position + self.rows_per_step, stop)
        assert position < end, "nothing is left to train on"
        contexts = self._take(position, end - position)
        everything = np.concatenate(contexts)
        cut = self.cut
        cells = cut.ranks * cut.accumulation
        # Dealt like cards: context j to forward pass j mod cells, so that passes differ by one context at most.
        mine = [contexts[cell::cells] for cell in range(cut.rank, cells, cut.ranks)]
        batches = tuple(batch_of(self.tokens, np.concatenate(pile)) if pile else dummy_batch() for pile in mine)
        return Step(batches, int(self.tokens.supervised[everything].sum()), int(self.tokens.lengths[everything].sum()))

    def _take(self, position: int, count: int) -> list[np.ndarray]:
        epoch, at = self.locate(position)
        taken: list[np.ndarray] = []
        while len(taken) < count:
            packed = self._epoch(epoch)
            taken += [packed.context(index) for index in range(at, min(at + count - len(taken), len(packed)))]
            epoch, at = epoch + 1, 0
        return taken

    def _contexts_in(self, epoch: int) -> int:
        while len(self._contexts) <= epoch:
            self._contexts.append(len(self._epoch(len(self._contexts))))
        return self._contexts[epoch]

    def _epoch(self, epoch: int) -> Packed:
        if epoch not in self._packed:
            self._packed = {known: packed for known, packed in self._packed.items() if abs(known - epoch) == 1}
            self._packed[epoch] = pack(self.tokens.lengths, self.context, self.seed, epoch)
        return self._packed[epoch]


def batch_of(tokens: TokenSet, samples: np.ndarray) -> Batch:
    """Samples end to end."""
    pieces = [tokens.sample(int(index)) for index in samples]
    lengths = [len(ids) for ids, _ in pieces]
    ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int64)
    mask = np.concatenate([mask for _, mask in pieces])
    segments = (0, *np.cumsum(lengths).tolist())
    trained = np.flatnonzero(mask)
    return Batch(
        ids=torch.from_numpy(ids)[None],
        positions=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        segments=segments,
        source=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(ids[trained]),
        samples=tuple(int(index) for index in samples),
    )


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return replace(batch, **{name: getattr(batch, name).to(device) for name in ("ids", "positions", "source", "targets")})


def dummy_batch() -> Batch:
    """One token and nothing to learn: every rank must run as many forward passes as the others."""
    nothing = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(ids=one, positions=one.clone(), segments=(0, 1), source=nothing, targets=nothing.clone(), samples=())


def plain_batches(tokens: TokenSet, context: int, micro_batch: int) -> Iterator[Batch]:
    """Every sample once, in order, in batches of at most `context * micro_batch` tokens; for evaluation."""
    pile: list[int] = []
    size = 0
    for sample, length in enumerate(tokens.lengths.tolist()):
        if pile and size + length > context * micro_batch:
            yield batch_of(tokens, np.asarray(pile))
            pile, size = [], 0
        pile.append(sample)
        size += length
    if pile:
        yield batch_of(tokens, np.asarray(pile))
