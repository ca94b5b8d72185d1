"""Makes trainable what was asked for (adapters on linear layers, modules in full, new blocks), and gives adapters their first values."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from burnish.adapt.adapter import Adapter, Base, Switch
from burnish.adapt.methods import METHODS
from burnish.adapt.targets import matching
from burnish.adapt.whole import Whole
from burnish.config import AdaptConfig
from burnish.parallel.rows import local_rows, row_range

MAGNITUDE = {name: method.magnitude for name, method in METHODS.items() if method.magnitude is not None}
"""The methods that have adapters, and whether these have a magnitude."""

__all__ = ["MAGNITUDE", "Adapters", "attach", "draw_a", "matching", "scaling", "start"]


def _uniform(a_RI: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(a_RI.shape[1])
    a_RI.uniform_(-bound, bound, generator=generator)


def _normal(a_RI: Tensor, generator: torch.Generator) -> None:
    a_RI.normal_(0, 1 / math.sqrt(a_RI.shape[0]), generator=generator)


STARTS: dict[str, Callable[[Tensor, torch.Generator], None]] = {"uniform": _uniform, "normal": _normal}


@dataclass(frozen=True)
class Adapters:
    """What is trained of one model, by whatever method, and its one switch."""

    by_name: dict[str, Adapter]
    """Adapters by the name of their layer inside the whole model."""
    switch: Switch
    method: str = "dora"
    whole: dict[str, Whole] = field(default_factory=dict)
    """Parameters that are trained themselves, by name."""
    ends: str = "none"
    """How embeddings and head of their base are held: `model.ends`."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by a name that no wrapper changes: `model.layers.0.self_attn.q_proj.a`, `model.norm.weight`."""
        parts = {f"{name}.{part}": getattr(adapter, part) for name, adapter in self.by_name.items() for part in ("a", "b", "m")}
        adapters = {name: parameter for name, parameter in parts.items() if parameter is not None}
        return adapters | {name: whole.parameter for name, whole in self.whole.items()}

    @property
    def holds_base(self) -> bool:
        """Whether the model with its switch off is the base. Else weights of the base were trained, and are held nowhere."""
        return METHODS[self.method].grows or not self.whole


def attach(
    linears: Mapping[str, Base], layers: nn.ModuleList, prefix: str, config: AdaptConfig, dtype: torch.dtype, switch: Switch | None = None
) -> dict[str, Adapter]:
    """Wraps each target among `linears` (by name inside `layers`) with an adapter whose parameters are `dtype`; on meta, without bytes.

    Returns them by their layer's name inside the whole model; none where the method has no adapters.
    """
    switch = switch or Switch()
    by_name: dict[str, Adapter] = {}
    magnitude = METHODS[config.method].magnitude
    if magnitude is None:
        return by_name
    full = {f"{prefix}.{name}": name for name in linears}
    with torch.device("meta"):
        for name in matching(list(full), config.targets):
            adapter = Adapter(linears[full[name]], config.rank, scaling(config), config.dropout, magnitude, switch, dtype)
            layers.set_submodule(full[name], adapter)
            by_name[name] = adapter
    return by_name


def scaling(config: AdaptConfig) -> float:
    """alpha / rank, or alpha / √rank where the rank is to be stabilized (arXiv 2312.03732)."""
    return config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)


def start(adapters: Adapters, seed: int, how: str = "uniform") -> None:
    """First values of adapters, after the base is filled: A drawn as `STARTS[how]` does, B = 0, m = ‖W‖.

    What is trained in full has its first values from the base's files.
    """
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
