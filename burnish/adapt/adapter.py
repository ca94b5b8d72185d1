"""LoRA and DoRA, one function with an optional magnitude.

    y = d ⊙ (W x + s·B A x) + bias,   d = m / ‖W + s·B A‖ by rows, detached (DoRA, arXiv 2402.09353, section 4.3); LoRA is d = 1.

Two things make DoRA cost what LoRA costs.
* The norm is never that of a built matrix: ‖W + sBA‖² = ‖W‖² + 2s⟨W Aᵀ, B⟩ + s²⟨B (A Aᵀ), B⟩ by rows (factored norm: arXiv
  2603.22276). ‖W‖² is a constant of the layer, and W Aᵀ takes one decoded tile at a time. d changes only when the optimizer steps, so one
  clock stamps it, and it serves every micro-batch and every recomputation of that step.
* d is never multiplied onto activations: it goes into the scales before W is decoded, and into B. So what is trained is bit for bit the
  arithmetic of the folded model that is served, and there is no pass over [T, O] that LoRA does not have. The pass that finds a new d
  decodes W once more (measured: under 5 % of the product at 256 tokens, once a step): scaling its own tiles by d instead would round them
  otherwise than the fold does, and the first micro-batch of a step would differ from its recomputation.

Axes: T tokens (all leading axes of x flattened), I in_features, O out_features, R rank.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from burnish import kernels
from burnish.parallel.rows import local_rows

PRODUCT_BYTES = {"cpu": 1 << 20, "cuda": 32 << 20}
"""Of g · y that exist at a time, for m's gradient: on a CPU what stays in its cache; on a GPU (where no kernel is) few operations."""


class Base(Protocol):
    """What an adapter asks of the layer that it wraps. It never asks what that layer holds."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    norm2: nn.Parameter
    bias: nn.Parameter | None

    def tiles(self, gain: Tensor | None = None, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]: ...
    def products(self, x: Tensor) -> tuple[torch.dtype, AbstractContextManager[Any]]: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class Switch:
    """One for a whole adapted model: the step that its adapters stand at, and whether they are on.

    Everything that writes A, B or m must call `advance`, or a stale d is used without a word.
    (Tensor versions cannot tell: FSDP2 preserves them.)
    """

    def __init__(self) -> None:
        self.step = 0
        self.on = True

    def advance(self) -> None:
        self.step += 1


class Adapter(nn.Module):
    """y = d ⊙ (W x + s·B A x) + bias over a frozen base; LoRA where `m` is None."""

    def __init__(self, base: Base, rank: int, scaling: float, dropout: float, magnitude: bool, switch: Switch, dtype: torch.dtype) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout, self.switch = base, scaling, dropout, switch
        self.a = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype))
        self.b = nn.Parameter(torch.empty(base.out_features, rank, dtype=dtype))
        self.m = nn.Parameter(torch.empty(base.out_features, dtype=dtype)) if magnitude else None
        self.d: Tensor | None = None
        self.stamp = -1

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O], in the base's dtype or that of autocast. One dequantization here, one in the backward pass; one more where
        d is stale."""
        if not self.switch.on:
            return self.base(x)
        kind, as_said = self.base.products(x)
        with as_said:
            x = x.to(kind)
            low = F.dropout(x, self.dropout, self.training) if self.dropout else x
            if self.stale:
                self.refresh()
            return _AdaptedProduct.apply(x, low, self.a, self.b, self.m, self)

    @property
    def stale(self) -> bool:
        return self.m is not None and self.stamp != self.switch.step

    def start(self) -> None:
        """B = 0 and m = ‖W‖, so that the adapted layer *is* the base. On whatever rows this rank holds; A is drawn by `attach.draw_a`."""
        with torch.no_grad():
            local_rows(self.b).zero_()
            if self.m is not None:
                local_rows(self.m).copy_(local_rows(self.base.norm2).sqrt())
        self.stamp = -1

    @torch.no_grad()
    def refresh(self) -> None:
        """A new d, from W as the compute dtype rounds it and the trained values as they are; in fp32 or better from W on."""
        assert self.m is not None
        gram_RR = self.a @ self.a.T
        d_O = torch.empty_like(self.m)
        times_a = _times(self.a, self.base.dtype)
        for rows, w in self.base.tiles():
            wa_OR = times_a(w)
            d_O[rows] = dora_gain(self.base.norm2[rows], wa_OR, gram_RR, self.b[rows], self.m[rows], self.scaling)
        self.d, self.stamp = d_O, self.switch.step

    def extra_repr(self) -> str:
        return f"{'dora' if self.m is not None else 'lora'}, rank {self.a.shape[0]}, scaling {self.scaling:g}"


def _times(a_RI: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """w [O, I] in `dtype` → w Aᵀ [O, R] in A's.

    On a GPU, whose tensor cores want 16 bits, a w that has no more is multiplied with A in two parts of 16 bits, what one of them holds and
    the rest, and summed in fp32: within 1e-5 of the fp32 product (6e-6 on an H100), in a seventh of its time, and without w in fp32.
    """
    if not (a_RI.is_cuda and dtype.itemsize == 2):
        return lambda w: w.to(a_RI.dtype) @ a_RI.T
    most = a_RI.to(dtype)
    parts = torch.cat([most, (a_RI - most.to(a_RI.dtype)).to(dtype)]).T

    def times(w: Tensor) -> Tensor:
        first, rest = torch.mm(w, parts, out_dtype=a_RI.dtype).chunk(2, dim=1)
        return first + rest

    return times


def dora_gain(norm2_O: Tensor, wa_OR: Tensor, gram_RR: Tensor, b_OR: Tensor, m_O: Tensor, s: float) -> Tensor:
    """d = m / ‖W + s·B A‖ for some rows, from ‖W‖², W Aᵀ and A Aᵀ, in fp32 or better. A row of zeros gets d = 0, not NaN."""
    twice_OR = torch.addmm(wa_OR, b_OR, gram_RR, beta=2 * s, alpha=s * s)
    squared = norm2_O + torch.linalg.vecdot(twice_OR, b_OR)
    norm = squared.clamp_min(0).sqrt()  # the three terms may cancel to a rounding error below 0
    return torch.where(norm > 0, m_O / norm, 0)


class _AdaptedProduct(torch.autograd.Function):
    """The whole layer as one function: it keeps x, A x and (for m) y without its bias, and decodes W once forward and once backward.

    `low` is x, or x after dropout: the input of the low-rank branch alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, a_RI: Tensor, b_OR: Tensor, m_O: Tensor | None, adapter: Adapter) -> Tensor:
        base = adapter.base
        x_TI, low_TI = x.reshape(-1, base.in_features), low.reshape(-1, base.in_features)
        z_TR = low_TI @ a_RI.to(x.dtype).T
        d_O = adapter.d
        gain_O = adapter.scaling if d_O is None else adapter.scaling * d_O[:, None]
        y_TO = z_TR @ (b_OR * gain_O).to(x.dtype).T
        for rows, w in base.tiles(d_O, x.dtype):
            y_TO[:, rows].addmm_(x_TI, w.T)  # the large term last: bf16 then rounds it once, not twice
        ctx.base, ctx.d, ctx.gain, ctx.dropped = base, d_O, gain_O, low is not x
        ctx.save_for_backward(low_TI, z_TR, a_RI, b_OR, m_O, y_TO if m_O is not None else None)
        if base.bias is not None:  # m's gradient needs y without it: a bias far larger than W x would leave bf16 nothing of W x
            bias_O = base.bias.to(y_TO.dtype)
            y_TO = y_TO + bias_O if m_O is not None else y_TO.add_(bias_O)
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        base: Base = ctx.base
        low_TI, z_TR, a_RI, b_OR, m_O, y_TO = ctx.saved_tensors
        g_TO = g.reshape(-1, base.out_features)
        gz_TR = g_TO @ (b_OR * ctx.gain).to(g.dtype)
        # z.T @ g and not g.T @ z: its rows are long, which BLAS likes better. Laid out as B is: autograd copies what is not
        db = torch.mul((z_TR.T @ g_TO).T.to(b_OR.dtype), ctx.gain, out=torch.empty_like(b_OR))
        da = (gz_TR.T @ low_TI).to(a_RI.dtype)
        dm = _magnitude_gradient(g_TO, y_TO, m_O) if m_O is not None else None
        dx = dlow = None
        shape = (*g.shape[:-1], base.in_features)
        if ctx.needs_input_grad[1] and ctx.dropped:
            dlow = (gz_TR @ a_RI.to(g.dtype)).view(shape)
        if ctx.needs_input_grad[0]:
            dx_TI = g.new_zeros(g_TO.shape[0], base.in_features) if ctx.dropped else gz_TR @ a_RI.to(g.dtype)
            for rows, w in base.tiles(ctx.d, g.dtype):
                dx_TI.addmm_(g_TO[:, rows], w)
            dx = dx_TI.view(shape)
        return dx, dlow, da, db, dm, None


def _magnitude_gradient(g_TO: Tensor, y_TO: Tensor, m_O: Tensor) -> Tensor:
    """Σ over tokens of g · y / m, y without its bias: it is linear in m, so that no norm is needed. 0 where m is 0. Products and sums are
    in m's dtype."""
    if kernels.usable(m_O) and m_O.dtype == torch.float32:
        total_O = kernels.column_dots(g_TO, y_TO)
    else:
        tokens = max(1, PRODUCT_BYTES[m_O.device.type] // (len(m_O) * m_O.itemsize))
        total_O = torch.zeros_like(m_O)
        for g, y in zip(g_TO.split(tokens), y_TO.split(tokens), strict=True):
            # BLAS sums over rows faster than `sum(0)`
            total_O += m_O.new_ones(len(g)) @ (g.to(m_O.dtype) * y.to(m_O.dtype))
    return torch.where(m_O != 0, total_O / m_O, 0)


def plain_forward(adapter: Adapter, x: Tensor) -> Tensor:
    """The same layer written as the paper writes it, with a dense W and the norm of a built matrix: the oracle of the fast one.

    Differentiable in x, A, B and m, with the norm detached. Costs two dense matrices. (Without dropout.)
    """
    base = adapter.base
    w_OI = torch.cat([tile.clone() for _, tile in base.tiles()])
    update_OI = adapter.scaling * (adapter.b @ adapter.a).to(w_OI.dtype)
    y = F.linear(x, w_OI) + F.linear(x, update_OI)
    if adapter.m is not None:
        norm_O = torch.linalg.vector_norm(w_OI + update_OI, dim=1).detach()
        y = y * (adapter.m / norm_O).to(y.dtype)
    return y if base.bias is None else y + base.bias
