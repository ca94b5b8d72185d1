"""Puts adapters on the linear layers that were asked for, and gives them their first values."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.adapt.adapter import Adapter, Base, Switch
from burnish.config import AdaptConfig
from burnish.errors import UserError, did_you_mean
from burnish.parallel.rows import local_rows, row_range

MAGNITUDE = {"lora": False, "dora": True}
ALL = "all-linear"


def _uniform(a_RI: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(a_RI.shape[1])
    a_RI.uniform_(-bound, bound, generator=generator)


def _normal(a_RI: Tensor, generator: torch.Generator) -> None:
    a_RI.normal_(0, 1 / math.sqrt(a_RI.shape[0]), generator=generator)


STARTS: dict[str, Callable[[Tensor, torch.Generator], None]] = {"uniform": _uniform, "normal": _normal}


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model by the name of their layer inside the whole model, and their one switch."""

    by_name: dict[str, Adapter]
    switch: Switch

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by a name that no wrapper changes: `model.layers.0.self_attn.q_proj.a`."""
        parts = {f"{name}.{part}": getattr(adapter, part) for name, adapter in self.by_name.items() for part in ("a", "b", "m")}
        return {name: parameter for name, parameter in parts.items() if parameter is not None}


def attach(linears: Mapping[str, Base], layers: nn.ModuleList, prefix: str, config: AdaptConfig, dtype: torch.dtype) -> Adapters:
    """Wraps each target among `linears` (by name inside `layers`) with an adapter whose parameters are `dtype`; on meta, without bytes."""
    switch = Switch()
    by_name = {}
    with torch.device("meta"):
        for name in matching(list(linears), config.targets):
            adapter = Adapter(linears[name], config.rank, scaling(config), config.dropout, MAGNITUDE[config.method], switch, dtype)
            layers.set_submodule(name, adapter)
            by_name[f"{prefix}.{name}"] = adapter
    return Adapters(by_name, switch)


def scaling(config: AdaptConfig) -> float:
    """alpha / rank, or alpha / √rank where the rank is to be stabilized (arXiv 2312.03732)."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)


def matching(names: list[str], targets: tuple[str, ...]) -> list[str]:
    """The layers whose last name is a target. A target that matches none is an error."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if target != ALL and target not in kinds:
            raise UserError(f"adapt.targets: {target!r} is no linear layer of this model's decoder.{did_you_mean(target, [*kinds, ALL])}")
    if not targets:
        raise UserError(f"adapt.targets is empty, so nothing would be trained. Name some of {', '.join(kinds)}, or {ALL}.")
    return [name for name in names if ALL in targets or name.rpartition(".")[2] in targets]


def start(adapters: Adapters, seed: int, how: str = "uniform") -> None:
    """First values: A drawn as `STARTS[how]` does, B = 0, m = ‖W‖. After the base is filled."""
    for name, adapter in adapters.by_name.items():
        with torch.no_grad():
            whole = draw_a(name, seed, tuple(adapter.a.shape), adapter.a.dtype, how)
            first, last = row_range(adapter.a)
            local_rows(adapter.a).copy_(whole[first:last])
        adapter.start()
    adapters.switch.advance()


def draw_a(name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, how: str = "uniform") -> Tensor:
    """The first A of a layer [R, I]: depends on the layer's name and the seed alone, so on no number of ranks and no order of layers."""
    stream = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(stream[:8], "big") >> 1)
    a_RI = torch.empty(shape, dtype=dtype)
    STARTS[how](a_RI, generator)
    return a_RI
