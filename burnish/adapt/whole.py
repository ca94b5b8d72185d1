"""Parameters that are trained themselves: fp32 masters, rounded to the compute dtype where they are used.

FSDP2's `MixedPrecisionPolicy` would do the same for its own groups and for no others; here one rule holds on one process, under DDP and
under FSDP2 (which then gathers fp32). Where the compute dtype is fp32 or wider nothing is rounded, and modules are left as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from burnish.adapt.adapter import Switch


@dataclass(frozen=True)
class Whole:
    """One trained parameter, and every module that has it: a head may be tied to the embeddings."""

    modules: tuple[tuple[str, nn.Module], ...]
    """By name inside the model; the first gives the parameter its name."""
    attribute: str

    @property
    def name(self) -> str:
        return f"{self.modules[0][0]}.{self.attribute}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{name}.{self.attribute}" for name, _ in self.modules)

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now: filling and sharding replace it."""
        return getattr(self.modules[0][1], self.attribute)


def train_whole(model: nn.Module, chosen: Iterable[str], master: torch.dtype, compute: torch.dtype) -> dict[str, Whole]:
    """Makes the own parameters of the `chosen` modules trainable, in the dtype `master`; on meta, before there are bytes.

    Ties stay ties. Returns each parameter once, by name. Where `compute` is narrower, a module's forward pass sees its parameters rounded
    to it (a copy that autograd keeps until that module's backward pass), and their gradients arrive in `master`.
    """
    wanted = {id(parameter) for name in chosen for parameter in model.get_submodule(name).parameters(recurse=False)}
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) in wanted:
                owners.setdefault(id(parameter), []).append((name, module, attribute))
    trained, rounded = {}, {}
    for places in owners.values():
        before = getattr(places[0][1], places[0][2])
        after = nn.Parameter(torch.empty_like(before, dtype=master))
        for _, module, attribute in places:
            module.register_parameter(attribute, after)
            rounded[id(module)] = module
        whole = Whole(tuple((name, module) for name, module, _ in places), places[0][2])
        trained[whole.name] = whole
    if compute != master:
        for module in rounded.values():
            _compute_in(module, compute)
    return trained


def _compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives the module a forward pass in which its own parameters are rounded to `dtype`."""

    def forward(*inputs: Any, **named: Any) -> Any:
        masters = dict(module._parameters)
        module._parameters.update({name: None if value is None else value.to(dtype) for name, value in masters.items()})  # pyright: ignore[reportArgumentType, reportCallIssue]
        try:
            return type(module).forward(module, *inputs, **named)
        finally:
            module._parameters.update(masters)

    module.forward = forward


def skip_when_off(block: nn.Module, switch: Switch) -> None:
    """Lets hidden states pass a new decoder block unchanged while the switch is off: the model is then its base."""

    def forward(hidden: torch.Tensor, *inputs: Any, **named: Any) -> torch.Tensor:
        # looked up when called: sharding and recomputation put another class in the place of the block's
        return type(block).forward(block, hidden, *inputs, **named) if switch.on else hidden

    block.forward = forward
