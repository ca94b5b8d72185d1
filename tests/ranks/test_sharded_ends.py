"""Law 3 for quantized embeddings and head, tied or not, and for autocast: N ranks equal one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ranks.jobs import Job, fp_equal, make_tokens, train_job
from tests.tiny import tiny_folder

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for kind, family, changes in (("own", "qwen2", {}), ("tied", "gemma2", {"tie_word_embeddings": True})):
        found[kind] = tmp_path_factory.mktemp(kind)
        # 321 rows are cut evenly by no number of ranks, and each rank holds rows that others look up
        tiny_folder(found[kind] / "model", family, vocab_size=321, **changes)
        make_tokens(found[kind] / "tokens")
    return found


CELLS = [
    ("own", "int8", "fsdp", 2, True),
    ("own", "int4", "fsdp-grad", 2, False),
    ("own", "q8_0", "ddp", 2, False),
    ("tied", "nf4", "fsdp", 2, False),
    ("tied", "int8", "fsdp", 4, True),
    ("tied", "int4", "ddp", 2, True),
]


@pytest.mark.parametrize(("kind", "ends", "strategy", "ranks", "checkpointing"), CELLS)
def test_n_ranks_with_quantized_embeddings_equal_one(folders, pool, kind, ends, strategy, ranks, checkpointing):
    """In float64 to 1e-10; the second rank sometimes has no token to learn (one context in the last step)."""
    single = Job(str(folders[kind]), f"one-{ends}{strategy}", model={"ends": ends}, rows_per_step=3)
    many = replace(single, run=f"many-{ends}{strategy}{ranks}", ranks=ranks, strategy=strategy, checkpointing=checkpointing)
    expected = train_job(single)
    held = [name for name in expected["packed"] if name.endswith(".packed") and "layers" not in name]
    assert held == {"own": ["model.embed_tokens.table.packed", "lm_head.packed"], "tied": ["lm_head.packed"]}[kind]
    for found in pool.run(ranks, train_job, many):
        for one, other in zip(expected["records"], found["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-10)
            assert other["norm"] == pytest.approx(one["norm"], rel=1e-10)
        fp_equal(expected["weights"], found["weights"], 1e-8, 1e-8)  # as in test_laws.py
        assert expected["packed"].keys() == found["packed"].keys()
        for name, packed in expected["packed"].items():
            assert torch.equal(packed, found["packed"][name]), f"{name}: other bytes"


@pytest.mark.parametrize(("strategy", "method", "ends", "autocast"), [("fsdp", "dora", "int8", "bf16"), ("ddp", "lora", "none", "fp16")])
def test_ranks_under_autocast_train_as_one_does(folders, pool, strategy, method, ends, autocast):
    """The same micro-batches on both sides: only the order of fp32 sums differs, which 16 bits then round otherwise now and then."""
    model = {"ends": ends, "autocast": autocast}
    single = Job(str(folders["own"]), f"one-{autocast}", dtype="fp32", model=model, adapt={"method": method})
    expected = train_job(single)
    assert len(expected["skipped"]) == 4
    many = replace(single, run=f"two-{autocast}", ranks=2, strategy=strategy, checkpointing=True)
    for found in pool.run(2, train_job, many):
        assert found["skipped"] == expected["skipped"]
        for one, other in zip(expected["records"], found["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
