"""The quantized layer is `F.linear` on its decoded matrix, however it is cut into tiles."""

import pytest
import torch
from torch.nn import functional as F

from burnish.model import linear
from burnish.model.formats import FORMATS
from tests.layers import a_linear, dense, fold_rounding, has_half_scales, inputs

# fp32: sums of 128 products in another order. float64: the same, so that a wrong term cannot hide behind rounding.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
EVERY = pytest.mark.parametrize("name", FORMATS)
BOTH = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


@EVERY
@BOTH
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3), ()], ids=str)
def test_output_and_gradient_equal_a_dense_layer(name, bias, dtype, shape):
    layer = a_linear(name, dtype, bias=bias)
    x, g = inputs(dtype, *shape, 128).requires_grad_(), inputs(dtype, *shape, 48, seed=4)
    reference = x.detach().clone().requires_grad_()
    y, expected = layer(x), F.linear(reference, dense(layer), layer.bias)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(y, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    torch.testing.assert_close(x.grad, reference.grad, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@EVERY
@BOTH
@pytest.mark.parametrize("rows", [1, 7, 47])
def test_tiles_of_any_height_equal_one_tile(name, bias, rows, monkeypatch):
    layer, x, g = a_linear(name, torch.float64, bias=bias), inputs(torch.float64, 6, 128).requires_grad_(), inputs(torch.float64, 6, 48)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, g)
    monkeypatch.setitem(linear.TILE_BYTES, "cpu", rows * 128 * 8)
    assert len(list(layer.tiles())) == -(-48 // rows)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(layer(x), x, g)[0], dx, rtol=1e-12, atol=1e-12)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tiles_with_a_gain_are_those_of_the_folded_matrix(name, dtype, monkeypatch):
    layer = a_linear(name, dtype)
    gain = torch.rand(48, generator=torch.Generator().manual_seed(1), dtype=linear.wide(dtype)) + 0.5
    whole = torch.cat([tile.clone() for _, tile in layer.tiles(gain)])
    monkeypatch.setitem(linear.TILE_BYTES, "cpu", 5 * 128 * dtype.itemsize)
    assert torch.equal(torch.cat([tile.clone() for _, tile in layer.tiles(gain)]), whole)
    # bf16: W, then d ⊙ W, each rounded to 8 bits, against W rounded once
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float64: 1e-15}[dtype]
    exact = dense(layer).double() * gain.double()[:, None]
    folded = fold_rounding(name, exact) if dtype != torch.float64 and has_half_scales(name) else 0
    assert ((whole.double() - exact).abs() <= exact.abs() * tolerance + folded).all()


@EVERY
@BOTH
def test_gradcheck_passes_in_float64(name, bias):
    layer = a_linear(name, torch.float64, width=64, out=6, bias=bias)
    assert torch.autograd.gradcheck(layer, (inputs(torch.float64, 3, 64).requires_grad_(),))


@EVERY
@BOTH
def test_an_input_without_gradient_gives_an_output_without_one(name, bias):
    layer = a_linear(name, bias=bias)
    y = layer(inputs(torch.float32, 2, 128))
    assert not y.requires_grad
    torch.testing.assert_close(y, F.linear(inputs(torch.float32, 2, 128), dense(layer), layer.bias), rtol=1e-5, atol=1e-5)


@EVERY
def test_strided_inputs_and_gradients_are_read_as_their_values(name):
    layer = a_linear(name, torch.float64)
    wide_x, wide_g = inputs(torch.float64, 128, 2, 5), inputs(torch.float64, 48, 2, 5)
    x, g = wide_x.permute(2, 1, 0).requires_grad_(), wide_g.permute(2, 1, 0)
    assert not x.is_contiguous()
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, dense(layer)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], g @ dense(layer), rtol=1e-12, atol=1e-12)


@EVERY
def test_no_tokens_give_no_rows(name):
    layer, x = a_linear(name), torch.zeros(1, 0, 128, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (1, 0, 48)
    assert x.grad is not None
    assert x.grad.shape == x.shape


@EVERY
def test_nothing_of_the_layer_is_trained_or_kept_for_the_backward_pass(name):
    layer = a_linear(name, bias=True)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(inputs(torch.float32, 4, 128).requires_grad_())
    assert kept == []
