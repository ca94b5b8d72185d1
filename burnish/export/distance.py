"""How far the model that was written answers from the live one, on given token ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from burnish.parallel.world import any_rank, launched_rank
from burnish.skeleton import Built

MOST_TOKENS = 256
"""Of one prompt: the logits of a position are a vocabulary wide, twice."""


def measure(built: Built, written: Path | None, weight_bytes: int, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Opens the written model as a reader would, on the main rank's CPU in its own dtype, and compares log-probabilities.

    `max` and `mean` |Δ log-probability| in nats over the whole vocabulary and all positions, and at how many `positions` both would choose
    the `same` next token; {"not_measured": why} where there are no prompts or the host has no room. Every rank must call it, and has {}
    for it unless it is the main one.
    """
    prompts = [list(prompt[:MOST_TOKENS]) for prompt in prompts if len(prompt)]
    if not prompts:
        return {"not_measured": "no prompts were given"}
    available = psutil.virtual_memory().available
    device = next(built.model.parameters()).device
    if any_rank(launched_rank() == 0 and available < 1.2 * weight_bytes, device):
        return {"not_measured": f"the written model takes {weight_bytes / 1e9:.1f} GB of host memory and {available / 1e9:.1f} GB are free"}
    own_code = getattr(built.model.config, "auto_map", None) is not None  # it runs in this process already
    theirs = None if written is None else _opened(written, own_code)
    built.model.eval()
    parts = [_compare(log_probabilities(built.model, prompt), theirs, prompt) for prompt in prompts]
    if theirs is None:
        return {}
    count, positions = sum(part["count"] for part in parts), sum(part["positions"] for part in parts)
    mean = sum(part["sum"] for part in parts) / count
    return {"max": max(part["max"] for part in parts), "mean": mean, "same": sum(part["same"] for part in parts), "positions": positions}


def _opened(folder: Path, run_model_code: bool) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, trust_remote_code=run_model_code).eval()


def log_probabilities(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """[T, V] on the CPU, in fp32 or better, of the token after each of `ids`."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        return torch.log_softmax(logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), dim=1).cpu()


def _compare(live_TV: Tensor, theirs: PreTrainedModel | None, prompt: list[int]) -> dict[str, Any]:
    if theirs is None:
        return {}
    written_TV = log_probabilities(theirs, prompt)
    # tokens that both hold for impossible (-inf) are alike
    apart = torch.where(live_TV == written_TV, 0, (live_TV - written_TV).abs())
    same = (live_TV.argmax(1) == written_TV.argmax(1)).sum().item()
    return {"max": apart.max().item(), "sum": apart.double().sum().item(), "count": apart.numel(), "same": same, "positions": len(prompt)}


def in_words(measured: dict[str, Any]) -> str:
    """One line for a person."""
    if "not_measured" in measured:
        return f"not compared with the live model: {measured['not_measured']}"
    return (
        f"log-probabilities differ from the live model's by {measured['mean']:.2g} nats on average, {measured['max']:.2g} at most; "
        f"the same next token at {measured['same']} of {measured['positions']} positions"
    )
