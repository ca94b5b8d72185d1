"""The whole path on a tiny model: documents and rows in, exports out; what is done is not done again, what stands is not overwritten."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import cli, pipeline
from burnish.config import RunConfig
from burnish.errors import UserError
from burnish.runs import Run, open_run, read_json, write_json
from burnish.summary import print_data, print_summary
from burnish.toml import load_config
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    tiny_folder(root / "model")
    rows = [{"instruction": f"When does boat {number} leave?", "input": "", "output": f"at {number}"} for number in range(12)]
    questions = [{"question": f"Boat {number} leaves when?", "answer": f"at {number}"} for number in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (root / "manual.md").write_text("# 1 Boats\n\nBoat 3 leaves at 3.\n\n# 2 Winter\n\nIn winter no boat leaves at all.\n")
    (root / "run.toml").write_text(
        """name = "whole"
[model]
path = "model"
[data]
documents = ["manual.md"]
extract = "recall"
rows = ["rows.jsonl"]
questions = ["questions.jsonl"]
held_out_sections = ["2 Winter"]
template = "chatml"
context = 128
[train]
steps = 3
rows_per_step = 2
log = ["stdout"]
[evaluate]
new_tokens = 4
resamples = 200
[export]
writers = ["peft", "transformers"]
dtype = "fp32"
"""
    )
    return root


def opened(folder: Path, *overrides: str) -> tuple[RunConfig, Run]:
    config = load_config(folder / "run.toml", (f'root="{folder}/runs"', *overrides))
    return config, open_run(config.root, config.name)


@pytest.fixture(scope="module")
def whole(folder) -> Run:
    config, run = opened(folder)
    outcome = pipeline.run_all(config, run)
    assert (outcome.steps_done, outcome.interrupted) == (3, False)
    return run


def test_every_stage_leaves_a_manifest_and_what_it_is_for(whole):
    for stage, product in (
        ("data", "rows.jsonl"),
        ("plan", "plan.json"),
        ("train", "adapter/adapter_model.safetensors"),
        ("evaluate", "report.json"),
        ("export", "transformers/model.safetensors"),
    ):
        assert (whole.stage(stage) / "manifest.json").exists()
        assert (whole.stage(stage) / product).exists()


def test_the_two_held_out_sets_are_never_mixed(whole):
    report = json.loads((whole.stage("evaluate") / "report.json").read_text())
    assert report["sets"].keys() == {"unseen_wording", "unseen_section"}
    assert "exact_match" in report["sets"]["unseen_wording"]["measures"]
    assert report["sets"]["unseen_section"]["measures"].keys() == {"loss"}


def test_the_merged_folder_answers_as_the_live_model_does(whole):
    report = json.loads((whole.stage("export") / "report.json").read_text())
    assert report["transformers"]["distance"]["max"] < 1e-4


def test_what_is_done_is_not_done_again(folder, whole):
    config, run = opened(folder)
    before = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.is_file()}
    pipeline.run_all(config, run)
    assert {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.is_file()} == before


def test_a_changed_evaluation_is_done_again_and_the_training_is_not(folder, whole):
    adapter = whole.stage("train") / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    config, run = opened(folder, "evaluate.resamples=300")
    pipeline.run_all(config, run)
    assert json.loads((run.stage("evaluate") / "report.json").read_text())["settings"]["resamples"] == 300
    assert adapter.stat().st_mtime_ns == before


def test_a_training_with_other_settings_is_refused_and_touches_nothing(folder, whole):
    config, run = opened(folder, "train.lr=1e-3")
    with pytest.raises(UserError, match=r"train\.lr: 0\.0002 → 0\.001(.|\n)*--name NAME(.|\n)*--redo train"):
        pipeline.run_all(config, run)
    assert (whole.stage("train") / "adapter" / "adapter_model.safetensors").exists()


def test_a_run_is_loaded_again_with_its_own_config(whole):
    built, template = pipeline.load(whole)
    assert built.adapters.switch.on
    assert template.name == "chatml"


@contextmanager
def planned_otherwise(run: Run, **changes: Any) -> Iterator[None]:
    """Inside the block the run's plan has these values."""
    plan = run.stage("plan") / "plan.json"
    before = plan.read_bytes()
    write_json(plan, read_json(plan) | changes)
    try:
        yield
    finally:
        plan.write_bytes(before)


def test_a_run_is_loaded_with_its_base_in_host_memory_where_the_plan_says_so(whole):
    expected = pipeline.load(whole)[0]
    with planned_otherwise(whole, offload_base_after=True):
        moved = pipeline.load(whole)[0]
    assert moved.plan.offload_base
    assert not expected.plan.offload_base
    prompt = torch.arange(2, 12)[None]
    one, other = (built.model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=1) for built in (expected, moved))
    assert torch.equal(one, other)
    with pipeline.as_base(moved, whole, pipeline.config_of(whole)):
        other = moved.model(prompt).logits
    with pipeline.as_base(expected, whole, pipeline.config_of(whole)):
        assert torch.equal(expected.model(prompt).logits, other)


def test_no_more_prompts_are_answered_at_a_time_than_the_plan_has_room_for(folder, whole, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "answer_prompts", lambda built, template, prompts, name, config, *_: seen.append(config.batch) or {})
    prompts = folder / "prompts.txt"
    prompts.write_text("When does boat 3 leave?\n")
    config = opened(folder)[0]
    for most in (0, 3, 99):
        with planned_otherwise(whole, evaluate_batch=most):
            pipeline.ask(config, whole, prompts)
    assert seen == [16, 3, 16]


def test_a_run_without_anything_held_out_is_exported_and_says_that_nothing_was_evaluated(folder, caplog, capsys):
    config, run = opened(folder, "name=bare", "data.questions=[]", "data.held_out_sections=[]")
    pipeline.run_all(config, run)
    assert "nothing is evaluated" in caplog.text
    assert (run.stage("export") / "peft").exists()
    print_summary(run)
    assert "Training: 3 steps" in capsys.readouterr().out


def test_evaluating_before_training_says_what_to_do_first(folder):
    config, run = opened(folder, "name=untrained")
    pipeline.prepare(config, run)
    with pytest.raises(UserError, match=r"holds no finished training\. Run `burnish train` first"):
        pipeline.evaluate(config, run)


@pytest.fixture(scope="module")
def of_sets(folder) -> tuple[RunConfig, Run]:
    """A run on a mixture of a named set and own rows, with general rows to replay, of which one is too long to be read."""
    general = [{"question": f"What is word {number}?", "answer": f"word {number}"} for number in range(11)] + [
        {"question": "?", "answer": "x" * 999}
    ]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in general))
    sources = '[{source="orca_math=questions.jsonl", weight=1}, {source="rows.jsonl", weight=3}]'
    nothing = (
        "data.rows=[]",
        "data.questions=[]",
        "data.documents=[]",
        "data.extract=none",
        "data.held_out_sections=[]",
        "data.template=auto",
    )
    config, run = opened(
        folder,
        "name=sets",
        *nothing,
        f"data.mixture={sources}",
        "data.replay=[general.jsonl]",
        "data.replay_share=0.2",
        "export.writers=[peft]",
    )
    pipeline.run_all(config, run)
    return config, run


def test_a_run_of_sets_is_trained_served_and_evaluated_with_the_sets_prompt(of_sets):
    _, run = of_sets
    assert pipeline.load(run)[1].name == "qna"
    report = json.loads((run.stage("evaluate") / "report.json").read_text())
    assert list(report["sets"]) == ["general"]
    assert report["sets"]["general"]["rows"] == 5


def test_other_general_rows_are_evaluated_anew_and_the_training_stands(of_sets, folder):
    config, run = of_sets
    (folder / "other.jsonl").write_text('{"question": "Which sky?", "answer": "blue"}\n')
    changed = replace(config, evaluate=replace(config.evaluate, general=(str(folder / "other.jsonl"),)))
    assert pipeline.evaluate(changed, run)["sets"]["general"]["rows"] == 1
    (folder / "other.jsonl").write_text('{"question": "Which sky?", "answer": "blue"}\n{"question": "Why?", "answer": "light"}\n')
    assert pipeline.evaluate(changed, run)["sets"]["general"]["rows"] == 2, "the file has changed"


def test_the_data_report_is_shown_with_each_source_and_what_was_left_out(of_sets, folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config, run = of_sets
    print_data(run, config, 0)
    shown = capsys.readouterr().out
    assert "orca_math=" in shown
    assert "4 samples of 4 rows in an epoch" in shown  # 12 rows of 3/4 make 16
    assert "12 samples of 12 rows in an epoch" in shown
    assert "replay: 4 samples of 4 rows in an epoch" in shown
    assert f"left out: {folder / 'general.jsonl'}:12: " in shown


def test_free_prompts_are_answered_on_the_command_line_and_kept(folder, whole, capsys, monkeypatch):
    (folder / "asked.txt").write_text("When does boat 3 leave?\n\nWho?\n")
    monkeypatch.setattr(
        "sys.argv", ["burnish", "evaluate", str(folder / "run.toml"), f'root="{folder}/runs"', "--prompts", str(folder / "asked.txt")]
    )
    monkeypatch.setenv("COLUMNS", "120")
    cli.main()
    shown = capsys.readouterr().out
    assert "When does boat 3 leave?" in shown
    kept = json.loads((whole.folder / "4-evaluate-prompts/asked.txt.json").read_text())
    assert [entry["line"] for entry in kept["answers"]] == [1, 3]
    assert kept["settings"]["new_tokens"] == 4
    assert kept["train"] == pipeline.training_digest(whole)


def test_a_file_without_prompts_ends_the_command_before_a_model_is_loaded(folder, whole, monkeypatch, capsys):
    (folder / "none.txt").write_text("\n")
    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(
        "sys.argv", ["burnish", "evaluate", str(folder / "run.toml"), f'root="{folder}/runs"', "--prompts", str(folder / "none.txt")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "none.txt is empty: it holds no prompts" in capsys.readouterr().err
