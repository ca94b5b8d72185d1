"""Laws 3, 4 and 5 on gloo ranks: N ranks equal one, the gradient does not depend on the cut, resumed equals uninterrupted.

test_support.py has them for every method, format and strategy; here is what that table has not: other numbers of ranks, tied heads, bf16,
dropout, a change of ranks, a rank without rows.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks.jobs import Job, fp_equal, gathered_while_layers_run, make_tokens, train_job
from tests.tiny import METHOD_SECTIONS, tiny_folder

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    tiny_folder(root / "model", "qwen2")
    make_tokens(root / "tokens")
    return root


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tied")
    tiny_folder(root / "model", "gemma", tie_word_embeddings=True)
    make_tokens(root / "tokens")
    return root


MORE_RANKS = [
    ("fsdp", 2, "dora", "nf4", True),
    ("fsdp", 4, "dora", "nf4", False),
    ("fsdp", 4, "full", "none", False),
    ("ddp", 4, "lora", "none", False),
]


@pytest.mark.parametrize(("strategy", "ranks", "method", "form", "checkpointing"), MORE_RANKS)
def test_other_numbers_of_ranks_equal_one_in_losses_gradients_weights_and_bytes(folder, pool, strategy, ranks, method, form, checkpointing):
    """In float64 to 1e-10, so that a wrong divisor or a lost micro-batch cannot hide. Dropout is off: its draws differ by rank."""
    single = Job(
        str(folder),
        run=f"one-{strategy}{ranks}{method}{form}{checkpointing}",
        model={"format": form},
        adapt={"method": method} | METHOD_SECTIONS[method][1],
        rows_per_step=5,
    )
    many = replace(single, run=single.run.replace("one", "many"), ranks=ranks, strategy=strategy, checkpointing=checkpointing)
    expected = train_job(single)
    for found in pool.run(ranks, train_job, many):
        for one, other in zip(expected["records"], found["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-10)
            assert other["norm"] == pytest.approx(one["norm"], rel=1e-10)
        # Adam's first steps divide by a root of a square: a gradient of 1e-12 is as large as any other, so weights agree to 1e-8
        fp_equal(expected["weights"], found["weights"], 1e-8, 1e-8)
        for name, packed in expected["packed"].items():
            assert torch.equal(packed, found["packed"][name]), f"{name}: other bytes"


def test_embeddings_and_head_are_not_held_whole_while_layers_run(folder, pool):
    """They are the largest matrices of many models, and each is needed for a moment. Looked at forward and in the recomputation."""
    for seen in pool.run(2, gathered_while_layers_run, str(folder), 2):
        assert seen == {"embeddings": [False, False], "head": [False, False]}


TIED = [("ddp", 2, "full", ()), ("fsdp", 2, "full", ()), ("fsdp", 2, "dora", ("embed_tokens", "norm")), ("ddp", 2, "lora", ("lm_head",))]


@pytest.mark.parametrize(("strategy", "ranks", "method", "also"), TIED)
def test_n_ranks_train_a_tied_head_as_one_does(tied, pool, strategy, ranks, method, also):
    """Embeddings and head are one parameter with gradients from both ends."""
    adapt = {"method": method, "also": also}
    single = Job(str(tied), f"one-{strategy}{method}", model={"format": "none"}, adapt=adapt, rows_per_step=3)
    expected = train_job(single)
    many = replace(single, run=f"many-{strategy}{method}", ranks=ranks, strategy=strategy)
    for found in pool.run(ranks, train_job, many):
        for one, other in zip(expected["records"], found["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-10)
            assert other["norm"] == pytest.approx(one["norm"], rel=1e-10)
        fp_equal(expected["weights"], found["weights"], 1e-8, 1e-8)


@pytest.mark.parametrize(("strategy", "method", "form"), [("fsdp", "full", "none"), ("ddp", "full", "none"), ("fsdp", "expand", "nf4")])
def test_masters_in_fp32_are_trained_on_ranks_in_bf16_as_on_one(folder, pool, strategy, method, form):
    """The same micro-batches on both sides: only the order of fp32 sums differs, which bf16 then rounds to another value now and then."""
    adapt = {"method": method} | METHOD_SECTIONS[method][1]
    single = Job(str(folder), f"one16-{strategy}{method}", dtype="bf16", model={"format": form}, adapt=adapt)
    expected = train_job(single)
    assert {weight.dtype for weight in expected["weights"].values()} == {torch.float32}
    for found in pool.run(2, train_job, replace(single, run=f"two16-{strategy}{method}", ranks=2, strategy=strategy)):
        for one, other in zip(expected["records"], found["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "single"), (2, "ddp"), (2, "fsdp")])
def test_a_run_killed_in_mid_epoch_and_resumed_equals_the_uninterrupted_one_bit_for_bit(folder, pool, ranks, strategy):
    """fp32 with dropout: weights, losses and the rows that are seen. It breaks off two steps after its last checkpoint."""
    settings = {"steps": 7, "checkpoint_every": 3}
    job = Job(
        str(folder),
        run=f"straight-{strategy}",
        ranks=ranks,
        strategy=strategy,
        dtype="fp32",
        adapt={"dropout": 0.1},
        train=settings,
        rows_per_step=2,
    )

    def run(job: Job) -> list[dict]:
        return pool.run(ranks, train_job, job)

    straight = run(job)
    broken = replace(job, run=f"broken-{strategy}", break_after=5)
    first = run(broken)
    resumed = run(replace(broken, break_after=None))
    for whole_run, before, after in zip(straight, first, resumed, strict=True):
        assert len(before["records"]) == 5
        assert len(after["records"]) == 4, "continues from the checkpoint after step 3"
        assert before["records"][:3] + after["records"] == whole_run["records"]
        for name, weight in whole_run["weights"].items():
            assert torch.equal(weight, after["weights"][name]), name


@pytest.mark.parametrize(("before", "after"), [((1, "single"), (2, "fsdp")), ((4, "fsdp"), (2, "ddp")), ((2, "fsdp"), (1, "single"))])
def test_a_run_resumed_on_another_number_of_ranks_equals_the_uninterrupted_one(folder, pool, before, after):
    name = f"{before}-{after}"
    straight = train_job(Job(str(folder), run=f"straight{name}", train={"steps": 4}))
    start = Job(str(folder), run=f"moved{name}", ranks=before[0], strategy=before[1], train={"steps": 4}, break_after=2)
    pool.run(before[0], train_job, start)
    end = pool.run(after[0], train_job, replace(start, ranks=after[0], strategy=after[1], break_after=None))
    assert len(end[0]["records"]) == 2
    fp_equal(straight["weights"], end[0]["weights"], 1e-8, 1e-8)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_a_rank_without_supervised_tokens_neither_hangs_nor_changes_the_step(folder, pool, method):
    """One context a step on two ranks: the second gets a dummy micro-batch."""
    model, adapt = METHOD_SECTIONS[method][0], {"method": method} | METHOD_SECTIONS[method][1]
    job = Job(str(folder), run=f"lonely-{method}", rows_per_step=1, train={"steps": 2}, model=model, adapt=adapt)
    single = train_job(job)
    for strategy in ("ddp", "fsdp"):
        found = pool.run(2, train_job, replace(job, run=f"lonely-{method}-{strategy}", ranks=2, strategy=strategy))
        for one, other in zip(single["records"], found[1]["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-10)
