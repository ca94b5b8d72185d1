"""Lengths → packed contexts: an index that is computed from (seed, epoch), never stored."""

from dataclasses import dataclass

import numpy as np

from burnish.data.draws import draws

OPEN_CONTEXTS = 128


@dataclass(frozen=True)
class Packed:
    """Context c holds the samples `order[starts[c] : starts[c + 1]]`."""

    order: np.ndarray
    """int64 [samples]: every sample exactly once."""
    starts: np.ndarray
    """int64 [contexts + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def context(self, index: int) -> np.ndarray:
        """The samples of one context, in order."""
        return self.order[self.starts[index] : self.starts[index + 1]]


def pack(lengths: np.ndarray, context: int, seed: int, epoch: int) -> Packed:
    """Contexts of at most `context` tokens that hold every sample once: shuffled, put into open contexts, shuffled again.

    The same on every machine and in every version of numpy: only raw 64-bit draws are used, and sorts that are stable.
    """
    assert lengths.size == 0 or (lengths.min() > 0 and lengths.max() <= context), "a sample is empty or longer than the context"
    drawn = draws(seed, "packing", epoch)
    order = np.argsort(drawn.random_raw(len(lengths)), kind="stable") if lengths.size else np.zeros(0, np.int64)
    order = order[_longer_first(lengths[order], context)]
    context_of, contexts = _first_fit(lengths[order], context)
    shuffled = np.argsort(drawn.random_raw(contexts), kind="stable").argsort(kind="stable") if contexts else np.zeros(0, np.int64)
    context_of = shuffled[context_of]
    starts = np.zeros(contexts + 1, np.int64)
    np.cumsum(np.bincount(context_of, minlength=contexts), out=starts[1:])
    return Packed(order[np.argsort(context_of, kind="stable")].astype(np.int64), starts)


def _longer_first(lengths: np.ndarray, context: int) -> np.ndarray:
    """An order in which longer samples come first, within stretches that just fill the open contexts.

    It brings the waste from 5 % to 1.5 % where lengths are even between 1 % and 60 % of a context. Only sixteenths of a context
    are told apart, and short samples not at all: they stay shuffled, so that a context is not filled with one kind of row.
    """
    stretch = (np.cumsum(lengths) // (OPEN_CONTEXTS * context * 4 // 5)).astype(np.int32)
    sixteenths = np.maximum(lengths * 16 // context, 2).astype(np.int8)
    return np.lexsort((-sixteenths, stretch))


def _first_fit(lengths: np.ndarray, context: int) -> tuple[np.ndarray, int]:
    """(the context of each length int64 [samples], number of contexts). Where nothing fits, the fullest open context is closed."""
    space = np.full(OPEN_CONTEXTS, context, np.int64)
    numbers = list(range(OPEN_CONTEXTS))
    following = OPEN_CONTEXTS
    context_of = np.empty(len(lengths), np.int32)
    for first in range(0, len(lengths), 1 << 16):  # a list of all lengths would be 40 bytes a sample
        for sample, length in enumerate(lengths[first : first + (1 << 16)].tolist(), first):
            place = int((space >= length).argmax())
            if space[place] < length:
                place = int(space.argmin())
                space[place], numbers[place] = context, following
                following += 1
            space[place] -= length
            context_of[sample] = numbers[place]
    used = np.bincount(context_of, minlength=following) > 0  # open contexts that nothing was put into have no number
    return (np.cumsum(used) - 1)[context_of], int(used.sum())
