"""A file's own blocks, sharded: the rows of several ranks are the file's, and train as one rank's do."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from tests.load.conftest import tiny_network, write_gguf
from tests.ranks.jobs import Job, fp_equal, make_tokens, train_job

pytestmark = pytest.mark.ranks
Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    write_gguf(root / "model.gguf", "llama", tiny_network("llama"), Q.Q4_1, kinds={"q_proj": Q.Q8_0, "down_proj": Q.Q4_0, "o_proj": Q.F16})
    make_tokens(root / "tokens")
    return root


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp", 2), ("fsdp", 4), ("ddp", 2)])
def test_n_ranks_on_a_mixed_file_equal_one_in_losses_weights_and_bytes(folder, pool, strategy, ranks):
    model = {"path": str(folder / "model.gguf"), "format": "stored"}
    single = Job(str(folder), run=f"one-{strategy}{ranks}", model=model, adapt={"method": "dora"}, rows_per_step=5)
    many = replace(single, run=f"many-{strategy}{ranks}", ranks=ranks, strategy=strategy)
    expected = train_job(single)
    for found in pool.run(ranks, train_job, many):
        for one, other in zip(expected["records"], found["records"], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-10)
        fp_equal(expected["weights"], found["weights"], 1e-8, 1e-8)  # as in test_laws.py
        for name, packed in expected["packed"].items():
            assert torch.equal(packed, found["packed"][name]), f"{name}: other bytes"
