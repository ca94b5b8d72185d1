"""The laws of every row of FORMATS; a new format brings its tests by its row."""

from typing import get_args

import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from burnish.config import ModelConfig, settings_of
from burnish.errors import UserError
from burnish.model.formats import FORMATS
from burnish.model.linear import quantize_linears
from tests.layers import a_linear, fold_rounding, has_half_scales, put

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
EVERY = pytest.mark.parametrize("name", FORMATS)


def rows_of(seed: int, count: int = 24, width: int = 192) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, one with a block of zeros, one with a single huge value."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-4, 2, count)[:, None]
    rows[3] = 0
    rows[5, :64] = 0
    rows[7, 100] = 1e4
    return rows


@EVERY
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 9), cut=st.tuples(st.integers(0, 24), st.integers(0, 24)).map(sorted), dtype=st.sampled_from(DTYPES))
def test_quantizing_some_rows_gives_those_rows_of_the_whole_bit_for_bit(name, seed, cut, dtype):
    form, (a, b), rows = FORMATS[name], cut, rows_of(seed)
    whole = form.quantize(rows, 64, dtype)
    part = form.quantize(rows[a:b], 64, dtype)
    for tensor in whole:
        assert torch.equal(whole[tensor][a:b], part[tensor]), tensor
    some = {tensor: whole[tensor][a:b] for tensor in whole}
    assert torch.equal(form.dequantize(whole, 64, dtype)[a:b], form.dequantize(some, 64, dtype))


@EVERY
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 9),
    cut=st.tuples(st.integers(0, 47), st.integers(1, 48)).filter(lambda ab: ab[0] < ab[1]),
    dtype=st.sampled_from(DTYPES),
)
def test_what_a_layer_keeps_of_some_rows_is_that_of_the_whole_norms_too(name, seed, cut, dtype):
    layer, (a, b) = a_linear(name, dtype, width=1024), cut
    rows = rows_of(seed, 48, 1024)
    whole, part = layer.encode(rows), layer.encode(rows[a:b])
    for tensor in whole:
        assert torch.equal(whole[tensor][a:b], part[tensor]), tensor


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_tensors_have_the_declared_names_shapes_and_dtypes(name, dtype, count):
    form = FORMATS[name]
    made = form.quantize(rows_of(0)[:count], 64, dtype)
    assert {tensor: (tuple(value.shape), value.dtype) for tensor, value in made.items()} == form.shapes(count, 192, 64, dtype)
    decoded = form.dequantize(made, 64, dtype)
    assert decoded.shape == (count, 192)
    assert decoded.dtype == dtype


@EVERY
def test_every_tensor_has_a_row_for_each_row_of_the_matrix(name):
    assert all(shape[0] == 11 for shape, _ in FORMATS[name].shapes(11, 192, 64, torch.float32).values())


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_and_zero_blocks_decode_to_zeros(name, dtype):
    form = FORMATS[name]
    decoded = form.dequantize(form.quantize(rows_of(0), 64, dtype), 64, dtype)
    assert not decoded[3].any()
    assert not decoded[5, :64].any()
    assert decoded[5, 64:].any()
    assert decoded.isfinite().all()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_weights_quantize_as_their_fp32_values_do(name, dtype):
    rows = rows_of(0).bfloat16()
    narrow, upcast = FORMATS[name].quantize(rows, 64, dtype), FORMATS[name].quantize(rows.float(), 64, dtype)
    assert all(torch.equal(narrow[tensor], upcast[tensor]) for tensor in upcast)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_changes_neither_its_input_nor_its_memory(name, dtype):
    rows = rows_of(0)
    before = rows.clone()
    FORMATS[name].dequantize(FORMATS[name].quantize(rows, 64, dtype), 64, dtype)
    assert torch.equal(rows, before)


@EVERY
def test_fold_gives_d_times_w_and_changes_no_code(name):
    form, rows = FORMATS[name], rows_of(0)
    d = torch.rand(len(rows), generator=torch.Generator().manual_seed(1)) * 3 - 1  # negative gains too
    d[2] = 0
    tensors = form.quantize(rows, 64, torch.float32)
    folded = form.fold(tensors, d)
    for tensor, value in tensors.items():
        if not value.dtype.is_floating_point or tensor == "zero":
            assert torch.equal(folded[tensor], value)
        assert folded[tensor].dtype == value.dtype
    expected = form.dequantize(tensors, 64, torch.float32) * d[:, None]
    assert ((form.dequantize(folded, 64, torch.float32) - expected).abs() <= fold_rounding(name, expected)).all()


@EVERY
def test_fold_by_ones_changes_no_bit(name):
    tensors = FORMATS[name].quantize(rows_of(0), 64, torch.float32)
    folded = FORMATS[name].fold(tensors, torch.ones(24))
    assert all(torch.equal(folded[tensor], tensors[tensor]) for tensor in tensors)


@EVERY
@pytest.mark.parametrize(("width", "block"), [(32, 32), (96, 32), (64, 64), (320, 64), (128, 128)])
def test_widths_of_one_block_and_of_an_odd_number_of_blocks_are_held(name, width, block):
    form, rows = FORMATS[name], torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    made = form.quantize(rows, block, torch.float32)
    assert {tensor: (tuple(value.shape), value.dtype) for tensor, value in made.items()} == form.shapes(3, width, block, torch.float32)
    # one bit holds a normal weight to 0.6 of its size (a sign alone), four and more to a tenth or so
    assert (form.dequantize(made, block, torch.float32) - rows).norm() < 0.65 * rows.norm()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_value_are_held_to_a_rounding(name, dtype):
    half = has_half_scales(name)  # which end at 65504, and hold 11 bits
    form, values = FORMATS[name], torch.tensor([1.0, -1.0, 0.3, -0.7, *((1e-2, -3e2, 1e3, 5e-3) if half else (1e-20, -3e20, 1e30, 5e-36))])
    rows = values[:, None].expand(8, 128).contiguous()
    found = form.dequantize(form.quantize(rows, 64, dtype), 64, dtype).double()
    torch.testing.assert_close(found, rows.double(), rtol=2**-8 if dtype == torch.bfloat16 else 2**-10 if half else 1e-6, atol=0)


@EVERY
@pytest.mark.parametrize("outlier", [100.0, -100.0])
def test_one_outlier_is_held_and_spoils_no_other_block(name, outlier):
    form, rows = FORMATS[name], torch.randn(4, 192, generator=torch.Generator().manual_seed(3)) * 0.1
    without = form.dequantize(form.quantize(rows, 64, torch.float32), 64, torch.float32)
    rows[1, 100] = outlier
    found = form.dequantize(form.quantize(rows, 64, torch.float32), 64, torch.float32)
    assert found[1, 100] == pytest.approx(outlier, rel=0.1)
    assert torch.equal(found[[0, 2, 3]], without[[0, 2, 3]])
    others = torch.cat([found[1, :64] - without[1, :64], found[1, 128:] - without[1, 128:]]).abs().max()
    assert others == 0 or name.endswith(("_double", "_row"))  # whose scales share the row's bounds, or are one for a row


@EVERY
@pytest.mark.parametrize("power", [100, -100])
def test_codes_do_not_depend_on_the_size_of_the_weights(name, power):
    """From 1e-31 to 1e30: no square overflows or vanishes on the way."""
    form, rows = FORMATS[name], torch.randn(6, 128, generator=torch.Generator().manual_seed(4))
    small, large = form.quantize(rows, 64, torch.float32), form.quantize(rows * 2.0**power, 64, torch.float32)
    for tensor, value in small.items():
        grows = value.dtype.is_floating_point and tensor != "zero"
        assert torch.equal(large[tensor], value * 2.0**power if grows else value), tensor


@EVERY
@pytest.mark.parametrize("size", [1e-40, 1e-45, 1e38])
def test_denormal_and_very_large_weights_decode_to_finite_ones(name, size):
    largest = 1e4 if has_half_scales(name) else 1e38  # fp16 ends at 65504
    form, rows = FORMATS[name], (torch.rand(6, 128, generator=torch.Generator().manual_seed(4)) * 2 - 1) * min(size, largest)
    found = form.dequantize(form.quantize(rows, 64, torch.float32), 64, torch.float32)
    assert found.isfinite().all()
    assert found.abs().max() <= 1.5 * rows.abs().max()


def test_every_format_of_the_config_has_its_rows_and_every_row_its_settings():
    asked = get_args(ModelConfig.__annotations__["format"])
    assert {settings_of(name)["format"] for name in FORMATS} == set(asked) - {"stored"}  # which is whatever row a file's tensor has
    assert {settings_of(name)["bits"] for name in FORMATS} == set(get_args(ModelConfig.__annotations__["bits"]))
    for name, form in FORMATS.items():
        assert ModelConfig(path="x", **settings_of(name)).held_as == name == form.name


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_equals_bitsandbytes_byte_for_byte(name, block, dtype):
    rows = rows_of(0, width=512)
    ours = FORMATS[name].quantize(rows, block, dtype)
    packed, state = functional.quantize_4bit(rows, blocksize=block, quant_type=name, compress_statistics=False)
    assert torch.equal(ours["packed"].reshape(-1), packed.reshape(-1))
    assert torch.equal(ours["scale"].reshape(-1), state.absmax)
    state.dtype = dtype
    assert torch.equal(FORMATS[name].dequantize(ours, block, dtype), functional.dequantize_4bit(packed, state).view_as(rows))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "none"])
def test_in_float64_it_holds_the_fp32_values(name):
    tensors = FORMATS[name].quantize(rows_of(0), 64, torch.float64)
    assert torch.equal(FORMATS[name].dequantize(tensors, 64, torch.float64), FORMATS[name].dequantize(tensors, 64, torch.float32).double())


def test_the_norm_kept_beside_w_is_that_of_the_rows_as_rounded_to_the_compute_dtype():
    layer = a_linear("nf4", torch.bfloat16)
    rows = rows_of(0, 48, 128)
    put(layer, rows)
    rounded = torch.cat([tile.double() for _, tile in layer.tiles()])
    torch.testing.assert_close(layer.norm2.double(), rounded.square().sum(1), rtol=1e-6, atol=0)  # a sum in fp32
    exact = layer.form.dequantize(layer.tensors(), 64, torch.float32).double().square().sum(1)
    assert ((layer.norm2 - exact).abs() > 1e-5 * exact).any(), "rounding to bf16 would not show here"


BLOCKS_OF_THEIR_OWN = ("int8_row", "q4_0", "q4_1", "q8_0")
"""Rows, or 32 weights, whatever `model.block` says."""


@pytest.mark.parametrize(
    ("name", "width", "refused"),
    [*((name, 96, name not in ("none", *BLOCKS_OF_THEIR_OWN)) for name in FORMATS), ("nf4", 128, False), ("hqq3", 128, False)],
)
def test_a_width_that_the_block_does_not_divide_is_refused_by_layer_and_sizes(name, width, refused):
    layers = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(width, 8, bias=False)})])
    if not refused:
        assert list(quantize_linears(layers, name, 64, torch.float32)) == ["0.up_proj"]
        return
    with pytest.raises(UserError, match=r"0\.up_proj: its 96 inputs are not a multiple of the block of 64"):
        quantize_linears(layers, name, 64, torch.float32)
