"""Checkpoints that others quantized: bitsandbytes' blocks as they are, compressed-tensors' integers decoded, all else refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.config import ModelConfig
from burnish.errors import UserError
from burnish.load import compressed_tensors_reader
from burnish.load.pretrained import find_model
from burnish.load.weights import Weights, open_weights
from burnish.model.formats import FORMATS
from tests.layers import dense
from tests.tiny import built_from, tiny_folder

UP = "model.layers.0.mlp.up_proj.weight"
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def rewritten(folder: Path, said: dict[str, Any], replace: Any) -> Path:
    """Puts `replace(name, tensor)`'s tensors in the place of each linear layer's, and `said` into config.json."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors |= replace(name, tensor) if is_linear(name) else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return folder


def bitsandbytes_folder(folder: Path, kind: str = "nf4", nested: bool = False, block: int = 64) -> dict[str, Tensor]:
    """Writes one as transformers saves it; returns what bitsandbytes decodes each matrix to."""
    decoded: dict[str, Tensor] = {}

    def replace(name: str, tensor: Tensor) -> dict[str, Tensor]:
        packed, state = functional.quantize_4bit(tensor, blocksize=block, quant_type=kind, compress_statistics=nested)
        decoded[name] = functional.dequantize_4bit(packed, state).clone()
        return {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}

    rewritten(tiny_folder(folder), BITSANDBYTES | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}, replace)
    return decoded


def weights_of(folder: Path) -> Weights:
    return open_weights(find_model(ModelConfig(path=str(folder))))


def slices(weights: Weights, name: str) -> list[tuple[int, int]]:
    count = weights.infos[name].shape[0]
    return [(0, count), (0, 1), (5, 14), (count - 1, count), (3, 3)]


# --- bitsandbytes


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 32])
def test_rows_are_what_bitsandbytes_decodes_bit_for_bit(tmp_path: Path, kind: str, nested: bool, block: int) -> None:
    decoded = bitsandbytes_folder(tmp_path, kind, nested, block)
    weights = weights_of(tmp_path)
    for name, values in decoded.items():
        assert weights.infos[name].shape == tuple(values.shape)
        for start, stop in slices(weights, name):
            assert torch.equal(weights.rows(name, start, stop), values[start:stop]), f"{name} {start}:{stop}"
    assert not any("absmax" in name or "quant" in name for name in weights.infos)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("form", ["nf4", "stored"])
def test_nf4_is_placed_as_it_is_and_nothing_is_quantized(
    tmp_path: Path, nested: bool, form: str, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    decoded = bitsandbytes_folder(tmp_path, "nf4", nested)
    held = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr("burnish.model.linear.QuantLinear.encode", lambda *_: pytest.fail("a layer was quantized"))
    built = built_from(tmp_path, {"format": form, "cache": True})
    assert not cache_folder.exists()
    for name, layer in built.linears.items():
        assert layer.format_name == "nf4"
        assert torch.equal(layer.packed.reshape(-1), held[f"{name}.weight"].reshape(-1)), name
        assert torch.equal(dense(layer), decoded[f"{name}.weight"]), name


def test_blocks_of_another_size_are_quantized_anew(tmp_path: Path) -> None:
    decoded = bitsandbytes_folder(tmp_path, block=32)
    built = built_from(tmp_path, {"format": "nf4", "block": 64})
    expected = FORMATS["nf4"].quantize(decoded[UP], 64, torch.float32)
    assert torch.equal(built.linears[UP.removesuffix(".weight")].packed, expected["packed"])
    assert built_from(tmp_path, {"format": "stored"}).linears[UP.removesuffix(".weight")].block == 32


def test_the_configuration_says_no_longer_that_the_weights_are_quantized(tmp_path: Path) -> None:
    bitsandbytes_folder(tmp_path)
    assert "quantization_config" not in find_model(ModelConfig(path=str(tmp_path))).config.to_dict()


def test_a_storage_dtype_that_is_a_container_changes_nothing(tmp_path: Path) -> None:
    decoded = bitsandbytes_folder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held |= {name: held[name].view(-1).view(torch.bfloat16)[:, None] for name in decoded}
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = weights_of(tmp_path)
    assert all(torch.equal(weights.rows(name, 3, 9), values[3:9]) for name, values in decoded.items())


def test_blocks_that_cross_rows_are_refused_by_name(tmp_path: Path) -> None:
    bitsandbytes_folder(tmp_path, block=128)  # of down_proj's 192 inputs
    with pytest.raises(
        UserError, match=r"down_proj\.weight \[128, 192\] is quantized in blocks of 128 weights, which cross its rows of 192"
    ):
        weights_of(tmp_path)


def test_a_matrix_of_another_size_than_its_settings_say_is_refused(tmp_path: Path) -> None:
    bitsandbytes_folder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {UP: held[UP][:-64].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"up_proj\.weight of shape \[192, 128\] in blocks of 64 should take 12,288 bytes and 384 scales"):
        weights_of(tmp_path)


def test_damaged_settings_are_refused_by_name(tmp_path: Path) -> None:
    bitsandbytes_folder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {f"{UP}.quant_state.bitsandbytes__nf4": torch.zeros(5, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"the settings of model\.layers\.0\.mlp\.up_proj\.weight are damaged"):
        weights_of(tmp_path)


# --- compressed-tensors


def packed_along_columns(codes: Tensor, bits: int) -> Tensor:
    """As compressed-tensors packs: int32, the first code in the lowest bits."""
    each = 32 // bits
    padded = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % each)).view(len(codes), -1, each)
    words = (padded << torch.arange(0, 32, bits)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def compressed_folder(
    folder: Path, bits: int = 4, group: int | None = 32, symmetric: bool = False, ordered: bool = False
) -> dict[str, Tensor]:
    """Writes one with random codes; returns the matrices that they stand for, computed one weight at a time."""
    generator = torch.Generator().manual_seed(5)
    decoded: dict[str, Tensor] = {}

    def replace(name: str, tensor: Tensor) -> dict[str, Tensor]:
        out, width = tensor.shape
        groups = 1 if group is None else width // group
        codes = torch.randint(0, 1 << bits, (out, width), generator=generator)
        zeros = torch.randint(0, 1 << bits, (out, groups), generator=generator)
        scales = (torch.rand(out, groups, generator=generator) * 0.1).bfloat16()
        of = torch.arange(width) // (width // groups)
        of = of[torch.randperm(width, generator=generator)] if ordered else of
        middle = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
        decoded[name] = ((codes - middle[:, of]) * scales.float()[:, of]).float()
        parts = {"packed": packed_along_columns(codes, bits), "scale": scales, "shape": torch.tensor([out, width])}
        parts |= {} if symmetric else {"zero_point": packed_along_columns(zeros.T, bits).T}
        parts |= {"g_idx": of.int()} if ordered else {}
        return {f"{name}_{part}": value for part, value in parts.items()}

    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
    }
    said = {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    rewritten(tiny_folder(folder), {"quant_method": "compressed-tensors"} | said, replace)
    return decoded


LAYOUTS = [{}, {"symmetric": True}, {"group": None}, {"bits": 8, "symmetric": True}, {"bits": 8, "group": 64}, {"ordered": True}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_integers_are_decoded_to_the_rows_that_they_stand_for(
    tmp_path: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    decoded = compressed_folder(tmp_path, **layout)
    weights = weights_of(tmp_path)
    for _ in range(2):
        for name, values in decoded.items():
            for start, stop in slices(weights, name):
                assert torch.equal(weights.rows(name, start, stop), values[start:stop]), f"{name} {start}:{stop}"
        monkeypatch.setattr(compressed_tensors_reader, "CHUNK", 5 * 128)  # in pieces, whose zero points begin inside a word


def test_packed_integers_can_be_trained_in_any_format_but_not_as_they_are(tmp_path: Path) -> None:
    decoded = compressed_folder(tmp_path)
    built = built_from(tmp_path, {"format": "none"})
    assert all(torch.equal(layer.weight, decoded[f"{name}.weight"]) for name, layer in built.linears.items())
    built_from(tmp_path, {"format": "q4_0"})
    with pytest.raises(UserError, match=r"compressed-tensors W4A16: .*q_proj\.weight and 13 more\n.*model.format=nf4"):
        built_from(tmp_path, {"format": "stored"})


def test_a_packed_matrix_without_its_scales_is_refused(tmp_path: Path) -> None:
    compressed_folder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held.pop(f"{UP}_scale")
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model\.layers\.0\.mlp\.up_proj\.weight_packed and no .*_scale"):
        weights_of(tmp_path)


def test_a_packed_matrix_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    compressed_folder(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(held | {f"{UP}_scale": held[f"{UP}_scale"][:7].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"packed as \[192, 16\] with scales \[7, 4\], which do not fit together"):
        weights_of(tmp_path)


# --- what is refused

INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}


def group(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": INT4 | weights}}}


REFUSED = [
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "awq"}, "awq"),
    ({"quant_method": "fp8"}, "fp8"),
    ({"bits": 4}, "None"),
    ("nonsense", "None"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes in 8 bits \(LLM.int8\)"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors float-quantized"),
    (group(type="float"), "compressed-tensors, g: float4 by group"),
    (group(num_bits=3), "compressed-tensors, g: int3 by group"),
    (group(strategy="tensor"), "compressed-tensors, g: int4 by tensor"),
    (group() | {"config_groups": {"g": {"weights": INT4, "input_activations": {"num_bits": 8}}}}, "with quantized activations, g"),
    (group() | {"config_groups": {"g": {"weights": INT4}, "h": {"weights": INT4 | {"num_bits": 8}}}}, r"weights of \[4, 8\] bits"),
]


@pytest.mark.parametrize(("said", "named"), REFUSED, ids=str)
def test_other_quantizations_are_refused_by_name_before_a_weight_is_read(tmp_path: Path, said: Any, named: str) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(UserError, match=f"already quantized \\(.*{named}.*\\)\\. Give the original weights"):
        find_model(ModelConfig(path=str(folder)))
