"""AdamW by the kernels of bitsandbytes: moments in 8 bits (arXiv 2110.02861), or paged, or both.

The kernels know plain contiguous tensors alone, so they are given this rank's rows of a parameter, of its gradient and of its moments. A
block of 256 numbers shares one absmax and begins with this rank's first row: which numbers share one depends on the number of shards, so a
run that is resumed on another number of them quantizes its moments anew, and is then equal to rounding, not bit for bit.
"""

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from burnish.config import TrainConfig
from burnish.parallel.rows import by_shard, local_rows, row_range

BLOCK = 256
"""What the kernels are compiled for, on a GPU and on a CPU alike."""
SMALL = 4096
"""Parameters of fewer numbers (magnitudes, mostly) keep moments of 32 bits, as bitsandbytes' own optimizers do. Of the whole parameter, so
that the number of ranks does not matter."""
PAGED = 100_000
"""Moments of fewer numbers are not worth pages of their own."""


@cache
def _functional() -> ModuleType:
    from bitsandbytes import functional

    return functional


@cache
def _codes(signed: bool, device: torch.device) -> Tensor:
    """The 256 values that a byte stands for, times its block's absmax: signed for the first moment, from 0 up for the second."""
    return _functional().create_dynamic_map(signed=signed).to(device)


class Blockwise(Optimizer):
    """AdamW whose state for each parameter is `state1`, `state2` (bytes with `absmax1`, `absmax2`, or fp32) and `step`.

    `paged` waits for the device after each step: whoever reads paged moments from the host then finds them whole.
    """

    def __init__(self, groups: list[dict[str, Any]], config: TrainConfig, paged: bool) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": 0.0})
        self.betas, self.epsilon, self.paged = (config.beta1, config.beta2), config.epsilon, paged

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])
        if self.paged:
            torch.cuda.synchronize()

    def _update(self, parameter: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        state["step"] += 1
        # asked for anew at each step: FSDP2 may put a padded copy in the place of a parameter's rows when it is first used
        p, g = local_rows(parameter), local_rows(parameter.grad).contiguous()  # pyright: ignore[reportArgumentType]
        if not p.numel():  # more ranks than rows
            return
        functional, step = _functional(), int(state["step"])
        first, second = (_here(state[name]) for name in ("state1", "state2"))
        for moment in (first, second):
            if getattr(moment, "is_paged", False):
                functional.prefetch_tensor(moment)
        (beta1, beta2), epsilon = self.betas, self.epsilon
        if first.dtype == torch.float32:
            functional.optimizer_update_32bit(
                "adam", g, p, first, beta1, epsilon, step, rate, second, beta2, weight_decay=decay, gnorm_scale=1.0
            )
            return
        maps = _codes(True, p.device), _codes(False, p.device)
        most = [_here(state[name])[: blocks(p.numel())] for name in ("absmax1", "absmax2")]
        functional.optimizer_update_8bit_blockwise(
            "adam", g, p, first, second, beta1, beta2, 0.0, 0.0, epsilon, step, rate, *maps, *most, weight_decay=decay
        )

    @torch.no_grad()
    def recut(self, parameter: Tensor, saved: dict[str, Tensor], shards: int) -> None:
        """Takes a parameter's whole moments, as `shards` ranks saved them, into this rank's blocks. Exact only for 32 bits."""
        state, (start, stop) = self.state[parameter], row_range(parameter)
        for number, signed in (("1", True), ("2", False)):
            moment, absmax = _here(state[f"state{number}"]), state.get(f"absmax{number}")
            whole = saved[f"state{number}"]
            if absmax is None:
                moment.copy_(whole[start:stop])
            elif stop > start:
                mine = decoded(whole, saved[f"absmax{number}"], shards, signed)[start:stop].contiguous()
                codes, most = torch.ops.bitsandbytes.quantize_blockwise(mine, _codes(signed, mine.device), BLOCK)
                moment.copy_(codes)
                _here(absmax)[: len(most)].copy_(most)


def decoded(codes: Tensor, absmax: Tensor, shards: int, signed: bool) -> Tensor:
    """A whole moment in fp32 from its bytes, whose rows were cut into `shards`, each with its own blocks."""
    per = len(absmax) // shards
    pieces = []
    for number, piece in enumerate(codes.split(-(-codes.shape[0] // shards))):
        most = absmax[number * per :][: blocks(piece.numel())].contiguous()
        code = _codes(signed, codes.device)
        pieces.append(torch.ops.bitsandbytes.dequantize_blockwise(piece.contiguous(), most, code, BLOCK, torch.float32))
    return torch.cat(pieces)


def moments(parameter: Tensor, numbers: int, bits: int, paged: bool) -> dict[str, Tensor]:
    """What is kept for a parameter (or for one rank's part of one that has `numbers` in all) before the first step: zeros."""
    if bits == 32 or numbers < SMALL:
        return {name: _zeros(parameter, torch.float32, paged) for name in ("state1", "state2")}
    state = {name: _zeros(parameter, torch.uint8, paged) for name in ("state1", "state2")}
    return state | {
        name: by_shard(parameter, lambda rows: blocks(rows * math.prod(parameter.shape[1:]))) for name in ("absmax1", "absmax2")
    }


def blocks(numbers: int) -> int:
    return -(-numbers // BLOCK)


def _zeros(parameter: Tensor, dtype: torch.dtype, paged: bool) -> Tensor:
    if not paged or parameter.device.type != "cuda" or parameter.numel() < PAGED:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    pages = _functional().get_paged(*parameter.shape, dtype=dtype, device=parameter.device)
    _functional().fill(pages, 0)
    return pages


def _here(moment: Tensor) -> Tensor:
    """This rank's rows; a paged tensor as it is, since a view of it would not be known as paged."""
    return moment if getattr(moment, "is_paged", False) else local_rows(moment)
