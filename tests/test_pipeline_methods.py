"""The whole path by methods that train weights themselves: the base is evaluated too, the run is loaded again, exported and talked to."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import pipeline
from burnish.config import RunConfig
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.evaluate.loss import losses
from burnish.runs import Run, open_run
from burnish.toml import load_config
from burnish.train import start
from burnish.train.start import check_start
from tests.ranks.jobs import make_tokens
from tests.tiny import ONE, built_from, tiny_folder, train_a_little, with_method

IDS = torch.arange(2, 30)[None]
METHODS = {
    "full": ("model.format=none", "adapt.method=full", "adapt.targets=[all]"),
    "expand": ("adapt.method=expand", "adapt.new_blocks=2"),
    "also": ("adapt.method=lora", "adapt.rank=4", "adapt.also=[embed_tokens]", "export.writers=[peft, transformers]"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    tiny_folder(root / "model", tie_word_embeddings=True)
    rows = [{"instruction": f"When does boat {number} leave?", "input": "", "output": f"at {number}"} for number in range(12)]
    questions = [{"question": f"Boat {number} leaves when?", "answer": f"at {number}"} for number in range(4)]
    for name, entries in (("rows", rows), ("questions", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries))
    (root / "run.toml").write_text(
        """name = "methods"
[model]
path = "model"
[data]
rows = ["rows.jsonl"]
questions = ["questions.jsonl"]
template = "chatml"
context = 128
[train]
steps = 3
rows_per_step = 2
log = []
[evaluate]
new_tokens = 3
resamples = 200
[export]
dtype = "fp32"
"""
    )
    return root


def opened(folder: Path, name: str) -> tuple[RunConfig, Run]:
    config = load_config(folder / "run.toml", (f'root="{folder}/runs"', f"name={name}", *METHODS[name]))
    return config, open_run(config.root, config.name)


@pytest.mark.parametrize("name", METHODS)
def test_the_whole_path_by_every_way_to_train_weights(folder: Path, name: str, caplog: pytest.LogCaptureFixture):
    config, run = opened(folder, name)
    with caplog.at_level(logging.INFO, "burnish"):
        assert pipeline.run_all(config, run).steps_done == 3
    assert ("with its new blocks the model equals its base: 0 nats apart at most" in caplog.text) == (name == "expand")
    report = json.loads((run.stage("evaluate") / "report.json").read_text())
    loss = report["sets"]["unseen_wording"]["measures"]["loss"]
    base = built_from(folder / "model", {"format": config.model.format})
    base.adapters.switch.on = False
    tokens = open_tokens(run.stage("data") / "tokens" / "unseen_wording")
    sums, counts = losses(base, tokens, 128, 1)
    assert loss["base"]["value"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)
    assert abs(loss["tuned"]["value"] - loss["base"]["value"]) > 1e-4
    exported = json.loads((run.stage("export") / "report.json").read_text())
    assert exported["transformers"]["distance"]["max"] < 1e-4
    built, _ = pipeline.load(run)
    sums, counts = losses(built, tokens, 128, 1)
    assert loss["tuned"]["value"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-6)
    before = built.model(IDS).logits
    with pipeline.as_base(built, run, config):
        assert not torch.equal(built.model(IDS).logits, before)
    assert torch.equal(built.model(IDS).logits, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("adapt.method=full", "model.format=none", "export.writers=[peft]"),
            r"export.writers has 'peft', which holds adapters, and adapt.method = 'full' has none",
        ),
        (("adapt.method=full", "export.writers=[transformers]"), r"model.format = 'nf4'.*Set model.format=none"),
        (("adapt.new_blocks=2",), "adapt.new_blocks = 2 is for adapt.method=expand"),
        (("adapt.method=expand", "export.writers=[peft]"), r"adapt\.new_blocks = 0: (.|\n)*export\.writers has 'peft'"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_plan_before_anything_is_trained(
    folder: Path, overrides: tuple[str, ...], message: str
):
    config = load_config(folder / "run.toml", (f'root="{folder}/runs"', "name=refused", *overrides))
    with pytest.raises(UserError, match=message):
        pipeline.decided_for(config)


def test_a_resumed_training_by_another_method_is_refused(folder: Path):
    config, run = opened(folder, "expand")
    pipeline.trained(config, run)
    other = replace(config, adapt=replace(config.adapt, new_blocks=1))
    with pytest.raises(UserError, match=r"adapt\.new_blocks: 2 → 1(.|\n)*--name NAME"):
        pipeline.trained(other, run)


# --- the check at every start


class _Batches:
    def __init__(self, folder: Path) -> None:
        from burnish.data.batches import Batches

        make_tokens(folder)
        self.step = Batches(open_tokens(folder), 64, 2, 1, 0, 2, 1, seed=0).step


def test_an_expanded_model_that_is_not_its_base_is_refused_before_the_first_step(folder: Path, tmp_path: Path):
    built = with_method(folder / "model", "expand")
    batches: Any = _Batches(tmp_path)
    check_start(built, batches, ONE)
    train_a_little(built)
    with pytest.raises(UserError, match=r"should equal its base before the first step, and differs from it by .* nats"):
        check_start(built, batches, ONE)
    assert built.adapters.switch.on


@pytest.mark.parametrize("method", ["lora", "full"])
def test_methods_that_add_no_blocks_are_not_delayed(folder: Path, method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start, "_losses", lambda *_, **__: pytest.fail("a forward pass"))
    check_start(with_method(folder / "model", method), None, ONE)  # pyright: ignore[reportArgumentType]
