"""One process: what is trained moves and nothing else does, bad values are never learned, what was saved is kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish.adapt.methods import METHODS
from burnish.config import TrainConfig
from burnish.data.batches import Batches
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.model.network import packed
from burnish.runs import Run
from burnish.train import checkpoint
from burnish.train import run as training
from burnish.train.optimizer import build, decays
from tests.ranks.jobs import Job, make_tokens, train_job
from tests.tiny import METHOD_SECTIONS, ONE, tiny_folder, with_method


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("train")
    tiny_folder(root / "model")
    make_tokens(root / "tokens")
    return root


def prepared(folder: Path, method: str = "dora", **adapt):
    built = with_method(folder / "model", method, **adapt)
    return built, Batches(open_tokens(folder / "tokens"), 64, 2, 1, 0, 2, 1, seed=0)


def settings(**changes) -> TrainConfig:
    return TrainConfig(**({"rows_per_step": 2, "steps": 6, "lr": 1e-2, "log": ()} | changes))


def run_in(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_only_what_is_trained_moves(folder, tmp_path, method):
    built, batches = prepared(folder, method=method)
    before = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    trained = {id(parameter) for parameter in built.adapters.trainable().values()}
    training.train(built, batches, settings(steps=25, schedule="constant"), run_in(tmp_path), ONE)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, parameter in built.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (id(parameter) in trained), f"{name} {'moved' if moved else 'did not move'}"


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(folder, tmp_path):
    built, batches = prepared(folder)
    adapters = list(built.adapters.by_name.values())
    before = adapters[0].b.detach().clone()
    with torch.no_grad():
        adapters[-1].a[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"not finite; the step was not taken.*rows of that batch: the rows of \(.*train\.lr"):
        training.train(built, batches, settings(), run_in(tmp_path), ONE, describe=lambda samples: f"the rows of {samples}")
    assert torch.equal(adapters[0].b, before)
    assert checkpoint.newest(tmp_path / "3-train" / "checkpoints").name == "step-000000"


def test_a_gradient_that_is_not_finite_stops_before_the_step(folder, tmp_path, monkeypatch):
    built, batches = prepared(folder)
    first = next(iter(built.adapters.trainable().values()))
    first.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(UserError, match="gradient's norm \\(nan\\)"):
        training.train(built, batches, settings(), run_in(tmp_path), ONE)
    assert not torch.isnan(first).any()


def test_the_first_save_comes_before_the_first_step(folder, tmp_path, monkeypatch):
    built, batches = prepared(folder)

    def full(*_, **__):
        raise UserError("the disk is full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(training, "take_step", lambda *_, **__: pytest.fail("trained before a save was tried"))
    with pytest.raises(UserError, match="disk is full"):
        training.train(built, batches, settings(), run_in(tmp_path), ONE)


def test_a_save_that_fails_leaves_the_checkpoint_before_it(folder, tmp_path, monkeypatch):
    built, batches = prepared(folder)
    real, saves = checkpoint.save_file, []

    def fills_up(tensors, path):
        saves.append(path)
        if len(saves) > 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    with pytest.raises(UserError, match=r"disk is full.*Nothing that was saved before is touched"):
        training.train(built, batches, settings(checkpoint_every=2), run_in(tmp_path), ONE)
    checkpoints = tmp_path / "3-train" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000000"]
    monkeypatch.setattr(checkpoint, "save_file", real)
    assert training.train(*prepared(folder), settings(), run_in(tmp_path), ONE).steps_done == 6


def test_the_newest_checkpoints_are_kept_and_older_ones_go(folder, tmp_path):
    training.train(*prepared(folder), settings(steps=6, checkpoint_every=1, keep=2), run_in(tmp_path), ONE)
    assert sorted(path.name for path in (tmp_path / "3-train" / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def test_a_checkpoint_holds_no_pickle_and_every_trained_tensor_with_its_moments(folder, tmp_path):
    built, batches = prepared(folder)
    training.train(built, batches, settings(steps=2), run_in(tmp_path), ONE)
    path = checkpoint.newest(tmp_path / "3-train" / "checkpoints")
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    weights, moments = load_file(path / "trainable.safetensors"), load_file(path / "moments.safetensors")
    assert weights.keys() == built.adapters.trainable().keys()
    assert moments.keys() == {f"{name}/{moment}" for name in weights for moment in ("exp_avg", "exp_avg_sq")}


def test_a_truncated_checkpoint_is_named_with_the_way_out(folder, tmp_path):
    training.train(*prepared(folder), settings(steps=2), run_in(tmp_path), ONE)
    path = checkpoint.newest(tmp_path / "3-train" / "checkpoints") / "moments.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"moments\.safetensors cannot be read.*Remove the folder step-000002"):
        training.train(*prepared(folder), settings(steps=4), run_in(tmp_path), ONE)


def test_a_checkpoint_of_another_run_is_refused(folder, tmp_path):
    training.train(*prepared(folder, method="dora"), settings(steps=2), run_in(tmp_path), ONE)
    with pytest.raises(UserError, match="belongs to another run"):
        training.train(*prepared(folder, method="lora"), settings(steps=4), run_in(tmp_path), ONE)


def test_what_a_killed_save_left_is_never_read(folder, tmp_path):
    checkpoints = tmp_path / "3-train" / "checkpoints"
    training.train(*prepared(folder), settings(steps=2), run_in(tmp_path), ONE)
    shutil.copytree(checkpoints / "step-000002", checkpoints / ".step-000009.123.partial")
    save_file({"x": torch.zeros(1)}, checkpoints / ".step-000009.123.partial" / "trainable.safetensors")
    assert checkpoint.newest(checkpoints).name == "step-000002"


def test_decay_is_for_matrices_and_not_for_magnitudes(folder):
    built, _ = prepared(folder)
    optimizer = build(built.adapters.trainable(), settings(weight_decay=0.1))
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]}
    for name, parameter in built.adapters.trainable().items():
        assert (id(parameter) in decayed) == (not name.endswith(".m"))
        assert decays(name, parameter) == (not name.endswith(".m"))


def test_prepared_moments_change_nothing_against_torchs_own_start(folder):
    """The optimizer's state is made before the first step; torch makes the same at it."""
    built, _ = prepared(folder)
    parameters = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in built.adapters.trainable().items()}
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters.values()]
    ours, theirs = build(parameters, settings()), torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0, fused=True)
    for _ in range(3):
        for one, other in zip(parameters.values(), others, strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(5))
            other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, other in zip(parameters.values(), others, strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def whole_step(folder) -> tuple[Job, list[dict[str, float]]]:
    """Steps of one micro-batch."""
    job = Job(str(folder), run="whole", rows_per_step=5, micro_batch=5, train={"steps": 3})
    return job, train_job(job)["records"]


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_steps_gradient_does_not_depend_on_its_cut(whole_step, micro_batch):
    """Random masks: a mean of means would differ."""
    job, records = whole_step
    cut = train_job(replace(job, run=f"cut-{micro_batch}", micro_batch=micro_batch))
    for one, other in zip(records, cut["records"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-12)
        assert other["norm"] == pytest.approx(one["norm"], rel=1e-12)


def test_clipping_scales_the_gradient_to_the_norm_that_was_asked(folder, tmp_path):
    """With plain Adam the size of a gradient cancels, so look at the gradients that the optimizer is given."""
    built, batches = prepared(folder)
    seen = []
    real = training.optimizer.build

    def watching(*arguments):
        update = real(*arguments)
        step = update.step
        update.step = lambda: (
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for g in update.param_groups for p in g["params"]]))) or step()
        )
        return update

    training.optimizer.build = watching
    try:
        training.train(built, batches, settings(steps=2, clip=0.01), run_in(tmp_path), ONE)
    finally:
        training.optimizer.build = real
    assert seen == pytest.approx([0.01, 0.01], rel=1e-3)


def test_a_steps_loss_is_the_mean_over_its_supervised_tokens(folder, tmp_path):
    built, batches = prepared(folder)
    step = batches.step(0)
    with packed(built.model):
        expected = torch.cat([built.model.losses_of(batch) for batch in step.micro_batches])
    assert len(expected) == step.supervised
    training.train(built, batches, settings(steps=1), run_in(tmp_path), ONE)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == pytest.approx(float(expected.double().mean()), rel=1e-5)


def test_no_stale_magnitude_gain_is_left_after_a_step(folder, tmp_path):
    built, batches = prepared(folder, method="dora")
    training.train(built, batches, settings(steps=3, schedule="constant"), run_in(tmp_path), ONE)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        as_left = built.model(ids).logits
        built.adapters.switch.advance()
        fresh = built.model(ids).logits
    assert torch.equal(as_left, fresh)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_breaks_off_and_continues_equals_the_uninterrupted_one_bit_for_bit(folder, method):
    """fp32, dropout, in mid-epoch, two steps after the last checkpoint."""
    model, adapt = METHOD_SECTIONS[method]
    shape = Job(
        str(folder),
        run=f"straight-{method}",
        dtype="fp32",
        model=model,
        adapt={"method": method, "dropout": 0.1} | adapt,
        rows_per_step=2,
        train={"steps": 7, "checkpoint_every": 3},
    )
    straight = train_job(shape)
    broken = replace(shape, run=f"broken-{method}", break_after=5)
    first, resumed = train_job(broken), train_job(replace(broken, break_after=None))
    assert first["records"][:3] + resumed["records"] == straight["records"]
    for name, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
