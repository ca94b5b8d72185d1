"""The loss on rows that are not trained: what it is, when it is measured, and that measuring changes nothing."""

import json

import numpy as np
import pytest
import torch

from burnish.data.batches import Batches
from burnish.data.tokens import open_tokens
from burnish.evaluate.loss import losses
from burnish.model.network import packed
from burnish.parallel.world import World
from burnish.runs import Run
from burnish.train import run as training
from burnish.train import validate
from burnish.train.validate import validation_loss
from tests.ranks.jobs import make_tokens
from tests.tiny import ONE, built_from, tiny_folder, train_a_little
from tests.train.test_training import settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    tiny_folder(root / "model")
    make_tokens(root / "tokens")
    make_tokens(root / "watched", samples=11, seed=5)
    return root


def test_it_is_the_mean_over_all_supervised_tokens(folder):
    built, tokens = built_from(folder / "model"), open_tokens(folder / "watched")
    train_a_little(built)
    sums, counts = losses(built, tokens, 64, 3)
    with packed(built.model):
        assert validation_loss(built, tokens, 64, ONE) == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)  # fp32, another order of sums


def test_ranks_share_the_samples_and_run_as_many_passes_each(folder, monkeypatch):
    tokens = open_tokens(folder / "watched")
    of = [list(validate._mine(tokens, 64, World(rank, 3, torch.device("cpu"), None))) for rank in range(3)]
    assert len({len(batches) for batches in of}) == 1
    assert sorted(sample for batches in of for batch in batches for sample in batch.samples) == list(range(11))
    built = built_from(folder / "model")
    sums, counts = losses(built, tokens, 64, 3)
    monkeypatch.setattr(validate, "total", lambda value, device: shares.append(value) or 1.0)
    shares: list[float] = []
    with packed(built.model):
        for rank in range(3):
            validation_loss(built, tokens, 64, World(rank, 3, torch.device("cpu"), None))
    assert sum(shares[::2]) == pytest.approx(sums.sum(), rel=1e-6)
    assert sum(shares[1::2]) == counts.sum()


@pytest.mark.parametrize("every", [0, 2])
def test_it_is_written_when_it_is_due_and_changes_no_weight(folder, tmp_path, every):
    weights = []
    for watched in (False, True):
        built = built_from(folder / "model", adapt={"dropout": 0.1})
        batches = Batches(open_tokens(folder / "tokens"), 64, 2, 1, 0, 2, 1, seed=0)
        tokens = open_tokens(folder / "watched")

        def measure(built=built, tokens=tokens) -> float:
            return validation_loss(built, tokens, 64, ONE)

        run = Run(tmp_path / str(watched))
        run.folder.mkdir()
        training.train(built, batches, settings(steps=5, validate_every=every), run, ONE, validate=measure if watched else None)
        weights.append([parameter.detach().numpy().copy() for parameter in built.adapters.trainable().values()])
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records if "validation_loss" in record] == ([2, 4, 5] if every else [5])
    assert all(np.array_equal(one, other) for one, other in zip(*weights, strict=True))
    assert "validation_loss" not in (tmp_path / "False" / "metrics.jsonl").read_text()
