"""fp16: the loss is scaled, a gradient that is not finite skips its step, and nothing that must be wide is narrow."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.adapt.attach import MAGNITUDE
from burnish.config import TrainConfig
from burnish.data.batches import Batches
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.model.head import head_loss
from burnish.model.network import packed
from burnish.runs import Run
from burnish.train import checkpoint, scaler
from burnish.train import run as training
from burnish.train.scaler import DOUBLED_AFTER, FLOOR, START, Scaler, begin
from tests.layers import a_linear, an_adapter, put
from tests.ranks.jobs import Job, make_tokens, train_job
from tests.tiny import ONE, a_plan, built_from, tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fp16")
    tiny_folder(root / "model", num_hidden_layers=1)
    make_tokens(root / "tokens")
    return root


def prepared(folder: Path, dtype: str = "fp16", **adapt: Any):
    built = built_from(folder / "model", adapt=adapt, plan=a_plan(dtype=dtype))
    return built, Batches(open_tokens(folder / "tokens"), 64, 2, 1, 0, 2, 1, seed=0)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"rows_per_step": 2, "steps": 6, "lr": 1e-2, "log": ()} | changes))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", MAGNITUDE)
def test_a_training_in_fp16_does_what_one_in_fp32_does(folder, tmp_path, method):
    losses, norms = {}, {}
    for dtype in ("fp16", "fp32"):
        built, batches = prepared(folder, dtype, method=method)
        training.train(built, batches, settings(schedule="constant"), Run(tmp_path / dtype), ONE)
        losses[dtype] = [record["loss"] for record in records(tmp_path / dtype)]
        norms[dtype] = [record["gradient_norm"] for record in records(tmp_path / dtype)]
    # 10 bits of fraction: a few thousandths of a loss of some nats after six steps
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=5e-3)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=5e-2)
    assert records(tmp_path / "fp16")[-1]["skipped"] == 0
    assert "loss_scale" not in records(tmp_path / "fp32")[-1]


def test_without_its_scale_the_smallest_gradients_would_be_lost(folder):
    built, batches = prepared(folder, method="lora")
    step = batches.step(0)

    def lost(scale: float) -> int:
        with packed(built.model):
            (built.model.loss_of(step.micro_batches[0]) / 1e5 * scale).backward()
        gradients = [adapter.b.grad for adapter in built.adapters.by_name.values()]
        zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
        for parameter in built.adapters.trainable().values():
            parameter.grad = None
        return zeros

    assert lost(1.0) > 10 * (lost(START) + 1)


def overflows(built: Any, times: int) -> None:
    """The first `times` backward passes give an infinite gradient."""
    left = [times]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if left[0]:
            left[0] -= 1
            return gradient * float("inf")
        return gradient

    next(iter(built.adapters.trainable().values())).register_hook(spoil)


def test_a_gradient_that_is_not_finite_skips_the_step_halves_the_scale_and_is_counted(folder, tmp_path):
    built, batches = prepared(folder)
    before = {name: parameter.detach().clone() for name, parameter in built.adapters.trainable().items()}
    overflows(built, 2)
    training.train(built, batches, settings(steps=2), Run(tmp_path), ONE)
    for name, parameter in built.adapters.trainable().items():
        assert torch.equal(parameter, before[name]), name
    assert [record["skipped"] for record in records(tmp_path)] == [1, 2]
    assert [record["gradient_norm"] for record in records(tmp_path)] == [None, None]
    assert records(tmp_path)[-1]["loss_scale"] == START / 4
    state = json.loads((checkpoint.newest(tmp_path / "3-train" / "checkpoints") / "state.json").read_text())
    assert (state["skipped"], state["scale"], state["since_scaled"]) == (2, START / 4, 0)


def test_a_run_resumed_after_a_skipped_step_equals_the_uninterrupted_one(folder, monkeypatch):
    """Adam has counted one step less than were done, and the scale is no longer the first one."""
    monkeypatch.setattr(scaler, "START", 2.0**23)
    shape = Job(str(folder), run="straight", dtype="fp16", rows_per_step=2, train={"steps": 8, "checkpoint_every": 5})
    straight = train_job(shape)
    skipped = [record["skipped"] for record in records(folder / "straight")]
    assert skipped[4] > 0, "the first scale was meant to be too large"
    assert skipped[4] == skipped[-1]
    broken = replace(shape, run="broken", break_after=6)
    train_job(broken)
    resumed = train_job(replace(broken, break_after=None))
    assert straight["records"][5:] == resumed["records"]
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    assert records(folder / "broken")[-1]["loss_scale"] == records(folder / "straight")[-1]["loss_scale"]


def test_a_gradient_that_no_scale_makes_finite_stops_the_run_with_what_to_do(folder, tmp_path):
    built, batches = prepared(folder)
    overflows(built, 1000)
    with pytest.raises(UserError, match=r"not finite even with.*model\.dtype=fp32"):
        training.train(built, batches, settings(steps=100), Run(tmp_path), ONE)
    assert records(tmp_path)[-1]["loss_scale"] == FLOOR


def test_a_loss_that_is_not_finite_is_an_error_in_fp16_too_and_says_why_it_may_be(folder, tmp_path):
    built, batches = prepared(folder)
    with torch.no_grad():
        built.model.get_output_embeddings().weight.mul_(1e5)
    with pytest.raises(UserError, match=r"the loss \((nan|inf)\).*65504: then train with model\.dtype=fp32"):
        training.train(built, batches, settings(), Run(tmp_path), ONE)


def test_the_scale_doubles_after_enough_good_steps_and_is_always_a_power_of_two():
    scaling = begin("fp16", START, 0)
    for _ in range(DOUBLED_AFTER - 1):
        scaling.taken()
    assert (scaling.scale, scaling.since) == (START, DOUBLED_AFTER - 1)
    scaling.taken()
    assert (scaling.scale, scaling.since) == (2 * START, 0)
    scaling.skipped()
    scaling.skipped()
    assert (scaling.scale, scaling.since) == (START / 2, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_nothing_is_scaled_in_any_other_dtype(dtype):
    scaling = begin(dtype, START, 0)
    gradient = torch.ones(2)
    scaling.unscale([gradient])
    scaling.taken()
    assert (scaling.scale, scaling.since, scaling.on) == (1.0, 0, False)
    assert torch.equal(gradient, torch.ones(2))


def test_unscaling_by_a_power_of_two_is_exact():
    gradient = torch.randn(1000)
    scaled = gradient * START
    Scaler(START, 0, True).unscale([scaled])
    assert torch.equal(scaled, gradient)


def test_doras_norm_stays_in_range_where_its_square_exceeds_fp16():
    """Rows of 128 numbers of 100: ‖W‖² is 1.28 million, W Aᵀ and A Aᵀ go beyond 65504 too."""
    layer = a_linear("none", torch.float16)
    put(layer, torch.full((48, 128), 100.0))
    adapter = an_adapter(layer, "dora")
    with torch.no_grad():
        adapter.a.fill_(50.0)
        adapter.b.fill_(0.01)
    adapter.refresh()
    update = adapter.scaling * (adapter.b.double() @ adapter.a.double())
    right = adapter.m.double() / torch.linalg.vector_norm(layer.weight.double() + update, dim=1)
    assert adapter.d.dtype == torch.float32
    torch.testing.assert_close(adapter.d.double(), right, rtol=1e-5, atol=0.0)


def test_a_sum_of_losses_beyond_65504_is_finite_and_so_is_its_gradient():
    """12000 tokens of some 8 nats each."""
    generator = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(16, 64, bias=False, dtype=torch.float16)
    hidden = (torch.randn(12000, 16, generator=generator) * 4).half().requires_grad_()
    targets = torch.randint(0, 64, (12000,), generator=generator)
    with torch.no_grad():
        head.weight.copy_(torch.randn(64, 16, generator=generator))
    loss = head_loss(head, hidden, targets)
    right = torch.nn.functional.cross_entropy(hidden.detach().double() @ head.weight.double().T, targets, reduction="sum")
    loss.backward()
    assert right > 65504
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(right.item(), rel=1e-3)
    assert hidden.grad.isfinite().all()
    assert hidden.grad.abs().max() > 0
