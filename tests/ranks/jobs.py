"""What tests run on ranks, and in this process for comparison: a short training of a tiny model."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from burnish.config import TrainConfig
from burnish.data.batches import Batches
from burnish.data.tokens import open_tokens, write_tokens
from burnish.model.network import packed
from burnish.parallel.rows import whole
from burnish.parallel.world import world
from burnish.runs import Run
from burnish.train import run as training
from tests.tiny import a_plan, built_from


@dataclass(frozen=True)
class Job:
    """One short training. `folder` holds `model/` and `tokens/`; the run goes to `folder/run`."""

    folder: str
    run: str = "run"
    ranks: int = 1
    strategy: str = "single"
    shard_ranks: int = 0
    micro_batch: int = 1
    rows_per_step: int = 4
    context: int = 64
    checkpointing: bool = False
    dtype: str = "fp64"
    device: str = "cpu"
    model: dict[str, Any] = field(default_factory=dict)
    adapt: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    """More of the plan: `offload_base`."""
    break_after: int | None = None
    """Raise after so many steps, as a killed process would end: only what was saved remains."""


class Killed(Exception):
    pass


def make_tokens(folder: Path, samples: int = 40, seed: int = 1, longest: int = 30) -> None:
    """Random samples whose masks differ, so that means of means differ from the mean."""
    random = np.random.default_rng(seed)

    def sample(number: int) -> tuple[list[int], list[int], tuple[int, ...]]:
        length = int(random.integers(4, longest))
        ids = random.integers(2, 300, length).tolist()
        mask = [0] * length
        trained = int(random.integers(1, length - 1))
        mask[-trained:] = [1] * trained
        return ids, mask, (number,)

    write_tokens(folder, (sample(number) for number in range(samples)))


def train_job(job: Job) -> dict[str, Any]:
    """Losses, gradient norms, final weights and moments (full tensors), and every tensor of the frozen base gathered."""
    plan = a_plan(
        device=job.device,
        ranks=job.ranks,
        strategy=job.strategy,
        shard_ranks=job.shard_ranks,
        dtype=job.dtype,
        micro_batch=job.micro_batch,
        accumulation=-(-job.rows_per_step // (job.ranks * job.micro_batch)),
        **({"checkpointing": job.checkpointing} | job.plan),
    )
    config = TrainConfig(**({"rows_per_step": job.rows_per_step, "steps": 4, "lr": 1e-2, "log": (), "checkpoint_every": 2} | job.train))
    with world(job.device, job.ranks) as here:
        built = built_from(Path(job.folder) / "model", job.model, job.adapt, plan, here)
        tokens = open_tokens(Path(job.folder) / "tokens")
        batches = Batches(tokens, job.context, job.rows_per_step, job.ranks, here.rank, job.micro_batch, plan.accumulation, seed=0)
        run = Run(Path(job.folder) / job.run)
        run.folder.mkdir(exist_ok=True)
        records: list[dict[str, Any]] = []
        outcome, recording = None, _breaking(job.break_after, records)
        try:
            with recording:
                outcome = training.train(built, batches, config, run, here)
        except Killed:
            pass
        weights = {name: whole(parameter).detach().clone() for name, parameter in built.adapters.trainable().items()}
        packed = {name: whole(parameter).clone() for name, parameter in built.model.named_parameters() if not parameter.requires_grad}
    return {"records": records, "weights": weights, "packed": packed, "outcome": outcome, "skipped": recording.skipped}


def check_resumed(job: Job) -> None:
    """A training of five steps that saves after every second and is broken off after three equals the uninterrupted one bit for bit."""
    straight, broken = train_job(job), replace(job, run=f"{job.run}-broken", break_after=3)
    first, resumed = train_job(broken), train_job(replace(broken, break_after=None))
    assert len(resumed["records"]) == 3
    assert first["records"][:2] + resumed["records"] == straight["records"]
    for part, weight in straight["weights"].items():
        assert torch.equal(weight, resumed["weights"][part]), part


def gathered_while_layers_run(folder: str, ranks: int) -> dict[str, list[bool]]:
    """Whether embeddings and head are whole on this rank when the last decoder layer runs, forward and backward."""
    with world("cpu", ranks) as here:
        built = built_from(Path(folder) / "model", {}, {}, a_plan(ranks=ranks, strategy="fsdp", checkpointing=True), here)
        ends = {"embeddings": built.model.get_input_embeddings(), "head": built.model.get_output_embeddings()}
        seen: dict[str, list[bool]] = {name: [] for name in ends}

        def look(*_: object) -> None:
            for name, module in ends.items():
                seen[name].append(not isinstance(module.weight, DTensor))

        built.layers[-1].self_attn.register_forward_pre_hook(look)  # inside the layer: hooks on it stay outside its recomputation
        tokens = open_tokens(Path(folder) / "tokens")
        step = Batches(tokens, 64, 2, ranks, here.rank, 1, 1, seed=0).step(0)
        with packed(built.model.train()):
            built.model.loss_of(step.micro_batches[0]).backward()
    return seen


class _breaking:
    """Records each step of the loop, and breaks off after some."""

    def __init__(self, after: int | None, records: list[dict[str, Any]]) -> None:
        self.after, self.records, self.skipped = after, records, []

    def __enter__(self) -> None:
        self.before = training.take_step

        def recorded(*arguments: Any, **named: Any):
            if self.after is not None and len(self.records) == self.after:
                raise Killed
            done = self.before(*arguments, **named)
            self.records.append({"loss": done.loss, "norm": done.gradient_norm})
            self.skipped.append(done.skipped)
            return done

        training.take_step = recorded

    def __exit__(self, *_: object) -> None:
        training.take_step = self.before


def fp_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float, absolute: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=relative, atol=absolute, msg=lambda text, name=name: f"{name}: {text}")
