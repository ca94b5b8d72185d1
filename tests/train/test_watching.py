"""Where a training is shown, and what a closer look writes. None of it changes a weight."""

import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from burnish.config import TrainConfig
from burnish.data.batches import Batches
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.runs import Run
from burnish.train import progress, watch
from burnish.train import run as training
from burnish.train.progress import LOGGERS, loggers
from burnish.train.watch import check_profile
from tests.ranks.jobs import make_tokens
from tests.tiny import ONE, built_from, tiny_folder

RECORD = {"step": 3, "loss": 1.25, "lr": 1e-3, "gradient_norm": 0.5, "tokens_per_s": 10.0, "memory_bytes": 10**9}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"rows_per_step": 2, "steps": 4, "log": ()} | changes))


def shown_by(names: tuple[str, ...], folder: Path, *records: dict[str, Any]) -> None:
    with loggers(settings(log=names), Run(folder), 10, 2) as tell:
        for record in records or (RECORD,):
            tell(record)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(settings, folder) → the weights after four steps."""
    root = tmp_path_factory.mktemp("watching")
    tiny_folder(root / "model", num_hidden_layers=1)
    make_tokens(root / "tokens")

    def run(config: TrainConfig, folder: Path) -> dict[str, torch.Tensor]:
        built = built_from(root / "model")
        training.train(built, Batches(open_tokens(root / "tokens"), 64, 2, 1, 0, 2, 1, seed=0), config, Run(folder), ONE)
        return {name: parameter.detach() for name, parameter in built.adapters.trainable().items()}

    return run


def test_stdout_is_one_plain_line_for_each_step(tmp_path, capsys):
    shown_by(("stdout",), tmp_path, RECORD, RECORD | {"step": 4, "skipped": 2, "loss_scale": 1024.0})
    assert capsys.readouterr().out.splitlines() == [
        "step 3/10  loss 1.2500  lr 1.00e-03  10 tokens/s  1.00 GB",
        "step 4/10  loss 1.2500  lr 1.00e-03  10 tokens/s  1.00 GB  2 skipped, loss × 1024",
    ]


def test_a_bar_of_tqdm_stands_at_the_step_that_was_done(tmp_path, capsys):
    shown_by(("tqdm",), tmp_path)
    assert "3/10" in capsys.readouterr().err


def test_none_shows_nothing_and_the_metrics_are_written_all_the_same(tmp_path, capsys):
    shown_by(("none",), tmp_path)
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == RECORD


def test_several_places_are_told_at_once(tmp_path, capsys):
    shown_by(("stdout", "tqdm", "tensorboard"), tmp_path)
    told = capsys.readouterr()
    assert told.out.startswith("step 3/10")
    assert "3/10" in told.err
    assert list((tmp_path / "3-train" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("name", [name for name in LOGGERS if name != "wandb"])
def test_a_step_that_was_skipped_in_fp16_is_shown_everywhere(tmp_path, name):
    shown_by((name,), tmp_path, RECORD | {"gradient_norm": None, "skipped": 1, "loss_scale": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["skipped"] == 1


def test_without_wandb_its_name_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install burnish\[wandb\]"):
        shown_by(("stdout", "wandb"), tmp_path)


class Session:
    """As much of a run of wandb as we use."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finished")


def test_wandb_is_told_numbers_by_step_and_a_continued_run_has_the_same_id(tmp_path, monkeypatch):
    told: list[Any] = []
    fake = ModuleType("wandb")
    fake.init = lambda **asked: (told.append(asked), Session(told))[1]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(progress, "find_spec", lambda name: fake)
    folder = tmp_path / "ferry"
    folder.mkdir()
    shown_by(("wandb",), folder, RECORD | {"gradient_norm": None})
    shown_by(("wandb",), folder)
    first, numbers, end, second, *_ = told
    assert (first["name"], first["project"], first["resume"]) == ("ferry", "burnish", "allow")
    assert first["config"]["lr"] == settings().lr
    assert first["id"] == second["id"]
    assert numbers == (3, {"train/loss": 1.25, "train/lr": 1e-3, "train/tokens_per_s": 10.0, "train/memory_bytes": 10**9})
    assert end == "finished"


def test_a_profile_writes_a_trace_of_just_its_steps_and_changes_no_weight(trained, tmp_path):
    plain = trained(settings(), tmp_path / "plain")
    watched = trained(settings(profile=(1, 1, 2), memory_snapshot=True), tmp_path / "watched")
    for name, weight in plain.items():
        assert torch.equal(watched[name], weight), name
    (trace,) = (tmp_path / "watched" / "3-train" / "profile").iterdir()
    assert trace.name == "steps-3-to-4.json"
    events = json.loads(trace.read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert any(event.get("name") == "aten::mm" for event in events)
    assert not (tmp_path / "plain" / "3-train" / "profile").exists()


def test_a_profile_of_more_steps_than_there_are_is_refused_before_the_first(trained, tmp_path):
    with pytest.raises(UserError, match=r"train\.profile = \[1, 1, 3\].*5 in all; this run has 4 left"):
        trained(settings(profile=(1, 1, 3)), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    check_profile((1, 1, 2), 4)


def test_a_run_that_has_its_trace_is_continued_without_another(tmp_path):
    (tmp_path / "3-train" / "profile").mkdir(parents=True)
    (tmp_path / "3-train" / "profile" / "steps-1-to-2.json").write_text("{}")
    with watch.watched(settings(profile=(0, 0, 50)), Run(tmp_path), ONE, 4) as step:
        step()


def test_a_memory_snapshot_on_a_cpu_is_not_taken_and_that_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "burnish"), watch.watched(settings(memory_snapshot=True), Run(tmp_path), ONE, 4):
        pass
    assert "train.memory_snapshot is not taken" in caplog.text
    assert not (tmp_path / "3-train" / "memory").exists()


def test_a_memory_snapshot_is_written_however_the_training_ends(tmp_path, monkeypatch):
    """With the recorder of a GPU replaced: when it starts, when it writes, and that it stops."""
    told: list[Any] = []
    monkeypatch.setattr(watch, "_record_memory_history", lambda **asked: told.append(asked))
    monkeypatch.setattr(watch, "_dump_snapshot", lambda path: Path(path).write_bytes(b"history"))
    with pytest.raises(MemoryError), watch._snapshot(tmp_path / "memory", "cuda"):
        raise MemoryError
    assert (tmp_path / "memory" / "snapshot.pickle").read_bytes() == b"history"
    assert told == [{"max_entries": watch.ALLOCATIONS}, {"enabled": None}]


def test_wandb_itself_takes_what_it_is_told_offline(tmp_path, monkeypatch):
    """Where it is installed: twice, as a run that was interrupted would."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for _ in range(2):
        shown_by(("wandb",), tmp_path)
    written = sorted((tmp_path / "3-train" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2
    assert len({file.name for file in written}) == 1, "two ids"
