"""Rows of several sources, mixed and replayed, and rows that are only watched: two ranks train and measure what one does."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish import pipeline
from burnish.config import RunConfig, canonical
from burnish.data.tokens import open_tokens
from burnish.runs import Run, open_run, write_json
from burnish.toml import load_config
from tests.tiny import a_plan, tiny_folder

pytestmark = pytest.mark.ranks
MIXTURE = """
[[data.mixture]]
source = "boats.jsonl"
weight = 0.75
epochs = 2
[[data.mixture]]
source = "piers.jsonl"
weight = 0.25
"""
SOURCES = {"mixture": MIXTURE, "replay": 'rows = ["boats.jsonl"]\nreplay = ["piers.jsonl"]\nreplay_share = 0.4\n'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    tiny_folder(root / "model", hidden_size=64, intermediate_size=96, head_dim=16)
    for name, count in (("boats", 12), ("piers", 9), ("watched", 7)):
        rows = [{"instruction": f"{name} {at}?", "input": "", "output": f"{at} " * (1 + at % 5)} for at in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def prepared(folder: Path, name: str) -> tuple[RunConfig, Run]:
    """A run whose data are made and whose plan is not: that is this test's."""
    data = SOURCES[name]
    tables = data if data.startswith("\n") else ""
    (folder / f"{name}.toml").write_text(
        f"""name = "{name}"
root = "{folder}/runs"
[model]
path = "model"
dtype = "fp64"
block = 32
cache = false
[data]
{"" if tables else data}validation = ["watched.jsonl"]
template = "chatml"
context = 96
{tables}
[adapt]
rank = 4
[train]
steps = 5
rows_per_step = 5
lr = 1e-2
validate_every = 2
log = []
"""
    )
    config = load_config(folder / f"{name}.toml")
    run = open_run(config.root, config.name)
    pipeline.prepare(config, run)
    return config, run


def finetuned(config: RunConfig, run: Run, pool, ranks: int, strategy: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Records and adapter of a run on the same prepared data."""
    own = Run(run.folder.with_name(f"{run.folder.name}-{strategy}"))
    shutil.copytree(run.folder, own.folder)
    own.stage("plan").mkdir()
    write_json(
        own.stage("plan") / "plan.json", canonical(a_plan(ranks=ranks, strategy=strategy, dtype="fp64", accumulation=-(-5 // ranks)))
    )
    pool.run(ranks, pipeline._rank, canonical(replace(config, name=own.folder.name)), str(own.folder))
    records = [json.loads(line) for line in own.metrics.read_text().splitlines()]
    return records, load_file(own.stage("train") / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", SOURCES)
def test_two_ranks_train_the_rows_of_several_sources_and_watch_others_as_one_does(folder, pool, name):
    config, run = prepared(folder, name)
    data = run.stage("data")
    sizes = {kind: len(open_tokens(data / "tokens" / kind)) for kind in ("train", "validation")}
    assert sizes == {"train": {"mixture": 32, "replay": 20}[name], "validation": 7}
    expected, weights = finetuned(config, run, pool, 1, "single")
    assert [record["step"] for record in expected if "validation_loss" in record] == [2, 4, 5]
    assert expected[-1]["validation_loss"] < expected[1]["validation_loss"]
    for strategy in ("ddp", "fsdp"):
        records, found = finetuned(config, run, pool, 2, strategy)
        for one, other in zip(expected, records, strict=True):
            assert (other["tokens"], other["supervised"]) == (one["tokens"], one["supervised"])
            for what in ("loss", "gradient_norm"):
                assert other[what] == pytest.approx(one[what], rel=1e-10)
            assert other.get("validation_loss", 0.0) == pytest.approx(one.get("validation_loss", 0.0), rel=1e-8)  # of weights that agree so
        for part, weight in weights.items():
            torch.testing.assert_close(found[part], weight, rtol=1e-6, atol=1e-7)  # the adapter is saved in fp32
