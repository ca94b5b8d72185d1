"""Law 8, what stays in memory: planned bytes are the filled model's and the optimizer's, whoever holds which rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import AdaptConfig, ModelConfig, TrainConfig
from burnish.plan.bytes import (
    ADAPTERS,
    BUFFERS,
    EMBEDDINGS,
    FROZEN,
    GRADIENTS,
    MOMENTS,
    OTHER,
    SCALES,
    WEIGHTS,
    Persistent,
    meta,
    persistent,
)
from burnish.train import optimizer
from tests.layers import METHODS_AND_KINDS
from tests.tiny import FAMILIES, METHOD_SECTIONS, SIZES, a_plan, asked, built_from, tiny_folder

SMALL = FAMILIES["llama"](**SIZES)


def held(tensors: Any) -> int:
    """Bytes of the memory behind some tensors, each piece once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def planned(config: Any = SMALL, model: dict[str, Any] | None = None, shards: int = 1, dtype: str = "fp32", **adapt: Any) -> Persistent:
    section = AdaptConfig(**({"rank": 8, "alpha": 16.0} | adapt))
    return persistent(meta(config, asked("tiny", model), section, a_plan(dtype=dtype)), TrainConfig(), shards)


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_bytes_are_the_filled_models(family: str, tmp_path: Path) -> None:
    _equal(tmp_path, family, {}, {})


@pytest.mark.parametrize(("method", "name"), [*METHODS_AND_KINDS, ("full", "none"), ("expand", "nf4"), ("expand", "none")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_planned_bytes_are_the_filled_models_in_every_format(name: str, method: str, dtype: str, tmp_path: Path) -> None:
    model, adapt = METHOD_SECTIONS[method]
    _equal(tmp_path, "llama", {"format": name} | model, {"method": method} | adapt, dtype)


def test_planned_bytes_count_what_is_trained_beside_adapters(tmp_path: Path) -> None:
    _equal(tmp_path, "llama", {}, {"also": ("embed_tokens", "norm")}, "bf16", tie_word_embeddings=True)


def test_planned_bytes_count_a_tied_head_once(tmp_path: Path) -> None:
    tied, own = FAMILIES["llama"](**SIZES, tie_word_embeddings=True), FAMILIES["llama"](**SIZES, tie_word_embeddings=False)
    assert planned(own).parts[EMBEDDINGS] == 2 * planned(tied).parts[EMBEDDINGS] == 2 * 320 * 128 * 4
    _equal(tmp_path, "llama", {}, {}, tie_word_embeddings=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ends", ["int8", "int4"])
def test_planned_bytes_count_quantized_embeddings_and_head(tied: bool, ends: str, tmp_path: Path) -> None:
    _equal(tmp_path, "llama", {"ends": ends}, {}, "bf16", tie_word_embeddings=tied)
    config = FAMILIES["llama"](**SIZES, tie_word_embeddings=tied)
    quantized, dense = (planned(config, {"ends": name}, dtype="bf16") for name in (ends, "none"))
    width, norms = SIZES["hidden_size"], 4  # a row's weights, scales and zero points; and its norm
    row = {"int8": width + width // 64 * 4, "int4": width // 2 + width // 64 * 5}[ends] + norms
    assert (quantized.parts[EMBEDDINGS], dense.parts[EMBEDDINGS]) == ((2 - tied) * 320 * row, (2 - tied) * 320 * 2 * width)
    assert dense.total - quantized.total == dense.parts[EMBEDDINGS] - quantized.parts[EMBEDDINGS]
    assert dense.root - quantized.root == 320 * (2 * width - row)


def _equal(folder: Path, family: str, model: dict[str, Any], adapt: dict[str, Any], dtype: str = "fp32", **changes: Any) -> None:
    built = built_from(tiny_folder(folder, family, **changes), model, adapt, a_plan(dtype=dtype))
    trainable = built.adapters.trainable()
    update = optimizer.build(trainable, TrainConfig())
    for parameter in trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    config = FAMILIES[family](**(SIZES | changes))
    count = planned(config, model, dtype=dtype, **adapt)
    assert count.of(*FROZEN, ADAPTERS) == held([*built.model.parameters(), *built.model.buffers()])
    assert count.parts[ADAPTERS] == held(trainable.values()) == count.parts[GRADIENTS]
    assert count.parts[BUFFERS] == held(built.model.buffers()) > 0
    state = [tensor for entry in update.state.values() for tensor in entry.values()]
    assert count.parts[MOMENTS] + count.step_counters == held(state)
    assert count.parts[MOMENTS] == 2 * count.parts[ADAPTERS]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rank_0_holds_the_first_chunk_of_the_rows_of_every_parameter(ranks: int) -> None:
    odd = FAMILIES["qwen2"](**(SIZES | {"vocab_size": 321}))  # 321 rows are cut evenly by 3 alone
    model = meta(odd, ModelConfig(path="tiny"), AdaptConfig(rank=5), a_plan()).model  # and 5 rows of A by none
    chunks = [parameter.chunk(ranks)[0] for parameter in model.parameters()]
    count = planned(odd, shards=ranks, rank=5)
    assert count.of(WEIGHTS, SCALES, EMBEDDINGS, OTHER, ADAPTERS) == sum(chunk.numel() * chunk.dtype.itemsize for chunk in chunks)
    assert count.parts[MOMENTS] == 2 * count.parts[ADAPTERS]


def test_a_whole_group_is_what_sharding_gathers() -> None:
    one, four = planned(), planned(shards=4)
    assert (four.layer, four.root) == (one.layer, one.root)
    assert one.root + SMALL.num_hidden_layers * one.layer == one.total - one.of(BUFFERS, GRADIENTS, MOMENTS) - one.parts[EMBEDDINGS] // 2
    tied = planned(FAMILIES["llama"](**SIZES, tie_word_embeddings=True))
    assert tied.root == one.root


def test_weights_of_4_bits_take_half_a_byte_each() -> None:
    dense = planned(model={"format": "none"})
    assert 8 * planned().parts[WEIGHTS] == dense.parts[WEIGHTS]
    matrices = sum(
        p.numel()
        for name, p in meta(SMALL, ModelConfig(path="tiny", format="none"), AdaptConfig(), a_plan()).model.named_parameters()
        if name.endswith("base.weight")
    )
    assert dense.parts[WEIGHTS] == 4 * matrices
