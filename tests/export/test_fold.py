"""Law 6 on tensors: the folded layer is the adapted layer, and no code of the base has changed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from burnish.adapt.attach import MAGNITUDE
from burnish.export.distance import log_probabilities
from burnish.export.fold import Folded, fold, gain, gather
from burnish.model.formats import FORMATS
from burnish.model.linear import QuantLinear
from burnish.skeleton import Built
from tests.layers import has_half_scales
from tests.tiny import FAMILIES, a_plan, built_from, tiny_folder, train_a_little

IDS = [(7 * position) % 320 for position in range(48)]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("qwen2"), "qwen2")  # has biases, which d must not scale


def trained(folder: Path, format_name: str, method: str = "dora", dtype: str = "fp32", **adapt: object) -> Built:
    built = built_from(folder, {"format": format_name}, {"method": method} | adapt, a_plan(dtype=dtype))
    train_a_little(built)
    return built


def served(folded: Folded, layer: QuantLinear, x: Tensor) -> Tensor:
    """What an engine computes: a quantized product, and a LoRA of scaling 1 beside it."""
    w = layer.form.dequantize(folded.tensors, layer.block, layer.dtype)
    y = F.linear(x, w, layer.bias)
    return y if folded.a is None or folded.b is None else y + F.linear(F.linear(x, folded.a), folded.b)


# fp32: sums of 128 to 192 products in another order. fp64: nf4's scales are fp32, so d ⊙ scale is rounded to 2^-24.
TOLERANCES = {"fp32": {"rtol": 1e-5, "atol": 2e-5}, "fp64": {"rtol": 1e-6, "atol": 1e-6}}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("method", MAGNITUDE)
def test_a_folded_layer_gives_what_the_adapted_layer_gives(qwen2: Path, method: str, format_name: str, dtype: str):
    built = trained(qwen2, format_name, method, dtype)
    folded = fold(built)
    # float64 leaves d out of the scales; to fp16 scales the fold then costs 11 bits of d, a thousandth of the largest y
    close = {"rtol": 0, "atol": 1e-2} if dtype == "fp64" and has_half_scales(format_name) else TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(1)
    for name, layer in built.linears.items():
        x = torch.randn(5, layer.in_features, generator=generator, dtype=layer.dtype)
        with torch.no_grad():
            adapted = built.adapters.by_name[name](x)
            torch.testing.assert_close(served(folded[name], layer, x), adapted, **close, msg=lambda text, name=name: f"{name}: {text}")
            assert (adapted - layer(x)).abs().max() > 0.1  # the adapter does something


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_fold_changes_scales_by_d_alone_and_no_code(qwen2: Path, format_name: str):
    built = trained(qwen2, format_name)
    folded = fold(built)
    for name, layer in built.linears.items():
        d = gain(gather(layer, built.adapters.by_name[name]))
        assert d is not None
        assert not torch.allclose(d, torch.ones_like(d), atol=1e-3)
        for part, tensor in layer.tensors().items():
            if tensor.dtype.is_floating_point:
                half = tensor.dtype == torch.float16
                expected = (tensor.float() * d[:, None]).to(tensor.dtype) if half else tensor * d[:, None]
                torch.testing.assert_close(folded[name].tensors[part], expected, rtol=0 if half else 1e-6, atol=0)
            else:
                assert torch.equal(folded[name].tensors[part], tensor), f"{name}.{part}"


@pytest.mark.parametrize("format_name", FORMATS)
def test_lora_leaves_every_tensor_of_the_base_as_it_is(qwen2: Path, format_name: str):
    built = trained(qwen2, format_name, "lora")
    for name, folded in fold(built).items():
        assert all(torch.equal(folded.tensors[part], tensor) for part, tensor in built.linears[name].tensors().items())
        assert torch.equal(folded.b, 2.0 * built.adapters.by_name[name].b)


def test_a_layer_without_an_adapter_is_left_as_it_is(qwen2: Path):
    built = trained(qwen2, "nf4", targets=("v_proj",))
    for name, folded in fold(built).items():
        if not name.endswith("v_proj"):
            assert folded.a is None
            assert folded.b is None
            assert all(torch.equal(folded.tensors[part], tensor) for part, tensor in built.linears[name].tensors().items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_gain_is_bit_for_bit_the_one_that_the_forward_pass_uses(qwen2: Path, format_name: str, dtype: str):
    built = trained(qwen2, format_name, dtype=dtype)
    with torch.no_grad():
        built.model(torch.tensor([IDS]))
    for name, adapter in built.adapters.by_name.items():
        assert adapter.d is not None
        assert torch.equal(gain(gather(built.linears[name], adapter)), adapter.d), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_the_folded_model_is_the_adapted_model(tmp_path: Path, family: str, format_name: str, rank_stabilized: bool):
    folder = tiny_folder(tmp_path, family)
    built = trained(folder, format_name, rank_stabilized=rank_stabilized)
    adapted = log_probabilities(built.model, IDS)
    engine = built_from(folder, {"format": format_name}, {"method": "lora", "alpha": 8.0})  # alpha = rank: a scaling of 1
    with torch.no_grad():
        for name, folded in fold(built).items():
            assert folded.a is not None
            assert folded.b is not None
            for part, tensor in folded.tensors.items():
                getattr(engine.linears[name], part).copy_(tensor)
            engine.adapters.by_name[name].a.copy_(folded.a)
            engine.adapters.by_name[name].b.copy_(folded.b)
    engine.adapters.switch.advance()
    # law 6: 1e-4 nats in fp32, over the whole vocabulary
    torch.testing.assert_close(log_probabilities(engine.model, IDS), adapted, rtol=0, atol=1e-4)
    built.adapters.switch.on = False
    assert (log_probabilities(built.model, IDS) - adapted).abs().max() > 0.5
