"""Every method starts as its base, trains what it says, and is switched off to the base where that is still there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from burnish.adapt.expand import growth
from burnish.adapt.methods import METHODS, in_words
from burnish.config import AdaptConfig, ModelConfig
from burnish.data.batches import batch_of
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.load.cache import cache_root
from burnish.load.pretrained import find_model
from burnish.load.weights import open_weights
from burnish.model.formats import FORMATS
from burnish.model.network import packed
from burnish.skeleton import Built, refill
from tests.ranks.jobs import make_tokens
from tests.tiny import FAMILIES, METHOD_SECTIONS, ONE, a_plan, built_from, tiny_folder, train_a_little, with_method

IDS = torch.arange(40).view(2, 20) * 7 % 320
METHODS_OF_THE_BASE = [name for name in METHODS if name != "full"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"))


def logits(built: Built) -> Tensor:
    with torch.no_grad():
        return built.model(IDS).logits


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_every_method_has_what_its_tests_need():
    assert METHOD_SECTIONS.keys() == METHODS.keys()


# --- law 1


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_before_training_the_model_is_the_base_in_its_format(llama: Path, method: str, format_name: str):
    """DoRA's gain is a quotient of equal norms, 1 but for rounding; nothing else differs by a bit."""
    built = with_method(llama, method, {"format": format_name})
    base = built_from(llama, {"format": METHOD_SECTIONS[method][0].get("format", format_name)})
    base.adapters.switch.on = False
    torch.testing.assert_close(logits(built), logits(base), rtol=0, atol=1e-5 if method == "dora" else 0)


@pytest.mark.parametrize(("tied", "dtype"), [(False, "fp32"), (True, "bf16")])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_equals_its_base_in_transformers(tmp_path: Path, family: str, tied: bool, dtype: str):
    folder = tiny_folder(tmp_path, family, num_hidden_layers=4, tie_word_embeddings=tied)
    built = with_method(folder, "expand", {"format": "none"}, a_plan(dtype=dtype), new_blocks=2)
    assert len(built.layers) == built.model.config.num_hidden_layers == 6
    if dtype == "fp32":  # bf16 rounds the biases of our layers at another place
        with torch.no_grad():
            expected = theirs(folder)(IDS).logits
        torch.testing.assert_close(logits(built), expected, rtol=0, atol=1e-4)  # two orders of the same sums
    built.adapters.switch.on = False
    off = logits(built)
    built.adapters.switch.on = True
    assert torch.equal(logits(built), off)


@pytest.mark.parametrize("method", METHODS_OF_THE_BASE)
def test_switched_off_a_trained_model_is_its_base(llama: Path, method: str):
    built = with_method(llama, method)
    built.adapters.switch.on = False
    before = logits(built)
    train_a_little(built)
    assert torch.equal(logits(built), before)
    built.adapters.switch.on = True
    assert (logits(built) - before).abs().max() > 0.1
    assert built.adapters.holds_base


# --- what is trained


def test_full_trains_everything_and_targets_restrict_it(llama: Path):
    built = with_method(llama, "full")
    assert built.adapters.trainable().keys() == built.places.keys()
    assert not built.linears
    assert not built.adapters.holds_base
    for targets, expected in (
        (("all-linear",), {name for name in built.places if "_proj" in name}),
        (("norm", "layers.1.mlp.*"), {"model.norm.weight", *(f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))}),
        ((r"re:model\.layers\.\d\.input_layernorm",), {f"model.layers.{layer}.input_layernorm.weight" for layer in range(2)}),
    ):
        part = with_method(llama, "full", targets=targets)
        assert part.adapters.trainable().keys() == expected
        assert {name for name, parameter in part.model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # biases; norms behind the branches
def test_expand_trains_all_of_its_new_blocks_and_nothing_else(tmp_path: Path, family: str):
    built = with_method(tiny_folder(tmp_path, family), "expand", new_blocks=2)
    trained = set(built.adapters.trainable())
    assert trained == {name for name in built.places if name.startswith(("model.layers.1.", "model.layers.3."))}
    assert {name for name, parameter in built.model.named_parameters() if parameter.requires_grad} == trained
    assert {name.split(".")[2] for name in built.linears} == {"0", "2"}


def test_new_blocks_start_as_the_block_before_with_two_matrices_at_zero(tmp_path: Path):
    folder = tiny_folder(tmp_path, "qwen2")
    built, base = with_method(folder, "expand", new_blocks=2), theirs(folder).state_dict()
    for name, parameter in built.adapters.trainable().items():
        source = name.replace("layers.1.", "layers.0.").replace("layers.3.", "layers.1.")
        zero = name.split(".")[-2] in ("o_proj", "down_proj")
        assert torch.equal(parameter, torch.zeros_like(parameter) if zero else base[source]), name


@pytest.mark.parametrize(("method", "dtype"), [("full", "bf16"), ("expand", "bf16"), ("dora", "bf16"), ("full", "fp64")])
def test_masters_are_fp32_or_better_and_the_rest_is_in_the_compute_dtype(llama: Path, method: str, dtype: str):
    also = {"also": ("norm", "lm_head", "embed_tokens")} if method == "dora" else {}
    built = with_method(llama, method, plan=a_plan(dtype=dtype), **also)
    wide = torch.float64 if dtype == "fp64" else torch.float32
    assert {parameter.dtype for parameter in built.adapters.trainable().values()} == {wide}
    assert logits(built).dtype == {"bf16": torch.bfloat16, "fp64": torch.float64}[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_full_computes_as_a_bf16_model_does_before_its_first_step(tmp_path: Path, family: str):
    """The masters are rounded where they are used: to the very weights that a bf16 model holds."""
    folder = tiny_folder(tmp_path, family)
    with torch.no_grad():
        expected = theirs(folder, torch.bfloat16)(IDS).logits
    assert torch.equal(logits(with_method(folder, "full", plan=a_plan(dtype="bf16"))), expected)


def test_a_step_smaller_than_bf16_can_hold_is_kept(llama: Path):
    built = with_method(llama, "full", plan=a_plan(dtype="bf16"))
    norm = built.adapters.trainable()["model.norm.weight"]
    before = norm.detach().clone()
    with torch.no_grad():
        norm.add_(1e-5)
    assert not torch.equal(norm, before)
    assert torch.equal(norm.bfloat16(), before.bfloat16()) or (norm.bfloat16() != before.bfloat16()).float().mean() < 0.05


# --- law 2: gradients are transformers' own


def first_batch(folder: Path) -> Any:
    make_tokens(folder / "tokens")
    return batch_of(open_tokens(folder / "tokens"), torch.arange(1).numpy())


@pytest.mark.parametrize(("family", "tied"), [(family, number % 2 == 1) for number, family in enumerate(FAMILIES)])
def test_full_gives_the_gradients_of_transformers(tmp_path: Path, family: str, tied: bool):
    folder = tiny_folder(tmp_path / "model", family, tie_word_embeddings=tied)
    built, batch = with_method(folder, "full", plan=a_plan(dtype="fp64")), first_batch(tmp_path)
    with packed(built.model):
        built.model.loss_of(batch).backward()  # pyright: ignore[reportCallIssue]
    network = theirs(folder, torch.float64)
    logits_TV = network(input_ids=batch.ids, use_cache=False).logits[0]
    F.cross_entropy(logits_TV[batch.source].double(), batch.targets, reduction="sum").backward()
    expected = dict(network.named_parameters())
    assert built.adapters.trainable().keys() == expected.keys()
    for name, parameter in built.adapters.trainable().items():
        assert parameter.grad is not None, name
        # transformers' norms and rotary tables compute in fp32 whatever the model's dtype
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# --- the base again


@pytest.mark.parametrize(("method", "adapt"), [("full", {}), ("lora", {"also": ("embed_tokens", "norm")})])
def test_a_base_that_was_trained_over_is_read_again_from_its_files(llama: Path, method: str, adapt: dict[str, Any]):
    built = with_method(llama, method, **adapt)
    before = logits(built)
    train_a_little(built)
    assert not built.adapters.holds_base
    refill(built, open_weights(find_model(ModelConfig(path=str(llama)))), ONE)
    built.adapters.switch.on = False
    assert torch.equal(logits(built), before)


# --- the cache of the quantized base


def test_an_expanded_model_shares_the_cache_of_its_base(llama: Path, monkeypatch: pytest.MonkeyPatch):
    base = built_from(llama, {"cache": True})
    expected = logits(with_method(llama, "expand"))
    kept = sorted(cache_root().rglob("*.safetensors"))
    built = with_method(llama, "expand", {"cache": True})
    assert sorted(cache_root().rglob("*.safetensors")) == kept
    assert torch.equal(logits(built), expected)
    for name, layer in base.linears.items():
        assert torch.equal(layer.packed, built.linears[name].packed)


def test_what_is_trained_beside_adapters_has_a_cache_of_its_own_without_it(llama: Path):
    built_from(llama, {"cache": True})
    first = with_method(llama, "lora", {"cache": True}, also=("embed_tokens",))
    again = with_method(llama, "lora", {"cache": True}, also=("embed_tokens",))
    assert len(list((cache_root() / "quantized").glob("*/key.json"))) == 2
    assert torch.equal(logits(first), logits(again))


# --- places of new blocks


@pytest.mark.parametrize(
    ("depth", "new_blocks", "expected"),
    [
        (32, 3, (10, 21, 32)),  # rate 0.1 of the original
        (80, 8, (10, 21, 32, 43, 54, 65, 76, 87)),
        (32, 4, (8, 17, 26, 35)),
        (4, 4, (1, 3, 5, 7)),
        (32, 9, (3, 8, 12, 17, 21, 26, 30, 35, 40)),  # the original would write 10
        (5, 3, (1, 4, 7)),
        (1, 1, (1,)),
    ],
)
def test_new_blocks_are_spread_evenly_where_the_original_puts_them(depth: int, new_blocks: int, expected: tuple[int, ...]):
    assert growth(depth, new_blocks).new == expected


@pytest.mark.parametrize("depth", [1, 2, 7, 32])
def test_any_number_of_new_blocks_up_to_the_depth_can_be_placed(depth: int):
    for new_blocks in range(1, depth + 1):
        grown = growth(depth, new_blocks)
        assert len(grown.new) == new_blocks
        old = [source for block, source in enumerate(grown.sources) if block not in grown.new]
        assert old == list(range(depth))
        assert all(grown.sources[block] == grown.sources[block - 1] for block in grown.new)
        gaps = [b - a for a, b in zip((-1, *grown.new), grown.new, strict=False)]
        assert max(gaps) - min(gaps) <= 1 or depth % new_blocks < depth // new_blocks


def test_lists_with_an_entry_for_each_layer_are_expanded_too(tmp_path: Path):
    folder = tiny_folder(tmp_path, "gemma2", num_hidden_layers=4)
    built = with_method(folder, "expand", new_blocks=2)
    before = find_model(ModelConfig(path=str(folder))).config.layer_types
    assert built.model.config.layer_types == [before[0], before[1], before[1], before[2], before[3], before[3]]


# --- refusals

REFUSED = [
    ({"method": "full"}, "nf4", r"adapt.method = 'full' trains the weights themselves, and model.format = 'nf4' .*Set model.format=none"),
    (
        {"method": "expand"},
        "nf4",
        r"adapt.new_blocks = 0: block expansion adds at least one block, .* each of the model's 2\..*from 1 to 2",
    ),
    ({"method": "expand", "new_blocks": -1}, "nf4", r"adapt.new_blocks = -1"),
    ({"method": "expand", "new_blocks": 3}, "nf4", r"adapt.new_blocks = 3: .*at most one behind each"),
    ({"method": "dora", "new_blocks": 1}, "nf4", r"adapt.new_blocks = 1 is for adapt.method=expand, and adapt.method = 'dora'"),
    ({"method": "full", "also": ("norm",)}, "none", r"adapt.also names what is trained beside adapters.*adapt.targets"),
    ({"method": "expand", "new_blocks": 1, "targets": ("q_proj",)}, "nf4", r"adapt.targets has no meaning where adapt.method = 'expand'"),
    ({"also": ("q_proj",)}, "nf4", r"adapt.also names model.layers.0.self_attn.q_proj, a linear layer of the decoder.*adapt.targets"),
    ({"also": ("layers.*",)}, "none", r"adapt.also names model.layers.0.self_attn.q_proj"),
    ({"also": ("embed_token",)}, "nf4", r"adapt.also: 'embed_token' is no module of this model\. Did you mean embed_tokens\?"),
    ({"targets": ("layers.7.*",)}, "nf4", r"'layers.7.\*' matches no linear layer .*like model.layers.0.self_attn.q_proj"),
    ({"targets": ("re:model.(",)}, "nf4", r"'re:model.\(' is not a regular expression"),
    ({"method": "full", "targets": ("nrm",)}, "none", r"adapt.targets: 'nrm' is no module of this model"),
]


@pytest.mark.parametrize(("adapt", "format_name", "message"), REFUSED)
def test_settings_that_do_not_go_together_are_refused_with_the_way_out(llama: Path, adapt: dict[str, Any], format_name: str, message: str):
    with pytest.raises(UserError, match=message):
        built_from(llama, {"format": format_name}, adapt)


def test_a_block_whose_matrices_have_other_names_is_refused(tmp_path: Path):
    from transformers import AutoModelForCausalLM, PhiConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
    AutoModelForCausalLM.from_config(PhiConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a block of this model has no o_proj and no down_proj"):
        built_from(tmp_path, {"format": "none"}, {"method": "expand", "new_blocks": 1})


@pytest.mark.parametrize(
    ("adapt", "said"),
    [
        ({"method": "full"}, "full finetuning of all"),
        ({"method": "expand", "new_blocks": 3}, "block expansion, 3 new decoder blocks (Llama Pro, arXiv 2401.02415)"),
        ({"also": ("lm_head",)}, "DoRA, rank 16, alpha 32, on all; lm_head trained in full"),
    ],
)
def test_a_method_is_told_in_words(adapt: dict[str, Any], said: str):
    assert in_words(AdaptConfig(**adapt)) == said
