"""llama.cpp's blocks: decoded as the `gguf` package decodes them, put back to equal bytes, and folded into what a file can hold."""

import gguf
import numpy as np
import pytest
import torch

from burnish.model.formats import FORMATS
from burnish.model.formats.gguf_blocks import KINDS, blocks_of
from tests.layers import a_linear

EVERY = pytest.mark.parametrize("name", KINDS)


def gguf_kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def random_blocks(name: str, seed: int = 0, rows: int = 9, blocks: int = 7, finite: bool = True) -> torch.Tensor:
    """Rows of any bytes, so with scales of every size: subnormal, negative, 65504, 0 and -0; `finite` leaves infinities and NaN out."""
    random, kind = np.random.default_rng(seed), KINDS[name]
    stored = random.integers(0, 256, (rows, blocks, kind.bytes), dtype=np.uint8)
    scales = stored[:, :, : 2 * len(kind.scales)].copy().view(np.uint16)
    scales[0, :5] = np.array([[0x0001], [0x8001], [0x7BFF], [0x0000], [0x8000]])
    if finite:
        scales[(scales & 0x7C00) == 0x7C00] &= 0x83FF
    stored[:, :, : 2 * len(kind.scales)] = scales.view(np.uint8)
    return torch.from_numpy(stored.reshape(rows, -1))


def by_gguf(name: str, blocks: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf_kind(name)))


def bits(values: torch.Tensor) -> torch.Tensor:
    """So that -0 is not 0."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])


def adopted(name: str, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    adopt = FORMATS[name].adopt
    assert adopt is not None
    return adopt({"blocks": blocks})


@EVERY
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_blocks_decode_to_the_values_of_the_gguf_package_bit_for_bit(name, seed, dtype):
    blocks = random_blocks(name, seed)
    found = FORMATS[name].dequantize(adopted(name, blocks), 64, dtype)
    assert torch.equal(bits(found), bits(by_gguf(name, blocks).to(dtype)))


@EVERY
def test_any_blocks_are_put_back_to_equal_bytes(name):
    blocks = random_blocks(name, finite=False)
    assert torch.equal(blocks_of(name, adopted(name, blocks)), blocks)


@EVERY
@pytest.mark.parametrize("count", [0, 1, 40])
def test_rows_are_quantized_as_the_gguf_package_quantizes_them(name, count):
    rows = torch.randn(count, 192, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, count)[:, None]
    expected = gguf.quants.quantize(rows.numpy(), gguf_kind(name))
    assert np.array_equal(blocks_of(name, FORMATS[name].quantize(rows, 64, torch.float32)).numpy(), expected)


@EVERY
def test_what_is_trained_with_a_gain_is_what_the_folded_file_decodes_to(name):
    layer = a_linear(name)
    gain = torch.rand(48, generator=torch.Generator().manual_seed(1)) + 0.5
    trained = torch.cat([tile.clone() for _, tile in layer.tiles(gain)])
    file = blocks_of(name, layer.form.fold(layer.tensors(), gain))
    assert torch.equal(bits(trained), bits(by_gguf(name, file)))
    assert torch.equal(file[:, -1], blocks_of(name, layer.tensors())[:, -1])  # a code


@EVERY
def test_a_gain_costs_a_scale_at_most_half_of_its_last_bit(name):
    tensors = adopted(name, random_blocks(name))
    gain = torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.4
    for scale, folded in FORMATS[name].fold(tensors, gain).items():
        if scale != "packed":
            exact = tensors[scale].double() * gain[:, None].double()
            inside = exact.abs() < 65504
            assert inside.any()
            bound = (exact.abs() * 2**-11).clamp_min(2**-25) * (1 + 1e-6)  # the product is rounded to fp32 first
            assert ((folded.double() - exact).abs() <= bound)[inside].all(), scale
