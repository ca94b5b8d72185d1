"""Moments of 8 bits on shards, and a skipped step of fp16 on several ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.train import scaler
from tests.ranks.jobs import Job, make_tokens, train_job
from tests.tiny import tiny_folder

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("optimizers")
    tiny_folder(root / "model", num_hidden_layers=1)
    make_tokens(root / "tokens")
    return root


# rank 66: neither the rows of A nor the numbers of B's shards are cut evenly into blocks of 256
EIGHT_BITS = {"optimizer": "adamw8bit", "steps": 5, "checkpoint_every": 2}


def job(folder: Path, run: str, ranks: int, strategy: str) -> Job:
    return Job(
        str(folder),
        run=run,
        ranks=ranks,
        strategy=strategy,
        dtype="fp32",
        adapt={"dropout": 0.1, "rank": 66},
        train=EIGHT_BITS,
        rows_per_step=2,
    )


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp"), (3, "fsdp"), (2, "ddp")])
def test_a_sharded_run_with_moments_of_8_bits_that_is_killed_and_resumed_equals_the_uninterrupted_one(folder, pool, ranks, strategy):
    name = f"{strategy}{ranks}"
    straight = pool.run(ranks, train_job, job(folder, f"straight-{name}", ranks, strategy))
    broken = job(folder, f"broken-{name}", ranks, strategy)
    first = pool.run(ranks, train_job, replace(broken, break_after=3))
    resumed = pool.run(ranks, train_job, broken)
    for whole_run, before, after in zip(straight, first, resumed, strict=True):
        assert len(after["records"]) == 3
        assert before["records"][:2] + after["records"] == whole_run["records"]
        for part, weight in whole_run["weights"].items():
            assert torch.equal(weight, after["weights"][part]), part
    moments = load_file(folder / f"straight-{name}" / "3-train" / "checkpoints" / "step-000005" / "moments.safetensors")
    assert {str(tensor.dtype) for tensor in moments.values()} == {"torch.uint8", "torch.float32"}


@pytest.mark.parametrize(("before", "after"), [((2, "fsdp"), (1, "single")), ((1, "single"), (3, "fsdp"))])
def test_moments_of_8_bits_go_over_to_another_number_of_ranks_but_for_their_rounding(folder, pool, before, after):
    """One step after the change: the moments it starts from are those that were saved, within a byte's rounding."""
    name = f"{before}-{after}"
    start = replace(job(folder, f"moved{name}", *before), adapt={"rank": 66}, train=EIGHT_BITS | {"steps": 3}, break_after=2)
    pool.run(before[0], train_job, start)
    alone = replace(start, run=f"straight{name}", break_after=None)
    straight = pool.run(before[0], train_job, alone)[0]
    end = pool.run(after[0], train_job, replace(start, ranks=after[0], strategy=after[1], break_after=None))[0]
    assert len(end["records"]) == 1
    # Adam moves a number by about the rate, 0.01, whatever its gradient: a lost or misplaced moment would show as half of that and more
    moved = torch.cat([(end["weights"][part] - weight).abs().flatten() for part, weight in straight["weights"].items()])
    assert moved.mean() < 2e-4
    assert (moved > 5e-3).float().mean() < 1e-3


def too_large_a_scale(job: Job) -> dict[str, Any]:
    """The job, with a first scale that fp16 cannot hold."""
    before, scaler.START = scaler.START, 2.0**24
    try:
        return train_job(job)
    finally:
        scaler.START = before


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_skip_the_same_steps_of_fp16(folder, pool, strategy):
    """A rank that skipped alone would hang the others, or train other weights."""
    shape = Job(str(folder), run=f"fp16-{strategy}", ranks=2, strategy=strategy, dtype="fp16", rows_per_step=2, train={"steps": 10})
    one, other = pool.run(2, too_large_a_scale, shape)
    assert one["skipped"] == other["skipped"]
    assert 0 < sum(one["skipped"]) < 10
    for part, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][part]), part
