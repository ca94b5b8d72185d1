"""Adapters sit on the layers that were asked for and start from values that depend on a name and a seed alone."""

import math

import pytest
import torch

from burnish.adapt.attach import STARTS, draw_a, matching, scaling
from burnish.config import AdaptConfig
from burnish.errors import UserError
from tests.tiny import a_plan, built_from, tiny_folder

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = [f"{layer}.{part}.{kind}" for layer in range(2) for part, kinds in (("self_attn", KINDS[:4]), ("mlp", KINDS[4:])) for kind in kinds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), NAMES),
        (("q_proj",), [name for name in NAMES if name.endswith("q_proj")]),
        (("down_proj", "v_proj"), [name for name in NAMES if name.endswith(("down_proj", "v_proj"))]),
        (("q_proj", "all-linear"), NAMES),
    ],
)
def test_targets_choose_layers_by_their_last_name(targets, expected):
    assert matching(NAMES, targets) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_prj",), r"adapt\.targets: 'q_prj' is no linear layer .* Did you mean q_proj\?"),
        (("q_proj", "lm_head"), r"'lm_head' is no linear layer of this model's decoder\. Known: all-linear, down_proj"),
        (("proj",), "'proj' is no linear layer"),
        (("all_linear",), r"Did you mean all-linear\?"),
        ((), r"adapt\.targets is empty, so nothing would be trained\. Name some of down_proj, .*, or all-linear"),
    ],
)
def test_targets_that_match_nothing_are_refused_by_name(targets, message):
    with pytest.raises(UserError, match=message):
        matching(NAMES, targets)


def test_only_targets_are_adapted_and_everything_else_stays_frozen(folder):
    built = built_from(folder, adapt={"targets": ("q_proj", "up_proj")})
    adapted = {f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert set(built.adapters.by_name) == adapted
    trained = {name for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapted for part in ("a", "b", "m")} == set(built.adapters.trainable())


@pytest.mark.parametrize(("stabilized", "expected"), [(False, 32 / 16), (True, 32 / 4)])
def test_the_update_is_scaled_by_alpha_over_rank_or_its_root(stabilized, expected):
    assert scaling(AdaptConfig(rank=16, alpha=32, rank_stabilized=stabilized)) == expected


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_scaling_reaches_the_layers(folder, stabilized):
    built = built_from(folder, adapt={"rank": 4, "alpha": 6.0, "rank_stabilized": stabilized})
    assert {adapter.scaling for adapter in built.adapters.by_name.values()} == {6 / 2 if stabilized else 6 / 4}


def test_a_depends_on_name_and_seed_and_on_nothing_else():
    first = draw_a("model.layers.0.q_proj", 3, (8, 64), torch.float32)
    torch.manual_seed(99)
    draw_a("another", 3, (8, 64), torch.float32)
    assert torch.equal(draw_a("model.layers.0.q_proj", 3, (8, 64), torch.float32), first)
    assert not torch.equal(draw_a("model.layers.1.q_proj", 3, (8, 64), torch.float32), first)
    assert not torch.equal(draw_a("model.layers.0.q_proj", 4, (8, 64), torch.float32), first)


def test_drawing_a_leaves_torchs_own_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw_a("model.layers.0.q_proj", 3, (8, 64), torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_a_is_spread_as_pefts_is():
    """PEFT draws it by kaiming_uniform_ with a = √5: uniform within 1 / √in."""
    a, theirs = draw_a("x", 0, (64, 256), torch.float32), torch.empty(64, 256)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(1))
    assert a.abs().max() <= 1 / 16
    assert a.std().item() == pytest.approx(theirs.std().item(), rel=0.02)  # 16384 draws each
    assert a.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.01)


def test_a_normal_start_has_the_deviation_of_one_over_the_root_of_the_rank():
    a = draw_a("x", 0, (64, 256), torch.float32, "normal")
    assert a.std().item() == pytest.approx(1 / 8, rel=0.02)  # 16384 draws: 0.6 % is one deviation of it
    assert abs(a.mean().item()) < 4 / 8 / 128  # four deviations
    assert (a.abs() > 2 / 8).float().mean().item() == pytest.approx(0.0455, rel=0.2)  # as of a normal one
    assert torch.equal(draw_a("x", 0, (64, 256), torch.float32, "normal"), a)


@pytest.mark.parametrize("how", STARTS)
def test_the_start_that_is_asked_for_reaches_the_layers(folder, how):
    built = built_from(folder, adapt={"start": how})
    for name, adapter in built.adapters.by_name.items():
        assert torch.equal(adapter.a, draw_a(name, 0, tuple(adapter.a.shape), torch.float32, how))
        assert not adapter.b.any()


def test_every_layer_starts_with_its_own_a_zero_b_and_the_norm(folder):
    built = built_from(folder, {"format": "nf4"})
    for name, adapter in built.adapters.by_name.items():
        assert torch.equal(adapter.a, draw_a(name, 0, tuple(adapter.a.shape), torch.float32))
        assert not adapter.b.any()
        assert torch.equal(adapter.m, adapter.base.norm2.sqrt())
    assert len({adapter.a.detach().numpy().tobytes() for adapter in built.adapters.by_name.values()}) == 14


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.float32), ("fp64", torch.float64)])
def test_what_is_trained_is_at_least_fp32_and_the_rest_in_the_compute_dtype(folder, dtype, expected):
    built = built_from(folder, plan=a_plan(dtype=dtype))
    assert {parameter.dtype for parameter in built.adapters.trainable().values()} == {expected}
    assert built.model.get_input_embeddings().weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[dtype]


def test_a_model_is_built_with_its_dropout_off(folder):
    """What is evaluated first is not drawn at random; training turns dropout on itself."""
    built = built_from(folder, adapt={"dropout": 0.5})
    assert [name for name, module in built.model.named_modules() if module.training] == []
