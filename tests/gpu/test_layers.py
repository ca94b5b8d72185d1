"""One layer on a GPU is the layer on a CPU: its bytes, what they decode to, products, adapters and the head."""

import pytest
import torch

from burnish import kernels
from burnish.adapt.adapter import Adapter, plain_forward
from burnish.model.ends import frozen_loss
from burnish.model.formats import FORMATS
from burnish.model.head import head_loss, token_losses
from tests.layers import a_linear, an_adapter, dense, has_half_scales, inputs, relative, results
from tests.model.test_formats import rows_of
from tests.model.test_head import DTYPES, VALUE, a_head, reference

EVERY = pytest.mark.parametrize("name", FORMATS)
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""What a product's result may differ by from one that is summed in another order, or rounded at the end."""


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_decode_to_the_same_values_as_on_a_cpu(name, dtype):
    """What was trained on a GPU is served from a CPU, and the other way round."""
    form, rows = FORMATS[name], rows_of(0)
    tensors = form.quantize(rows, 64, dtype)
    here, there = form.dequantize(tensors, 64, dtype), form.dequantize(on_gpu(tensors), 64, dtype).cpu()
    assert torch.equal(here, there)
    folded = form.fold(tensors, torch.linspace(0.5, 2, len(rows)))
    on_card = form.fold(on_gpu(tensors), torch.linspace(0.5, 2, len(rows)).cuda())
    assert torch.equal(form.dequantize(folded, 64, dtype), form.dequantize(on_card, 64, dtype).cpu())


@EVERY
def test_a_gpu_quantizes_as_a_cpu_does(name):
    """Bit for bit in our own arithmetic; bitsandbytes' two kernels differ in the code of 0 in a block of zeros, and near the middle between
    two codes of fp4."""
    form, rows = FORMATS[name], rows_of(1, 256, 1024)
    here, there = form.quantize(rows, 64, torch.float32), form.quantize(rows.cuda(), 64, torch.float32)
    for part, right in here.items():
        if part == "packed" and name.startswith(("nf4", "fp4")):
            there[part] = there[part].cpu()
            values, others = (form.dequantize(dict(here) | {part: codes}, 64, torch.float32) for codes in (right, there[part]))
            assert (values != others).double().mean() <= (1e-2 if name.startswith("fp4") else 0)
            errors = [(decoded - rows).square().sum().item() for decoded in (values, others)]
            assert errors[1] == pytest.approx(errors[0], rel=1e-4)
        else:
            assert torch.equal(there[part].cpu(), right), part


@EVERY
def test_quantizing_some_rows_on_a_gpu_gives_those_rows_of_the_whole(name):
    form, rows = FORMATS[name], rows_of(2, 301, 1024).cuda()
    whole = form.quantize(rows, 64, torch.float32)
    for a, b in ((0, 1), (7, 190), (300, 301), (5, 5)):
        part = form.quantize(rows[a:b], 64, torch.float32)
        assert all(torch.equal(whole[tensor][a:b], part[tensor]) for tensor in whole)


@EVERY
@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_a_layers_product_and_gradient_are_those_of_its_dense_matrix(name, dtype):
    layer = a_linear(name, dtype, width=256, out=320, bias=True).cuda()
    w = dense(layer).double()
    x, g = inputs(dtype, 3, 50, 256).cuda().requires_grad_(), inputs(dtype, 3, 50, 320, seed=4).cuda()
    y = layer(x)
    assert relative(y, x.double() @ w.T + layer.bias.double()) < ROUNDED[dtype]
    assert relative(torch.autograd.grad(y, x, g)[0], g.double() @ w) < ROUNDED[dtype]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["none", "nf4", "int4", "hqq4", "q4_1", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapters_output_and_gradients_are_those_of_the_plain_one(method, name, dtype):
    def made() -> Adapter:
        return an_adapter(a_linear(name, dtype, width=256, out=320, bias=True), method)

    card, plain = made().cuda(), made().double()
    plain.base.dtype = torch.float64
    x, g = inputs(dtype, 150, 256), inputs(dtype, 150, 320, seed=4)
    found = results(card, card, x.cuda(), g.cuda())
    right = results(plain, lambda x: plain_forward(plain, x), x.double(), g.double())
    rounded = 1e-3 if method == "dora" and has_half_scales(name) else ROUNDED[dtype]  # the gain goes into a scale of 16 bits
    for part, value in right.items():
        assert relative(found[part].cpu(), value) < 3 * max(rounded, ROUNDED[dtype]), part


def test_the_kernels_are_used_here():
    """Else every test in this folder would hold torch's own operations to themselves."""
    assert kernels.usable(torch.empty(1, device="cuda")), "Triton's kernels do not run on this machine"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(700, 300), (1, 128), (512, 129), (513, 1), (3000, 4096)], ids=str)
def test_sums_over_rows_are_those_of_float64(shape, dtype):
    a, b = inputs(dtype, *shape).cuda(), inputs(dtype, *shape, seed=4).cuda()
    for one, other in ((a, b), (a[:, ::2], b[:, ::2]), (a.T.contiguous().T, b)):
        assert relative(kernels.column_dots(one, other), (one.double() * other.double()).sum(0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_of_dora_is_that_of_the_built_matrix_to_a_hundred_thousandth(dtype):
    """Of W as the layer's dtype has it; in 16 bits A goes in as two parts."""
    adapter = an_adapter(a_linear("nf4", dtype, width=1024, out=512), "dora").cuda()
    adapter.refresh()
    built = dense(adapter.base).double() + adapter.scaling * adapter.b.double() @ adapter.a.double()
    assert relative(adapter.d, adapter.m.double() / built.norm(dim=1)) < 1e-5


@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_the_heads_loss_is_right_to_fp32_in_every_dtype(dtype, cap):
    hidden, head, targets = a_head(dtype, count=512)
    value, gradient = reference(hidden, head, targets, cap)
    card = hidden.detach().cuda().requires_grad_()
    head, targets = head.cuda(), targets.cuda()
    loss = head_loss(head, card, targets, cap)
    # the reference rounds its logits on a CPU, which sums them in another order
    assert loss.item() == pytest.approx(value.item(), rel=max(VALUE.get(dtype, 1e-5), 1e-12) * 10)
    (found,) = torch.autograd.grad(loss, card)
    assert relative(found.cpu(), gradient) < {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    assert token_losses(head, card, targets, cap).sum().item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["nf4", "int8", "q8_0"])
def test_a_quantized_heads_loss_is_that_of_its_dense_matrix(name):
    hidden, _, _ = a_head(torch.bfloat16)
    head = a_linear(name, torch.bfloat16, width=hidden.shape[1] * 8, out=200).cuda()
    hidden, targets = inputs(torch.bfloat16, 60, head.in_features).cuda().requires_grad_(), torch.arange(60).cuda()
    loss = frozen_loss(head, hidden, targets, None)
    logits = hidden.detach().double() @ dense(head).double().T
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-3)
