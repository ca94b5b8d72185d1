"""Attention over packed samples, one sample at a time.

transformers' own mask for packed rows makes the kernel do the full square of the row (2.6 times a batch's cost at 8 × 256 tokens), and with
its cache on, or with a mask of ones, it lets samples see each other without a word.
Here a sample never meets another: each is its own call.

Axes: B batch (always 1), N heads, T position, D head width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

SEGMENTS = "burnish_segments"


def attend_in_segments(
    module: nn.Module,
    query_BNTD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[int] = (),
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of the samples that `segments` (0, …, T) bounds → [B, T, N, D], None."""
    # split, not sliced: the gradient of a slice is a whole tensor of zeros, filled and added up for each sample anew
    lengths = [b - a for a, b in pairwise(segments)]
    samples = zip(*(states.split(lengths, dim=2) for states in (query_BNTD, key_BNTD, value_BNTD)), strict=True)
    outputs = [_attend(q, k, v, scaling, dropout, sliding_window, softcap) for q, k, v in samples]
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return whole.transpose(1, 2).contiguous(), None


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float | None) -> Tensor:
    grouped = q.shape[1] > k.shape[1]
    length = q.shape[2]
    if softcap is None and (window is None or length <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
    position = torch.arange(length, device=q.device)
    seen = position[:, None] >= position[None, :]
    if window is not None:
        seen &= position[:, None] - position[None, :] < window
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, dropout_p=dropout, enable_gqa=grouped)
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~seen, float("-inf"))
    return F.dropout(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), dropout) @ v


def register() -> None:
    """Makes `SEGMENTS` known to transformers; it builds no mask."""
    AttentionInterface.register(SEGMENTS, attend_in_segments)
    AttentionMaskInterface.register(SEGMENTS, lambda *_, **__: None)
