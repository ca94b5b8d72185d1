"""The norm in few passes is transformers' own, in value and gradient; where it would not be, it is not put in."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from burnish.model.norms import _Normed, speed_up
from tests.tiny import FAMILIES, SIZES

SAME = {"llama": 5, "qwen2": 5, "mistral": 5, "gemma": 0, "gemma2": 0}
"""Norms of two layers and the last one; Gemma multiplies with 1 + w."""


def on_meta(config: transformers.PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_that_compute_the_same_are_swapped_and_others_are_not(family):
    assert len(speed_up(on_meta(FAMILIES[family](**SIZES)))) == SAME[family]


def test_norms_of_queries_and_keys_are_swapped_too():
    names = speed_up(on_meta(transformers.Qwen3Config(**SIZES)))
    assert "model.layers.0.self_attn.q_norm" in names
    assert len(names) == 9


@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_are_those_of_transformers(trained):
    """In float64 without its cast to fp32: 1e-12 leaves room for the order of sums alone."""
    norm = Wide(48, eps=1e-5)
    norm.weight = nn.Parameter(torch.rand(48, dtype=torch.float64), requires_grad=trained)
    x, g = (torch.randn(2, 7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    x.requires_grad_()
    inputs = (x, norm.weight) if trained else (x,)
    own = torch.autograd.grad(norm(x), inputs, g)
    y = _Normed.apply(x, norm.weight, 1e-5)
    torch.testing.assert_close(y, norm(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, g), own, rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_wider_than_its_input_is_left_to_transformers():
    norm, other = LlamaRMSNorm(32), LlamaRMSNorm(32)
    speed_up(nn.ModuleList([norm]))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm(x), other(x))
    assert type(norm(x.float()).grad_fn).__name__ == "_NormedBackward"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_it_rounds_once_and_keeps_its_input_and_a_number_for_each_row(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5).requires_grad_(False)
    norm.weight.copy_(torch.rand(64, generator=generator) + 0.5)
    norm.to(dtype)
    x, g = (torch.randn(9, 64, generator=generator).to(dtype) for _ in range(2))
    wide, w = x.double().requires_grad_(), norm.weight.double()
    exact = w * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    (exact_dx,) = torch.autograd.grad(exact, wide, g.double())
    own = norm(x)
    speed_up(nn.ModuleList([norm]))
    x.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = norm(x)
    (dx,) = torch.autograd.grad(y, x, g)
    half = torch.finfo(dtype).eps / 2
    assert ((y.double() - exact).abs() <= 1.001 * half * exact.abs() + 1e-9).all()
    assert (y.double() - exact).norm() < (own.double() - exact).norm(), "transformers rounds twice"
    assert (dx.double() - exact_dx).norm() <= half * exact_dx.norm()
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert sorted(tensor.numel() for tensor in kept) == [9, 64, 9 * 64]
    assert sum(tensor.numel() * tensor.itemsize for tensor in kept) == 9 * 4 + (64 + 9 * 64) * 2


def test_a_norm_of_another_kind_keeps_its_forward_pass():
    norm = GemmaRMSNorm(16)
    norm.variance_epsilon = norm.eps
    assert speed_up(nn.ModuleList([norm])) == []


class Wide(LlamaRMSNorm):
    """transformers' norm as it is written, but for its cast to fp32."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))
