"""transformers' network on meta, what we find in it, and the one forward pass that training and evaluation share."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from burnish.errors import UserError
from burnish.model.attention import SEGMENTS, register
from burnish.model.ends import are_tied, frozen_loss, frozen_losses
from burnish.model.head import head_loss, token_losses
from burnish.model.linear import QuantLinear
from burnish.model.norms import speed_up

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CALLER = "_gradient_checkpointing_func"
_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower")

_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_FACTORS: dict[str, Callable[[Any], float]] = {
    "cohere": lambda config: config.logit_scale,
    "cohere2": lambda config: config.logit_scale,
    "granite": lambda config: 1 / config.logits_scaling,
    "granite_swa": lambda config: 1 / config.logits_scaling,
    "hyperclovax": lambda config: config.logits_scaling,
}
"""What transformers multiplies the logits with, by model type; for others, 1. Our own head is in `head.py`, and must do the same."""


def refuse_unsupported(config: PretrainedConfig, asked: str) -> None:
    """Mixture-of-experts, multimodal and encoder-decoder models are refused by name, before anything is downloaded."""
    experts = next((name for name in _EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts:
        raise UserError(
            f"{asked} ({config.model_type}) is a mixture of experts ({experts} = {getattr(config, experts)}); burnish trains dense models."
        )
    if any(getattr(config, name, None) is not None for name in _OTHER_SENSES):
        raise UserError(f"{asked} ({config.model_type}) is a multimodal model; burnish trains text-only decoders.")
    if config.is_encoder_decoder:
        raise UserError(f"{asked} ({config.model_type}) is an encoder-decoder model; burnish trains decoder-only models.")
    scale = next((name for name in _SCALES if getattr(config, name, None) not in (None, 1)), None)
    if scale and config.model_type not in LOGIT_FACTORS:
        raise UserError(
            f"{asked} ({config.model_type}) scales its logits ({scale} = {getattr(config, scale)}) in a way that burnish does not know."
        )


def build(config: PretrainedConfig, dtype: torch.dtype, run_model_code: bool = False) -> PreTrainedModel:
    """The network on meta, frozen, in eval mode: shapes only, no bytes."""
    register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=run_model_code)
    model.requires_grad_(False)
    speed_up(model)
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers."""
    depth = model.config.num_hidden_layers
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise UserError(
            f"{model.config.model_type} is not a plain stack of decoder layers ({len(lists)} lists of {depth} layers found): not supported."
        )
    return lists[0]


def context_of(config: PretrainedConfig) -> int:
    """Tokens that the model can read; without a limit where its config names none."""
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def layers_name(model: PreTrainedModel) -> str:
    """The name of the list of decoder layers, `model.layers` in most models."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


def check_share(layers: nn.ModuleList, swapped: dict[str, Any]) -> None:
    """At least 95 % of the decoder's matrices must be in swapped layers: else an architecture hides them from us (fused experts, say)."""
    inside = sum(module.in_features * module.out_features for module in swapped.values())
    prefixes = tuple(name + "." for name in swapped)
    outside = sum(p.numel() for name, p in layers.named_parameters() if p.dim() > 1 and not name.startswith(prefixes))
    if inside < 0.95 * (inside + outside):
        raise UserError(
            f"only {inside / (inside + outside):.0%} of the decoder's weights are in linear layers: this architecture is not supported."
        )


def renew_buffers(model: PreTrainedModel) -> None:
    """Computes the buffers that no file holds (rotary frequencies, embedding scales): `to_empty` leaves garbage in them without an error.

    By transformers' own initialization of the module; a parameter that is marked as initialized is not touched by it.
    A buffer that files do hold is refused: only parameters have places.
    """
    for name, module in model.named_modules():
        buffers = {part: buffer for part, buffer in module._buffers.items() if buffer is not None}
        stored = sorted(buffers.keys() - module._non_persistent_buffers_set)
        if stored:
            raise UserError(f"{name} keeps {', '.join(stored)} in its files as a buffer, which is no parameter: not supported.")
        if not buffers:
            continue
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        for buffer in buffers.values():
            buffer.fill_(_unset(buffer))
        with torch.no_grad():
            model._init_weights(module)
        lost = [part for part, buffer in buffers.items() if _is_unset(buffer)]
        if lost:
            raise UserError(f"{name} keeps {', '.join(lost)} out of its files, and transformers cannot compute it again: not supported.")


def _unset(buffer: Tensor) -> float | int:
    return float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min


def _is_unset(buffer: Tensor) -> bool:
    return bool((buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer)).any())


# --- the forward pass


def hidden_states(model: PreTrainedModel, batch: Any) -> Tensor:
    """What the head takes of each position whose next token is supervised [K, H]; the head is computed nowhere else."""
    output = model.base_model(
        input_ids=batch.ids, position_ids=batch.positions, use_cache=False, segments=batch.segments
    )  # no mask and no cache: see attention.py
    hidden_KH = output.last_hidden_state[0].index_select(0, batch.source)
    factor = LOGIT_FACTORS.get(model.config.model_type, lambda _: 1.0)(model.config)
    return hidden_KH if factor == 1 else hidden_KH * factor  # the head is linear and none of these has a bias on it


def loss_of(self: PreTrainedModel, batch: Any) -> Tensor:
    """The summed loss of one micro-batch (a `burnish.data.batches.Batch`), in fp32 or better. Bound to the model as `loss_of`."""
    return head_of(self).loss(hidden_states(self, batch), batch.targets, softcap(self))  # pyright: ignore[reportCallIssue]


def losses_of(self: PreTrainedModel, batch: Any) -> Tensor:
    """The loss of each supervised token [K] of one micro-batch, without gradients. Bound to the model as `losses_of`."""
    with torch.no_grad():
        return head_of(self).losses(hidden_states(self, batch), batch.targets, softcap(self))  # pyright: ignore[reportCallIssue]


def head_of(model: PreTrainedModel) -> nn.Module:
    """The output head, of a kind that `HEADS` has."""
    head = model.get_output_embeddings()
    assert head is not None
    return head


def softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config, "final_logit_softcapping", None)


FORWARD_METHODS = ("loss_of", "losses_of", "generate")
"""Methods of the model that FSDP2 must gather the root's parameters for, as it does for `forward`."""
HEAD_METHODS = ("loss", "losses")
"""The same of the head."""
HEADS: dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Linear: (head_loss, token_losses),
    QuantLinear: (frozen_loss, frozen_losses),
}
"""What `HEAD_METHODS` are, by how the head is held."""


def bind(model: PreTrainedModel, autocast: str = "none") -> None:
    """Gives the model its `loss_of` and `losses_of`, and its head `loss` and `losses`, so that sharding can hook them.

    Unless `autocast` is `none`, these and the model's own forward pass run under `torch.autocast` of that dtype.
    """
    for method in (loss_of, losses_of):
        object.__setattr__(model, method.__name__, _autocast(types.MethodType(method, model), model, autocast))
    if autocast != "none":
        model.forward = _autocast(model.forward, model, autocast)
    head = head_of(model)
    for name, function in zip(HEAD_METHODS, HEADS[type(head)], strict=True):
        object.__setattr__(head, name, types.MethodType(function, head))


def _autocast(method: Callable[..., Any], model: nn.Module, dtype: str) -> Callable[..., Any]:
    if dtype == "none":
        return method

    @wraps(method)
    def under(*arguments: Any, **named: Any) -> Any:
        # rounded weights are not kept from one use to the next: those of trained weights would be, whole, until the pass ends
        with torch.autocast(next(model.parameters()).device.type, DTYPES[dtype], cache_enabled=False):
            return method(*arguments, **named)

    return under


def apart(model: PreTrainedModel) -> dict[nn.Module, tuple[str, ...]]:
    """Embeddings and head where they are two matrices, each with its methods beside `forward`.

    Each is needed for a moment only, and in a large vocabulary takes GBs. Tied, they are one matrix that is needed at both ends.
    """
    embeddings, head = model.get_input_embeddings(), head_of(model)
    assert isinstance(embeddings, nn.Module)
    return {} if are_tied(model) else {embeddings: (), head: HEAD_METHODS}


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Attention by segments inside the block; transformers' own outside it (generation has a cache and a padding mask)."""
    before = model.config._attn_implementation
    assert before is not None
    model.set_attn_implementation(SEGMENTS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def checkpoint_layers(model: PreTrainedModel, every: int = 1, offload: bool = False) -> None:
    """Recompute the first of `every` so many decoder layers in the backward pass; the others keep their activations.

    With `offload`, what is kept of a recomputed layer, its input, waits in host memory. Does nothing in eval mode.
    """
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    if offload:
        for layer in decoder_layers(model):
            # what transformers calls a layer with in training
            setattr(layer, _CALLER, partial(_offloaded, getattr(layer, _CALLER)))


def _offloaded(recomputed: Callable[..., Any], *arguments: Any) -> Any:
    """Only what is saved at the layer's door is moved: inside, checkpointing has its own say over what is saved, which is nothing."""
    with saved_tensors_hooks(to_host, from_host):
        return recomputed(*arguments)


def to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """A copy in host memory, pinned where the tensor is on a GPU, so that the copy runs beside what comes next."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    """A copy of it on the device. (On a CPU too, so that what is tested there is what runs.)"""
    device, host = kept
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)
