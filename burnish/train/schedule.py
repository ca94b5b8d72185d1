"""The learning rate of each step."""

import math
from collections.abc import Callable

from burnish.config import TrainConfig

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Share of the highest rate, by the share of the steps after warm-up that are done (0 … 1), with a floor of 0."""


def rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of step `step` (from 0) of `steps`. It rises linearly over the warm-up; its first step is never 0."""
    warmup = warmup_steps(steps, config)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    share = SHAPES[config.schedule]((step - warmup) / max(1, steps - warmup))
    return config.lr * (config.lr_floor + (1.0 - config.lr_floor) * share)


def warmup_steps(steps: int, config: TrainConfig) -> int:
    """`warmup` below 1 is a share of all steps, from 1 on a number of them."""
    return min(steps, round(config.warmup * steps) if config.warmup < 1 else int(config.warmup))
