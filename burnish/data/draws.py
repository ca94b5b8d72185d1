"""Draws of different kinds by one seed: none follows from another, and all are the same on every machine and in every version of numpy."""

import numpy as np

STREAMS = {"held_out": 1, "conversations": 2, "validation": 3, "replay": 4, "mixture": 5, "set": 6, "packing": 7}
"""A kind of draw has a number of its own, for good: another number gives other draws."""


def draws(seed: int, stream: str, number: int = 0) -> np.random.PCG64:
    """Raw 64-bit draws, of which numpy promises that they stay as they are; `number` tells draws of one kind apart (an epoch, a source)."""
    return np.random.PCG64(np.random.SeedSequence([seed, STREAMS[stream], number]))


def shuffled(count: int, seed: int, stream: str, number: int = 0) -> list[int]:
    """0 … count - 1 in an order that is drawn by the seed."""
    return np.argsort(draws(seed, stream, number).random_raw(count), kind="stable").tolist() if count else []
