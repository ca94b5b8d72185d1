"""Embeddings and head in a quantized format: both frozen, and neither ever decoded whole.

A format is row-local, and rows are what both want. The embeddings decode the rows of the tokens that are looked up. The head decodes one
tile of the vocabulary at a time: its softmax is accumulated over the tiles, and so is its gradient, which is a softmax-weighted sum of the
very rows that are decoded then. So a training step decodes the head once and keeps no logits. (Softmax as it comes: arXiv 1805.02867.)

Axes: K supervised positions, P some of them, H hidden width, V vocabulary, C rows of one tile.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from burnish.errors import UserError
from burnish.model.formats import FORMATS
from burnish.model.head import LOGIT_BYTES
from burnish.model.linear import QuantLinear, check_divides, products, wide


class QuantEmbedding(nn.Module):
    """Rows of a frozen matrix [V, H], decoded where they are looked up, times `scale`. The matrix may be the head itself (`tied`)."""

    def __init__(self, table: QuantLinear, scale: float, tied: bool) -> None:
        super().__init__()
        if tied:  # the head's module alone owns it: what goes over all modules (`to_empty`) must not meet it twice
            object.__setattr__(self, "table", table)
        else:
            self.table = table
        self.scale = torch.tensor(scale, dtype=table.dtype).item()  # as transformers rounds it

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., H], in the compute dtype."""
        rows = self.table.decoded(ids.reshape(-1), None, self.table.dtype)
        rows = rows.view(*ids.shape, self.table.in_features)
        return rows.clone() if self.scale == 1 else rows * self.scale  # no view: FSDP2 would warn that its hooks may be lost


def names_of_ends(model: PreTrainedModel) -> tuple[str, str]:
    """The names of the modules that are the embeddings and the head, tied or not."""
    names = {module: name for name, module in model.named_modules()}
    return names[model.get_input_embeddings()], names[model.get_output_embeddings()]


def are_tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head are one matrix, quantized or not."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embeddings.table is head if isinstance(embeddings, QuantEmbedding) else embeddings.weight is getattr(head, "weight", None)


def quantize_ends(model: PreTrainedModel, formats: Mapping[str, tuple[str, int]], asked: str, block: int, dtype: torch.dtype) -> None:
    """Puts modules that hold their matrix in a format (and a block) in the place of embeddings and head, by `names_of_ends`; on meta.

    The format `none` leaves a module as it is. Tied, both get one matrix, in the embeddings' format. Raises a `UserError` for a block that
    does not divide the hidden width, and for embeddings or a head that do more than look up and multiply; `asked` and `block` are
    `model.ends` and `model.block`.
    """
    names = names_of_ends(model)
    embeddings, head = (model.get_submodule(name) for name in names)
    tied = are_tied(model)
    scale = 1.0 if type(embeddings) is nn.Embedding else getattr(embeddings, "scalar_embed_scale", None)  # the latter: Gemma's
    if scale is None or type(head) is not nn.Linear or (tied and head.bias is not None):
        kinds = f"{type(embeddings).__name__} and {type(head).__name__}"
        raise UserError(f"model.ends = {asked!r}: embeddings and head of this model ({kinds}) do more than burnish knows. Leave it out.")
    for name in names[: 1 if tied else 2]:
        module, (format_name, own_block) = model.get_submodule(name), formats[name]
        if format_name == "none":
            continue
        form = FORMATS[format_name]
        assert isinstance(module, nn.Embedding | nn.Linear)
        out, width = module.weight.shape
        check_divides(name, width, form, own_block, block, "model.ends")
        with module.weight.device:
            held = QuantLinear(width, out, getattr(module, "bias", None) is not None, form, own_block, dtype)
        model.set_submodule(name, QuantEmbedding(held, scale, tied) if module is embeddings else held)
        if tied:
            model.set_submodule(names[1], held)
            model._tied_weights_keys = {}  # the two modules share one, which nothing can untie; there is no `weight` to tie any more


def frozen_loss(head: QuantLinear, hidden_KH: Tensor, targets_K: Tensor, softcap: float | None = None) -> Tensor:
    """`head_loss` for a quantized head: differentiable in the hidden states. Costs one decoding of the head, and [K, H] in fp32 until the
    backward pass."""
    if not len(targets_K):
        return hidden_KH.sum().to(wide(hidden_KH.dtype))  # 0, with a gradient of zeros, so that every rank runs the same backward pass
    kind, as_said = products(hidden_KH, head.dtype)
    with as_said:
        return _FrozenLoss.apply(hidden_KH.to(kind), head, targets_K, softcap)


def frozen_losses(head: QuantLinear, hidden_KH: Tensor, targets_K: Tensor, softcap: float | None = None) -> Tensor:
    """`token_losses` for a quantized head."""
    kind, as_said = products(hidden_KH, head.dtype)
    with torch.no_grad(), as_said:
        return _over_tiles(head, hidden_KH.to(kind), targets_K, softcap, gradient=False)[0]


class _FrozenLoss(torch.autograd.Function):
    """Summed loss. Its gradient is computed with it, from the tiles that are decoded then."""

    @staticmethod
    def forward(ctx: Any, hidden_KH: Tensor, head: QuantLinear, targets_K: Tensor, softcap: float | None) -> Tensor:
        losses_K, gradient_KH = _over_tiles(head, hidden_KH, targets_K, softcap, gradient=ctx.needs_input_grad[0])
        ctx.dtype = hidden_KH.dtype
        ctx.save_for_backward(gradient_KH)
        return losses_K.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient_KH,) = ctx.saved_tensors
        return (gradient_KH * g).to(ctx.dtype), None, None, None  # times a scaled loss before it is rounded to fp16


def _over_tiles(
    head: QuantLinear, hidden_KH: Tensor, targets_K: Tensor, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each target [K], and with `gradient` d loss / d hidden of each [K, H]; in fp32 or better.

    Over the tiles, `most` is the largest logit so far, `total` the sum of exp(logit − most) and `pull` that of exp(logit − most) times the
    head's row; where `most` grows, both shrink with it.
    """
    kind, count = wide(hidden_KH.dtype), len(targets_K)
    most_K = hidden_KH.new_full((count,), float("-inf"), dtype=kind)
    total_K, own_K = torch.zeros_like(most_K), torch.zeros_like(most_K)
    pull_KH = torch.zeros_like(hidden_KH, dtype=kind) if gradient else None
    for rows, w_CH in head.tiles(None, hidden_KH.dtype):
        for part in _positions(count, len(w_CH), hidden_KH.device.type):
            logits_PC = _logits(hidden_KH[part], head, rows, w_CH, softcap)
            inside_P = (targets_K[part] >= rows.start) & (targets_K[part] < rows.stop)
            at_P = (targets_K[part] - rows.start).clamp(0, len(w_CH) - 1)
            own_K[part] = torch.where(inside_P, logits_PC.gather(1, at_P[:, None])[:, 0], own_K[part])
            before_P = most_K[part].clone()
            most_K[part] = torch.maximum(before_P, logits_PC.amax(1))
            shrunk_P = torch.exp(before_P - most_K[part])
            slope_PC = None if softcap is None or pull_KH is None else _slope(logits_PC, softcap)
            weights_PC = logits_PC.sub_(most_K[part, None]).exp_()
            total_K[part] = total_K[part] * shrunk_P + weights_PC.sum(1)
            if pull_KH is not None:
                weights_PC = weights_PC if slope_PC is None else weights_PC.mul_(slope_PC)
                pull_KH[part] = torch.addcmul((weights_PC.to(w_CH.dtype) @ w_CH).to(kind), pull_KH[part], shrunk_P[:, None])
    losses_K = most_K + total_K.log() - own_K
    if pull_KH is None:
        return losses_K, None
    own_KH = head.decoded(targets_K, None, hidden_KH.dtype).to(kind)
    slope_K = torch.ones_like(own_K) if softcap is None else _slope(own_K, softcap)
    return losses_K, pull_KH.div_(total_K[:, None]).sub_(own_KH.mul_(slope_K[:, None]))


def _logits(hidden_PH: Tensor, head: QuantLinear, rows: slice, w_CH: Tensor, softcap: float | None) -> Tensor:
    """As the dense head has them: rounded to the compute dtype, then in fp32 or better."""
    logits_PC = F.linear(hidden_PH, w_CH, None if head.bias is None else head.bias[rows].to(w_CH.dtype))
    logits_PC = logits_PC.to(wide(logits_PC.dtype))
    return logits_PC if softcap is None else torch.tanh(logits_PC / softcap) * softcap


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """d capped / d logit, from the capped logit."""
    return 1 - (capped / softcap).square()


def _positions(count: int, tile_rows: int, device: str) -> Iterator[slice]:
    """Positions whose logits over one tile fit into LOGIT_BYTES."""
    step = max(1, LOGIT_BYTES[device] // (4 * tile_rows))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
