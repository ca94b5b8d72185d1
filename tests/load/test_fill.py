"""Law 7: every tensor on disk is placed once, every place is filled once, or the run stops and names it."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.errors import UserError
from burnish.load import fill as filling
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from burnish.plan.phases import SLABS
from burnish.plan.trace import Live
from burnish.skeleton import Built, skeleton
from tests.layers import KINDS, OTHER_KINDS
from tests.tiny import ONE, a_plan, asked, built_from, tiny_folder, tiny_network

PROJECTION = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"), attention_bias=True)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A model's folder that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Puts tensors into the folder's file, or takes them out (None); dots are written as double underscores."""
    path = folder / "model.safetensors"
    held = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path, metadata={"format": "pt"})


def filled(built: Built) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}


def assert_same(one: Built, other: Built) -> None:
    first, second = filled(one), filled(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- what stops the run


def test_a_missing_an_extra_and_a_misshapen_tensor_are_all_named_in_one_error(folder):
    change(folder, model__norm__weight=None, model__layers__0__extra=torch.ones(3), **{PROJECTION.replace(".", "__"): torch.ones(5, 128)})
    with pytest.raises(UserError) as refused:
        built_from(folder)
    assert str(refused.value).splitlines()[1:] == [
        "  model.layers.0.extra: the model has no place for it",
        "  model.norm.weight: no file holds it",
        f"  {PROJECTION}: [5, 128] on disk, [64, 128] in the model",
    ]


def test_a_missing_bias_is_named(folder):
    change(folder, model__layers__0__self_attn__q_proj__bias=None)
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias: no file holds it"):
        built_from(folder)


def test_of_many_problems_twenty_are_shown_and_the_rest_counted(folder):
    change(folder, **{f"extra__{number}": torch.ones(1) for number in range(25)})
    with pytest.raises(UserError) as refused:
        built_from(folder)
    assert len(str(refused.value).splitlines()) == 22
    assert str(refused.value).endswith("and 5 more")


def test_nothing_is_read_before_the_check(folder, monkeypatch):
    change(folder, model__extra=torch.ones(3))
    monkeypatch.setattr(filling.Place, "encode", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UserError, match=r"model\.extra"):
        built_from(folder)


def test_a_head_beside_tied_embeddings_must_be_the_same(tmp_path):
    tiny_folder(tmp_path, tie_word_embeddings=True)
    embeddings = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path, lm_head__weight=embeddings.clone())
    built_from(tmp_path)
    change(tmp_path, lm_head__weight=embeddings + 0.1)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but the model's config ties them"):
        built_from(tmp_path)


# --- what may be ignored


@pytest.mark.parametrize(
    "name", ["model__rotary_emb__inv_freq", "model__layers__0__self_attn__rotary_emb__inv_freq", "model__layers__1__attention__masked_bias"]
)
def test_what_is_ignored_is_in_the_table_and_told_with_its_reason(folder, name, caplog):
    expected = built_from(folder)
    change(folder, **{name: torch.full((16,), 9.0)})
    with caplog.at_level(logging.INFO, "burnish"):
        found = built_from(folder)
    assert any(
        name.replace("__", ".") in record.getMessage() and "older files carry it" in record.getMessage() for record in caplog.records
    )
    assert_same(found, expected)


def test_the_table_of_what_is_ignored_hides_no_weight_of_a_model():
    import re

    for name, _ in tiny_network("llama", attention_bias=True, mlp_bias=True).named_parameters():
        assert name == "lm_head.weight" or not any(re.fullmatch(pattern, name) for pattern in filling.IGNORED), name


def test_an_untied_head_is_never_ignored(folder):
    change(folder, lm_head__weight=None)
    with pytest.raises(UserError, match=r"lm_head\.weight: no file holds it"):
        built_from(folder)


# --- each place once


@pytest.mark.parametrize("format_name", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_has_one_place_and_every_parameter_is_of_one_place(tmp_path, format_name, tied):
    tiny_folder(tmp_path, tie_word_embeddings=tied)
    built = built_from(tmp_path, {"format": format_name})
    assert set(built.places) == set(load_file(tmp_path / "model.safetensors"))
    owned = [id(parameter) for place in built.places.values() for parameter in place.parameters().values()]
    frozen = {id(parameter) for parameter in built.model.parameters() if not parameter.requires_grad}
    assert len(owned) == len(set(owned))
    assert set(owned) == frozen


@pytest.mark.parametrize("slab", [1, 700, 64 << 20])
def test_every_row_is_read_once_and_no_other(folder, slab, monkeypatch):
    monkeypatch.setattr(filling, "SLAB_BYTES", slab)
    found = find_model(built_config(folder))
    weights, read = open_weights(found), {}
    original = type(weights).rows

    def counting(self, name, start, stop):
        read.setdefault(name, []).extend(range(start, stop))
        return original(self, name, start, stop)

    monkeypatch.setattr(type(weights), "rows", counting)
    built = skeleton(found.config, built_config(folder), adapt_config(), a_plan(), ONE)
    built.model.to_empty(device="cpu")
    bytes_told = []
    filling.fill(built.places, weights, None, torch.device("cpu"), bytes_told.append)
    assert read == {name: list(range(info.shape[0])) for name, info in weights.infos.items()}
    assert sum(bytes_told) == sum(info.bytes for info in weights.infos.values())


def built_config(folder):
    from burnish.config import ModelConfig

    return ModelConfig(path=str(folder), cache=False)


def adapt_config():
    from burnish.config import AdaptConfig

    return AdaptConfig()


# --- the same bytes however they come


@pytest.mark.parametrize(
    ("format_name", "dtype", "slab"),
    [
        *((name, dtype, slab) for name in ("none", "nf4") for dtype in ("fp32", "bf16", "fp64") for slab in (1, 5 * 4 * 128, 7777)),
        *((name, "fp32", 7777) for name in OTHER_KINDS),
    ],
)
def test_small_slabs_give_the_same_bytes_as_one(saved, format_name, dtype, slab, monkeypatch):
    whole = built_from(saved, {"format": format_name}, plan=a_plan(dtype=dtype))
    monkeypatch.setattr(filling, "SLAB_BYTES", slab)
    assert_same(built_from(saved, {"format": format_name}, plan=a_plan(dtype=dtype)), whole)


@pytest.mark.parametrize("form", KINDS)
def test_what_lives_while_a_model_is_filled_is_counted_in_slabs_by_the_plan(saved, form, monkeypatch):
    """Beside the model's own bytes, and for a matrix of several slabs."""
    slab = 4 * 128 * 16
    monkeypatch.setattr(filling, "SLAB_BYTES", slab)
    section = asked(saved, {"format": form})
    found = find_model(section)
    built = skeleton(found.config, section, adapt_config(), a_plan(dtype="bf16"), ONE)
    built.model.to_empty(device="cpu")
    weights = open_weights(found)
    live = Live([*built.model.parameters(), *built.model.buffers()])
    with live:
        filling.read({PROJECTION: built.places[PROJECTION]}, weights, None, torch.device("cpu"))
    assert slab < live.peak <= SLABS * slab


@pytest.mark.parametrize(
    ("first", "last", "shape"), [(0, 100, (100, 8)), (13, 57, (100, 8)), (40, 40, (100, 8)), (3, 9, (9,)), (0, 1, (1, 1 << 30))]
)
def test_slabs_cover_the_rows_once_within_their_bytes(first, last, shape, monkeypatch):
    monkeypatch.setattr(filling, "SLAB_BYTES", 7 * 4 * 8)
    cut = list(filling.slabs(first, last, shape))
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(first, last))
    assert all(stop - start == 1 or (stop - start) * 4 * (shape[1] if len(shape) > 1 else 1) <= 7 * 4 * 8 for start, stop in cut)


def test_files_in_shards_give_the_same_model(saved, tmp_path):
    tiny_network(attention_bias=True).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same(built_from(tmp_path), built_from(saved))


def test_bf16_files_are_computed_with_in_fp32_without_loss(tmp_path):
    network = tiny_network()
    network.bfloat16().save_pretrained(tmp_path)
    built = built_from(tmp_path, {"format": "none"})
    assert torch.equal(built.model.model.embed_tokens.weight, network.model.embed_tokens.weight.float())
    assert torch.equal(built.linears["model.layers.0.mlp.up_proj"].weight, network.model.layers[0].mlp.up_proj.weight.float())


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_stay_tied_after_memory_is_given_and_filled(tmp_path, tied):
    tiny_folder(tmp_path, tie_word_embeddings=tied)
    built = built_from(tmp_path)
    assert (built.model.lm_head.weight is built.model.model.embed_tokens.weight) == tied
    assert torch.equal(built.model.model.embed_tokens.weight, load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"])


def test_the_skeleton_holds_no_bytes(saved):
    built = skeleton(find_model(built_config(saved)).config, built_config(saved), adapt_config(), a_plan(), ONE)
    assert {parameter.device.type for parameter in built.model.parameters()} == {"meta"}
