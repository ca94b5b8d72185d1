"""Optimizers over what is trained, on this rank's shards: one row of `OPTIMIZERS` each.

A row brings its laws: a run that is resumed equals the uninterrupted one bit for bit, and the plan counts its moments byte for byte.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from burnish.config import TrainConfig
from burnish.errors import UserError
from burnish.parallel.rows import shards_of
from burnish.train import blockwise
from burnish.train.blockwise import Blockwise

Groups = list[dict[str, Any]]


# One pass over each parameter and its moments: 18 ms instead of 47 for SmolLM2's adapters of rank 64 on two cores.
def _adamw(groups: Groups, config: TrainConfig) -> Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def _adam(groups: Groups, config: TrainConfig) -> Optimizer:
    return torch.optim.Adam(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True)


def _sgd(groups: Groups, config: TrainConfig) -> Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def _adadelta(groups: Groups, config: TrainConfig) -> Optimizer:
    return torch.optim.Adadelta(groups, lr=config.lr, rho=config.rho, eps=config.epsilon)


def _named(*names: str) -> Callable[[Tensor, int, TrainConfig], dict[str, Tensor]]:
    """Moments of the parameter's own shape and dtype."""
    return lambda parameter, numbers, config: {name: torch.zeros_like(parameter, requires_grad=False) for name in names}


def _momentum(parameter: Tensor, numbers: int, config: TrainConfig) -> dict[str, Tensor]:
    return _named("momentum_buffer")(parameter, numbers, config) if config.momentum else {}


def _blockwise(bits: int, paged: bool) -> Callable[[Tensor, int, TrainConfig], dict[str, Tensor]]:
    return lambda parameter, numbers, config: blockwise.moments(parameter, numbers, bits, paged)


@dataclass(frozen=True)
class Kind:
    """One way to take a step."""

    make: Callable[[Groups, TrainConfig], Optimizer]
    moments: Callable[[Tensor, int, TrainConfig], dict[str, Tensor]]
    """(a parameter, or one rank's part of it; how many numbers the whole has) → what is kept for it, as it is before the first step."""
    counts: bool = True
    """Whether it must know how many steps were taken."""
    scratch: int = 3
    """Copies of a parameter that exist while it is updated on a CPU, at most."""
    bits: int = 0
    """8 or 32 where bitsandbytes takes the step; it computes in fp32 whatever it is given."""
    paged: bool = False
    """Its moments live in memory that a GPU and the host share."""


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adamw, _named("exp_avg", "exp_avg_sq")),
    "adam": Kind(_adam, _named("exp_avg", "exp_avg_sq")),
    "sgd": Kind(_sgd, _momentum, counts=False),
    "adadelta": Kind(_adadelta, _named("square_avg", "acc_delta")),
    "adamw8bit": Kind(partial(Blockwise, paged=False), _blockwise(8, False), scratch=7, bits=8),
    "paged_adamw": Kind(partial(Blockwise, paged=True), _blockwise(32, True), bits=32, paged=True),
    "paged_adamw8bit": Kind(partial(Blockwise, paged=True), _blockwise(8, True), bits=8, paged=True),
}
RATES = {"b": ("lr_b", "the matrices B of LoRA and DoRA"), "m": ("lr_magnitude", "the magnitudes of DoRA")}
"""The last part of a trained tensor's name → the setting of its own rate, and what it is."""


def problems(config: TrainConfig, device: str, strategy: str, dtype: str) -> list[str]:
    """What this optimizer cannot do there, a line each."""
    kind, found = OPTIMIZERS[config.optimizer], []
    said = f"train.optimizer = {config.optimizer!r}"
    instead = config.optimizer.removeprefix("paged_")
    if kind.paged and device == "cpu":
        found.append(f"{said}: pages move between a GPU and the host, and this run is on a CPU. Set train.optimizer={instead}.")
    if kind.paged and strategy not in ("auto", "single", "ddp"):
        found.append(f"{said}: pages cannot be sharded, and fsdp cuts the moments already. Set train.optimizer={instead}.")
    if kind.bits and dtype == "fp64":
        found.append(f"{said}: bitsandbytes computes in fp32, which model.dtype = 'fp64' would hide. Set train.optimizer=adamw.")
    return found


def build(trainable: dict[str, nn.Parameter], config: TrainConfig) -> Optimizer:
    """The optimizer with its state already there (zeros, as its first step would make it): a checkpoint has one shape at every step.

    Raises a `UserError` where a rate is set for what is not trained, or where this optimizer cannot run on the parameters' device.
    """
    kind = OPTIMIZERS[config.optimizer]
    first = next(iter(trainable.values()))
    found = problems(config, first.device.type, "fsdp" if shards_of(first) > 1 else "single", "")
    if found:
        raise UserError("\n".join(found))
    _check_rates(trainable, config)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        decayed, times = decays(name, parameter), times_of(name, config)
        fresh = {"params": [], "weight_decay": config.weight_decay if decayed else 0.0, "times": times}
        groups.setdefault((decayed, times), fresh)["params"].append(parameter)
    optimizer = kind.make(list(groups.values()), config)
    for parameter in trainable.values():
        count = {"step": torch.tensor(0.0, device=parameter.device if not kind.bits else None)} if kind.counts else {}
        optimizer.state[parameter] = kind.moments(parameter, parameter.numel(), config) | count
    return optimizer


def _check_rates(trainable: dict[str, nn.Parameter], config: TrainConfig) -> None:
    for part, (setting, what) in RATES.items():
        if getattr(config, setting) is not None and not any(name.endswith(f".{part}") for name in trainable):
            raise UserError(f"train.{setting} is the rate of {what}, and this run trains none. Leave it out, or set adapt.method=dora.")


def times_of(name: str, config: TrainConfig) -> float:
    """A trained tensor's own rate as a multiple of `train.lr`, so that one schedule serves all."""
    setting, _ = RATES.get(name.rpartition(".")[2], ("lr", ""))
    own = getattr(config, setting)
    return 1.0 if own is None else own / config.lr


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices: not for magnitudes, norms and biases, which are vectors."""
    return parameter.dim() > 1


def moments(optimizer: Optimizer, trainable: dict[str, nn.Parameter]) -> Iterator[tuple[str, str, Tensor]]:
    """(name of the parameter, name of the moment, the moment as it is sharded here)."""
    for name, parameter in trainable.items():
        for moment, tensor in optimizer.state[parameter].items():
            if moment != "step":
                yield name, moment, tensor


def moments_of_a_part(parameter: Tensor, config: TrainConfig, shards: int) -> list[Tensor]:
    """On meta, what the rank with the most rows keeps for a parameter that is cut into `shards`. What the plan counts."""
    rows = -(-parameter.shape[0] // shards)
    part = torch.empty(rows, *parameter.shape[1:], dtype=parameter.dtype, device="meta")
    return list(OPTIMIZERS[config.optimizer].moments(part, parameter.numel(), config).values())


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """`rate` is that of `train.lr`; a group with a rate of its own keeps its proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]


def set_steps_done(optimizer: Optimizer, steps_done: int) -> None:
    """Adam's bias correction counts the steps that were taken."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps_done))
