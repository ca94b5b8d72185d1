"""Every row of the table of optimizers: resumed exactly, equal to what its library does by itself, refused where it cannot run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import TrainConfig
from burnish.errors import UserError
from burnish.train import blockwise
from burnish.train.blockwise import BLOCK, SMALL, decoded
from burnish.train.optimizer import OPTIMIZERS, build, moments, problems, set_rate, times_of
from tests.ranks.jobs import Job, check_resumed, make_tokens
from tests.tiny import tiny_folder

HERE = [name for name, kind in OPTIMIZERS.items() if not kind.paged]
PAGED = [name for name, kind in OPTIMIZERS.items() if kind.paged]
RATES = {"sgd": 0.05, "adadelta": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("optimizers")
    tiny_folder(root / "model", num_hidden_layers=1)
    make_tokens(root / "tokens")
    return root


def settings(name: str = "adamw", **changes: Any) -> TrainConfig:
    return TrainConfig(**({"optimizer": name, "lr": RATES.get(name, 1e-2), "log": ()} | changes))


def some_parameters(*shapes: tuple[int, ...]) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    names = ("layer.a", "layer.b", "layer.m")
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in zip(names, shapes, strict=False)}


def give_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("name", HERE)
def test_a_run_that_breaks_off_and_continues_equals_the_uninterrupted_one_bit_for_bit(folder, name):
    """Adapters of rank 64, so that their moments are large enough for 8 bits; those of the magnitudes are not."""
    job = Job(
        str(folder),
        run=f"{name}",
        dtype="fp32",
        adapt={"dropout": 0.1, "rank": 64},
        rows_per_step=2,
        train={"steps": 5, "checkpoint_every": 2, "optimizer": name, "lr": RATES.get(name, 1e-2), "weight_decay": 0.1, "lr_b": 0.03},
    )
    check_resumed(job)


def theirs(name: str, parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """What a user would write without burnish."""
    from bitsandbytes.optim import AdamW8bit

    adam = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.epsilon, "weight_decay": 0.1}
    return {
        "adamw": lambda: torch.optim.AdamW(parameters, **adam, fused=True),
        "adam": lambda: torch.optim.Adam(parameters, **adam, fused=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=0.1),
        "adadelta": lambda: torch.optim.Adadelta(parameters, lr=config.lr, rho=config.rho, eps=config.epsilon, weight_decay=0.1),
        "adamw8bit": lambda: AdamW8bit(parameters, **adam),
    }[name]()


@pytest.mark.parametrize("name", HERE)
def test_an_optimizer_does_what_its_library_does_by_itself(name):
    """Bit for bit over four steps; blocks of 256 that the last one does not fill, and a parameter too small for 8 bits."""
    config = settings(name, weight_decay=0.1)
    ours = some_parameters((67, 65), (5, 7))
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours.values()]
    assert ours["layer.a"].numel() > SMALL > ours["layer.b"].numel()
    one, other = build(ours, config), theirs(name, others, config)
    for step in range(4):
        give_gradients(list(ours.values()), step)
        give_gradients(others, step)
        set_rate(one, config.lr)
        one.step()
        other.step()
    for (part, parameter), right in zip(ours.items(), others, strict=True):
        assert torch.equal(parameter, right), part


@pytest.mark.parametrize("name", HERE)
def test_weight_decay_leaves_magnitudes_alone(name):
    parameters = some_parameters((70, 64), (8, 8), (40,))
    before = {part: parameter.detach().clone() for part, parameter in parameters.items()}
    update = build(parameters, settings(name, weight_decay=0.1))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    set_rate(update, 0.1)
    update.step()
    moved = {part for part, parameter in parameters.items() if not torch.equal(parameter, before[part])}
    assert moved == {"layer.a", "layer.b"}


def test_moments_of_8_bits_are_bytes_but_for_small_parameters():
    update = build(parameters := some_parameters((70, 64), (8, 8)), settings("adamw8bit"))
    kept = {(name, moment): tensor for name, moment, tensor in moments(update, parameters)}
    assert kept["layer.a", "state1"].dtype == kept["layer.a", "state2"].dtype == torch.uint8
    assert kept["layer.a", "absmax1"].shape == (-(-70 * 64 // BLOCK),)
    assert kept["layer.b", "state1"].dtype == torch.float32
    assert ("layer.b", "absmax1") not in kept


def test_sgd_without_momentum_keeps_nothing():
    update = build(parameters := some_parameters((4, 4)), settings("sgd", momentum=0.0))
    assert list(moments(update, parameters)) == []


def test_b_and_magnitudes_have_their_own_rates_under_one_schedule():
    """Plain SGD moves by rate × gradient, so that the rates can be read from the moves."""
    config = settings("sgd", momentum=0.0, lr=0.25, lr_b=4.0, lr_magnitude=0.125)
    parameters = some_parameters((4, 4), (4, 4), (4,))
    before = {part: parameter.detach().clone() for part, parameter in parameters.items()}
    update = build(parameters, config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    set_rate(update, 0.125)  # half of the highest
    update.step()
    for part, rate in {"layer.a": 0.125, "layer.b": 2.0, "layer.m": 0.0625}.items():
        torch.testing.assert_close(before[part] - parameters[part], torch.full_like(before[part], rate), rtol=1e-5, atol=1e-6)
    assert times_of("layer.a", settings()) == times_of("layer.b", settings()) == 1.0


@pytest.mark.parametrize(("setting", "what"), [("lr_magnitude", "magnitudes of DoRA"), ("lr_b", "matrices B")])
def test_a_rate_for_what_is_not_trained_is_refused(setting, what):
    with pytest.raises(UserError, match=rf"train\.{setting} is the rate of the {what}.*Leave it out"):
        build(some_parameters((4, 4)), settings(**{setting: 1e-3}))


@pytest.mark.parametrize("name", PAGED)
def test_paged_moments_are_refused_on_a_cpu_with_what_to_set_instead(name):
    instead = name.removeprefix("paged_")
    with pytest.raises(UserError, match=rf"{name}.*this run is on a CPU\. Set train\.optimizer={instead}\."):
        build(some_parameters((4, 4)), settings(name))
    assert instead in OPTIMIZERS
    assert problems(settings(name), "cuda", "single", "bf16") == []
    assert "cannot be sharded" in problems(settings(name), "cuda", "fsdp", "bf16")[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_computes_in_fp32_is_refused_in_float64(name):
    found = problems(settings(name), "cuda", "single", "fp64")
    assert bool(found) == bool(OPTIMIZERS[name].bits)
    assert not found or "bitsandbytes computes in fp32" in found[0]


@pytest.mark.parametrize("rows", [9, 10, 1])
def test_moments_that_several_ranks_saved_are_decoded_by_the_blocks_of_each(rows):
    """Each of three ranks quantizes its own rows from its first on; they differ by six orders, so that a wrong absmax shows."""
    shards, width = 3, 100
    whole = torch.randn(rows, width, generator=torch.Generator().manual_seed(4)) * 10.0 ** -torch.arange(rows)[:, None].clamp_max(6)
    per = -(-rows // shards)
    room = blockwise.blocks(per * width)
    codes, absmax = torch.zeros(rows, width, dtype=torch.uint8), torch.zeros(shards * room)
    expected = []
    for number, piece in enumerate(whole.split(per)):
        code = blockwise._codes(True, piece.device)
        own, most = torch.ops.bitsandbytes.quantize_blockwise(piece.contiguous(), code, BLOCK)
        codes[number * per : number * per + len(piece)] = own
        absmax[number * room : number * room + len(most)] = most
        expected.append(torch.ops.bitsandbytes.dequantize_blockwise(own, most, code, BLOCK, torch.float32))
    assert torch.equal(decoded(codes, absmax, shards, signed=True), torch.cat(expected))
    parameters = {"layer.a": torch.nn.Parameter(torch.zeros(64, 100))}
    update = build(parameters, settings("adamw8bit"))
    state = update.state[parameters["layer.a"]]
    saved = {name: torch.randint(0, 256, (64, 100), dtype=torch.uint8) for name in ("state1", "state2")}
    saved |= {name: torch.rand(3 * blockwise.blocks(22 * 100)) for name in ("absmax1", "absmax2")}
    update.recut(parameters["layer.a"], saved, 3)
    here = decoded(state["state2"], state["absmax2"], 1, signed=False)
    there = decoded(saved["state2"], saved["absmax2"], 3, signed=False)
    # a byte of this code book is off by at most 1 / 28 of its block's largest
    assert ((here - there).abs() <= saved["absmax2"].max() / 28).all()
    assert not torch.equal(here, torch.zeros_like(here))
