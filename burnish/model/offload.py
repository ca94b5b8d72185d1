"""The frozen base in host memory, two decoder layers of it at a time on the device: one in use, the next one on its way.

Only frozen tensors of the quantized layers are moved; adapters, their gradients and moments, norms and embeddings stay on the device, and
nothing is ever written back. The layers of even number share one slot on the device and those of odd number the other, so neighbours never
share one, and a layer that is being copied in takes the place of one that both passes have left: forward it follows its neighbour, backward
it precedes it. A layer that runs outside this order, or code that reads a layer's tensors by itself (an export), finds the host's copy,
whose rows are then moved as they are read: slow, and right.

On a CPU the slots are host memory too, and the same copies are made: what is tested there is what a GPU runs, but for the streams.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.linear import QuantLinear

ALIGNED = 256
"""Bytes that a tensor inside a slot begins at a multiple of: what a GPU's kernels and copies like best."""


@dataclass(frozen=True)
class Piece:
    """One frozen tensor of a decoder layer, and where it lies in the layer's bytes."""

    linear: QuantLinear
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def inside(self, flat: Tensor) -> Tensor:
        """The tensor as a view of its layer's bytes."""
        return flat[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


def pieces(layer: nn.Module) -> list[Piece]:
    """The frozen tensors of a decoder layer that are moved, one behind the other. Costs nothing, on meta too."""
    found, end = [], 0
    for linear in (module for module in layer.modules() if isinstance(module, QuantLinear)):
        for name, tensor in linear.tensors().items():
            if tensor.requires_grad:  # what is trained stays where its gradient is
                continue
            found.append(Piece(linear, name, tuple(tensor.shape), tensor.dtype, end))
            end = -(-(end + found[-1].bytes) // ALIGNED) * ALIGNED
    return found


def flat_bytes(found: list[Piece]) -> int:
    """Bytes of all of them as they lie in a slot."""
    return -(-(found[-1].start + found[-1].bytes) // ALIGNED) * ALIGNED if found else 0


def take_out(layers: nn.ModuleList) -> list[list[Piece]]:
    """Takes the frozen tensors out of a skeleton on meta, so that what moves it to a device leaves them out."""
    found = [pieces(layer) for layer in layers]
    for piece in (piece for group in found for piece in group):
        setattr(piece.linear, piece.name, None)
    return found


class HostBase:
    """Puts the tensors that `take_out` took into host memory, as parameters that are filled there, and brings them when their layer runs.

    Costs the host the base's bytes (pinned, where the device is a GPU) and the device those of two decoder layers.
    """

    def __init__(self, layers: nn.ModuleList, taken: list[list[Piece]], device: torch.device) -> None:
        self.taken = taken
        on_gpu = device.type == "cuda"
        self.host = [torch.empty(flat_bytes(group), dtype=torch.uint8, pin_memory=on_gpu) for group in taken]
        most = max(len(flat) for flat in self.host)
        self.slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        self.inside: list[int | None] = [None, None]
        """The layer that each slot holds, or that is on its way there."""
        self.copies = 0
        self.side = torch.cuda.Stream(device) if on_gpu else None
        self.arrived: list[Any] = [None, None]
        for flat, group in zip(self.host, taken, strict=True):
            for piece in group:
                setattr(piece.linear, piece.name, nn.Parameter(piece.inside(flat), requires_grad=False))
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self.bring(number, ahead=1))
            layer.register_forward_hook(lambda module, inputs, output, number=number: self._when_back(output, number))

    def bring(self, number: int, ahead: int) -> None:
        """Has layer `number` in its slot before what is computed next, and sends for its neighbour (`ahead` is 1 or -1)."""
        self._send_for(number)
        self._wait_for(number)
        for piece in self.taken[number]:
            piece.linear.near[piece.name] = piece.inside(self.slots[number % 2])
        if 0 <= number + ahead < len(self.host):
            self._send_for(number + ahead)

    def _when_back(self, output: Any, number: int) -> None:
        """The backward pass enters a layer when its output's gradient is whole: before the layer is recomputed, too."""
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.bring(number, ahead=-1))

    def _send_for(self, number: int) -> None:
        slot = number % 2
        before = self.inside[slot]
        if before == number:
            return
        if before is not None:
            for piece in self.taken[before]:
                piece.linear.near.clear()
        self.inside[slot] = number
        self.copies += 1
        place = self.slots[slot][: len(self.host[number])]
        if self.side is None:
            place.copy_(self.host[number])
            return
        self.side.wait_stream(torch.cuda.current_stream())  # what was in the slot may still be in use by what is queued there
        with torch.cuda.stream(self.side):
            place.copy_(self.host[number], non_blocking=True)
            self.arrived[slot] = self.side.record_event()

    def _wait_for(self, number: int) -> None:
        if self.side is not None:
            torch.cuda.current_stream().wait_event(self.arrived[number % 2])
