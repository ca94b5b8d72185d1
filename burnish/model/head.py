"""The output head and its loss, on supervised positions alone.

Axes: K supervised positions, H hidden width, V vocabulary.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from burnish.model.linear import products, wide

# Logits that may exist at once; more are computed in chunks of positions. Below the 32 MiB from which glibc gives every tensor fresh pages
# (measured on two cores, 511 positions of 49152 tokens: 300 ms whole, 238 in chunks of 25 MiB, 297 in chunks of 13).
LOGIT_BYTES = {"cpu": 25 << 20, "cuda": 256 << 20}


def token_losses(head: nn.Linear, hidden_KH: Tensor, targets_K: Tensor, softcap: float | None = None) -> Tensor:
    """The negative log-likelihood of each target [K], in fp32 or better, without gradients. For evaluation."""
    kind, as_said = products(hidden_KH, hidden_KH.dtype)
    with torch.no_grad(), as_said:
        hidden_KH = hidden_KH.to(kind)
        parts = [
            F.cross_entropy(_logits(hidden, head, softcap), targets, reduction="none")
            for hidden, targets in zip(hidden_KH.split(chunk(head)), targets_K.split(chunk(head)), strict=True)
        ]
        return torch.cat(parts) if parts else hidden_KH.new_zeros(0)


def head_loss(head: nn.Linear, hidden_KH: Tensor, targets_K: Tensor, softcap: float | None = None) -> Tensor:
    """The sum of the targets' negative log-likelihoods, differentiable, its value right to fp32.

    torch sums a bf16 loss in bf16, which can be wrong by half (its gradient is right), so the value is then computed apart.
    """
    kind, as_said = products(hidden_KH, hidden_KH.dtype)
    with as_said:
        return _head_loss(head, hidden_KH.to(kind), targets_K, softcap)


def _head_loss(head: nn.Linear, hidden_KH: Tensor, targets_K: Tensor, softcap: float | None) -> Tensor:
    if not len(targets_K):
        # of nothing: 0, with a gradient of zeros, for the head too, so that every rank runs the same backward pass
        return _logits(hidden_KH, head, softcap).sum()
    if softcap is not None or hidden_KH.dtype == torch.float16:  # a sum of losses soon exceeds fp16's 65504
        return _wide_loss(hidden_KH, head, targets_K, softcap)
    # None is torch's plain path, the whole [K, V] at once; without an explicit chunk torch's own choice is far slower on a CPU
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk(head), chunking_method=None) if len(targets_K) > chunk(head) else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its fall-back to the unchunked path is only a warning, and would run out of memory later
        weight, bias = _weights(head, hidden_KH.dtype)
        loss = F.linear_cross_entropy(hidden_KH, weight, targets_K, linear_bias=bias, reduction="sum", options=options)
    if loss.dtype in (torch.float32, torch.float64):
        return loss
    exact = token_losses(head, hidden_KH.detach(), targets_K).sum()
    return exact + (loss - loss.detach()).float()


def chunk(head: nn.Linear) -> int:
    """Positions whose fp32 logits fit into LOGIT_BYTES."""
    return max(1, LOGIT_BYTES[head.weight.device.type] // (4 * head.out_features))


def _logits(hidden_KH: Tensor, head: nn.Linear, softcap: float | None) -> Tensor:
    logits_KV = F.linear(hidden_KH, *_weights(head, hidden_KH.dtype))
    logits_KV = logits_KV.to(wide(logits_KV.dtype))
    return logits_KV if softcap is None else torch.tanh(logits_KV / softcap) * softcap


def _wide_loss(hidden_KH: Tensor, head: nn.Linear, targets_K: Tensor, softcap: float | None) -> Tensor:
    """In fp32 from the logits on, where no fused loss is (Gemma 2's capped logits, fp16): chunks, recomputed in the backward pass."""

    def share(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_logits(hidden, head, softcap), targets, reduction="sum")

    pieces = zip(hidden_KH.split(chunk(head)), targets_K.split(chunk(head)), strict=True)
    return torch.stack([checkpoint(share, hidden, targets, use_reentrant=False) for hidden, targets in pieces]).sum()


def _weights(head: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias in the compute dtype: where they are trained, they are held in fp32."""
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
