"""Weights that are quantized already, as config.json's `quantization_config` tells: what is read, and what is refused by name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from burnish.errors import UserError

ORIGINAL = "Give the original weights: burnish quantizes them itself"


def _bitsandbytes(said: Mapping[str, Any]) -> str | None:
    if said.get("load_in_8bit") or not said.get("load_in_4bit"):
        return "bitsandbytes in 8 bits (LLM.int8)"
    return None


def _compressed_tensors(said: Mapping[str, Any]) -> str | None:
    form = said.get("format")
    if form != "pack-quantized":
        return f"compressed-tensors {form}"
    for name, group in said.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        if group.get("input_activations"):
            return f"compressed-tensors with quantized activations, {name}"
        if weights.get("type") != "int" or weights.get("num_bits") not in (4, 8) or weights.get("strategy") not in ("group", "channel"):
            return f"compressed-tensors, {name}: {weights.get('type')}{weights.get('num_bits')} by {weights.get('strategy')}"
    bits = {group["weights"]["num_bits"] for group in said.get("config_groups", {}).values()}
    return None if len(bits) == 1 else f"compressed-tensors with weights of {sorted(bits)} bits"


READ: Mapping[str, Callable[[Mapping[str, Any]], str | None]] = MappingProxyType(
    {"bitsandbytes": _bitsandbytes, "compressed-tensors": _compressed_tensors}
)
"""Methods (`quant_method`) that have a reader in `weights.READERS`. Each says what of it is not read, or None."""


def check_quantized(path: Path, said: Any) -> None:
    """Raises a `UserError` that names the method and the way out, unless the weights can be read."""
    method = said.get("quant_method") if isinstance(said, dict) else None
    unread = READ[method](said) if method is not None and method in READ else method
    if unread is not None or method is None:
        raise UserError(
            f"{path}: the weights are already quantized ({unread}). {ORIGINAL}. (Read as they are: bitsandbytes in 4 bits, and "
            "compressed-tensors pack-quantized with integers of 4 or 8 bits.)"
        )
