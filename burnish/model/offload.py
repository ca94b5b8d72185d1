"""The frozen base in host memory, two decoder layers of it at a time on the device: one in use, the next one on its way.

Only frozen tensors of the quantized layers are moved; adapters, their gradients and moments, norms and embeddings stay on the device, and
nothing is ever written back. The layers of even number share one slot on the device and those of odd number the other, so neighbours never
share one, and a layer that is being copied in takes the place of one that both passes have left: forward it follows its neighbour, backward
it precedes it. A layer that runs outside this order, or code that reads a layer's tensors by itself (an export), finds the host's copy,
whose rows are then moved as they are read: slow, and right.

Under FSDP2 these tensors are none of its parameters. Each rank's host holds the rows that FSDP2 would have given it; they are copied to the
device and gathered from all ranks into the slot, each over its own PCI bus, so that a rank copies only its share.

On a CPU the slots are host memory too, and the same copies are made: what is tested there is what a GPU runs, but for the streams.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from burnish.model.linear import QuantLinear
from burnish.parallel.outside import Together

ALIGNED = 256
"""Bytes that a tensor inside a slot begins at a multiple of: what a GPU's kernels and copies like best."""


@dataclass(frozen=True)
class Piece:
    """One frozen tensor of a decoder layer: where it lies in the layer's bytes, and where a rank's rows of it lie in that rank's.

    Rows are cut as `torch.chunk` and FSDP2 cut them. Every rank's share takes the bytes of the fullest, so that shares that are gathered
    one behind the other are the rows in their order, and what is too long comes last.
    """

    linear: QuantLinear
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranks: int
    start: int
    """In the whole layer's bytes."""
    own: int
    """In the bytes of one rank's share."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def share_rows(self) -> int:
        """Rows of the fullest rank."""
        return -(-self.shape[0] // self.ranks)

    @property
    def share_bytes(self) -> int:
        return self.share_rows * self.row_bytes

    def inside(self, flat: Tensor) -> Tensor:
        """The tensor as a view of its layer's bytes."""
        return flat[self.start : self.start + self.shape[0] * self.row_bytes].view(self.dtype).view(self.shape)

    def mine(self, share: Tensor, rank: int) -> Tensor:
        """A rank's rows of it as a view of that rank's bytes."""
        rows = max(0, min(self.share_rows, self.shape[0] - rank * self.share_rows))
        return share[self.own : self.own + rows * self.row_bytes].view(self.dtype).view(rows, *self.shape[1:])

    def pair(self, share: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes of one rank's share, and the place of those of all."""
        return share[self.own : self.own + self.share_bytes], flat[self.start : self.start + self.ranks * self.share_bytes]


def pieces(layer: nn.Module, ranks: int = 1) -> list[Piece]:
    """The frozen tensors of a decoder layer that are moved, one behind the other. Costs nothing, on meta too."""
    found, start, own = [], 0, 0
    for linear in (module for module in layer.modules() if isinstance(module, QuantLinear)):
        for name, tensor in linear.tensors().items():
            if tensor.requires_grad:  # what is trained stays where its gradient is
                continue
            found.append(Piece(linear, name, tuple(tensor.shape), tensor.dtype, ranks, start, own))
            start, own = _aligned(start + ranks * found[-1].share_bytes), _aligned(own + found[-1].share_bytes)
    return found


def flat_bytes(found: list[Piece]) -> int:
    """Bytes of all of them as they lie in a slot."""
    return _aligned(found[-1].start + found[-1].ranks * found[-1].share_bytes) if found else 0


def share_bytes(found: list[Piece]) -> int:
    """Bytes of one rank's rows of all of them: what its host holds, and what is copied to its device at a time."""
    return _aligned(found[-1].own + found[-1].share_bytes) if found else 0


def _aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def moved(layers: nn.ModuleList) -> set[nn.Parameter]:
    """The parameters of a skeleton on meta that are moved, for FSDP2 to leave alone."""
    return {getattr(piece.linear, piece.name) for layer in layers for piece in pieces(layer)}


def take_out(layers: nn.ModuleList, ranks: int = 1) -> list[list[Piece]]:
    """Takes the frozen tensors out of a skeleton on meta, so that what moves it to a device leaves them out.

    `ranks`: over how many each is cut.
    """
    found = [pieces(layer, ranks) for layer in layers]
    for piece in (piece for group in found for piece in group):
        setattr(piece.linear, piece.name, None)
    return found


class HostBase:
    """Puts the tensors that `take_out` took into host memory, as parameters that are filled there, and brings them when their layer runs.

    Costs the host the base's bytes (pinned, where the device is a GPU) and the device those of two decoder layers. With `others`, who hold
    the other rows, it costs each host its rows' bytes, and the device one layer's share more, which is gathered from.
    """

    def __init__(self, layers: nn.ModuleList, taken: list[list[Piece]], device: torch.device, others: Together | None = None) -> None:
        self.taken, self.others = taken, others
        on_gpu = device.type == "cuda"
        self.host = [torch.empty(share_bytes(group), dtype=torch.uint8, pin_memory=on_gpu) for group in taken]
        most = max(flat_bytes(group) for group in taken)
        self.slots = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        self.inside: list[int | None] = [None, None]
        """The layer that each slot holds, or that is on its way there."""
        self.share = torch.empty(max(len(flat) for flat in self.host) if others else 0, dtype=torch.uint8, device=device)
        """This rank's rows of the layer that is being gathered."""
        self.copies = 0
        self.side = torch.cuda.Stream(device) if on_gpu else None
        self.arrived: list[Any] = [None, None]
        self.coming: list[Any] = []
        """What is being gathered and was not waited for: without a stream alone, which waits by itself."""
        for flat, group in zip(self.host, taken, strict=True):
            for piece in group:
                mine = piece.mine(flat, others.rank if others else 0)
                whole = others.parameter(mine, piece.shape) if others else nn.Parameter(mine, requires_grad=False)
                setattr(piece.linear, piece.name, whole)
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
        self._arrive()  # `share` is free when what was gathered from it has arrived
        with self._beside(slot) as when_left:
            host, flat = self.host[number], self.slots[slot]
            if self.others is None:
                when_left()
                flat[: len(host)].copy_(host, non_blocking=True)
            else:
                self.share[: len(host)].copy_(host, non_blocking=True)
                when_left()
                self.coming = self.others.gather(piece.pair(self.share, flat) for piece in self.taken[number])

    @contextmanager
    def _beside(self, slot: int) -> Iterator[Callable[[], None]]:
        """On a GPU a stream beside the computation, which has left the slot when the function that is yielded was called.

        `arrived` is when all that the stream was given is done.
        """
        if self.side is None:
            yield lambda: None
            return
        computing, side = torch.cuda.current_stream(), self.side
        with torch.cuda.stream(side):
            yield lambda: side.wait_stream(computing)
            self._arrive()
            self.arrived[slot] = side.record_event()

    def _arrive(self) -> None:
        """Waits for what is being gathered: this process, or on a GPU the stream that it stands in."""
        for work in self.coming:
            work.wait()
        self.coming = []

    def _wait_for(self, number: int) -> None:
        self._arrive()
        if self.side is not None:
            torch.cuda.current_stream().wait_event(self.arrived[number % 2])
