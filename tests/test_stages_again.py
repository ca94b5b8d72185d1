"""Stages asked for again: what is done stands and says so, what was moved is known, and what is interrupted leaves nothing."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from burnish import cli, keys, pipeline
from burnish.config import RunConfig, canonical
from burnish.data import prepare as preparing
from burnish.data.key import data_keys
from burnish.errors import UserError
from burnish.load.pretrained import find_model, read_tokenizer, tokenizer_digest
from burnish.runs import Run, open_run, read_json, read_manifest, write_json
from burnish.summary import print_data
from burnish.toml import load_config
from tests.tiny import tiny_folder

STAGES = ("1-data", "2-plan", "3-train", "4-evaluate", "5-export")


def project(root: Path) -> Path:
    tiny_folder(root / "model")
    rows = [{"question": f"When does boat {at} leave?", "answer": f"at {at}", "section": "1 Boats"} for at in range(9)]
    rows += [{"question": "Who sails in winter?", "answer": "nobody", "section": "2 Winter"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "manual.md").write_text("# 1 Boats\n\nBoat 3 leaves at 3.\n\n# 2 Winter\n\nIn winter no boat leaves at all.\n")
    (root / "run.toml").write_text(
        'name = "one"\n[model]\npath = "model"\n[data]\ndocuments = ["manual.md"]\n'
        'rows = ["rows.jsonl"]\ntemplate = "chatml"\n'
        'context = 128\nheld_out_sections = 0.5\n[train]\nsteps = 2\nrows_per_step = 2\nlog = ["none"]\n'
        "[evaluate]\nresamples = 200\nnew_tokens = 2\n"
    )
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = project(tmp_path_factory.mktemp("again"))
    pipeline.run_all(*opened(root))
    return root


def opened(root: Path, *overrides: str) -> tuple[RunConfig, Run]:
    config = load_config(root / "run.toml", (f'root="{root}/runs"', *overrides))
    return config, open_run(config.root, config.name)


def said_when(root: Path, caplog: Any, *overrides: str) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "burnish"):
        pipeline.run_all(*opened(root, *overrides))
    return [Path(line.partition(":")[0]).name for line in caplog.messages if line.endswith(": unchanged")]


def as_evaluated(root: Path) -> str:
    """The setting that another test may have changed."""
    manifest = read_manifest(root / "runs" / "one" / "4-evaluate")
    assert manifest is not None
    return f"evaluate.resamples={manifest['key']['evaluate']['resamples']}"


def test_a_stage_that_is_not_done_again_says_so_in_one_line(trained, caplog):
    assert said_when(trained, caplog) == list(STAGES)
    assert said_when(trained, caplog, "evaluate.resamples=201") == ["1-data", "3-train", "5-export"]  # the plan's report speaks of it
    assert said_when(trained, caplog, "evaluate.resamples=201") == list(STAGES)


def test_a_project_that_was_moved_goes_on(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "moved")
    for name in ("rows.jsonl", "manual.md"):
        (trained / name).rename(trained / f"{name}.away")
    try:
        assert {"1-data", "3-train", "4-evaluate", "5-export"} <= set(said_when(tmp_path / "moved", caplog, as_evaluated(trained)))
    finally:
        for name in ("rows.jsonl", "manual.md"):
            (trained / f"{name}.away").rename(trained / name)


def test_data_and_trainings_of_the_version_before_are_known(trained, caplog):
    config, run = opened(trained)
    digest = tokenizer_digest(read_tokenizer(find_model(config.model, weights=False)))
    kept = {stage: read_manifest(run.stage(stage)) for stage in ("data", "train")}
    assert kept["data"] is not None
    assert kept["train"] is not None
    try:
        write_json(run.stage("data") / "manifest.json", kept["data"] | {"key": data_keys(config.data, digest)[1]})
        write_json(run.stage("train") / "manifest.json", kept["train"] | {"key": kept["train"]["key"] | {"stage": 1}})
        assert {"1-data", "3-train"} <= set(said_when(trained, caplog, as_evaluated(trained)))
        write_json(run.stage("train") / "manifest.json", kept["train"] | {"key": kept["train"]["key"] | {"stage": 1}, "done": False})
        with pytest.raises(UserError, match="stage: 1 → 2"):  # half of it in one order, half in another, is neither
            keys.check_same_training(config, run)
    finally:
        for stage, manifest in kept.items():
            write_json(run.stage(stage) / "manifest.json", manifest)


def test_other_data_never_take_the_place_of_what_a_training_was_made_from(trained):
    config, run = opened(trained, "data.seed=1")
    before = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.is_file()}
    with pytest.raises(
        UserError, match=r"3-train was trained on .*1-data, which these .* replace:\n  data\.seed: 0 → 1\n.*--redo data --redo train"
    ):
        pipeline.prepare(config, run)
    assert {file: file.stat().st_mtime_ns for file in run.folder.rglob("*") if file.is_file()} == before


def test_other_data_take_the_place_of_those_that_nothing_was_trained_on(trained):
    for seed in (0, 1):
        config, run = opened(trained, "name=data-alone", f"data.seed={seed}")
        pipeline.prepare(config, run)
    manifest = read_manifest(run.stage("data"))
    assert manifest is not None
    assert manifest["key"]["data"]["seed"] == 1


def test_a_finished_training_starts_no_processes(trained, monkeypatch):
    config, run = opened(trained)
    monkeypatch.setattr(pipeline, "launch", lambda *_: pytest.fail("processes were started"))
    decided = pipeline.plan_of(run)
    monkeypatch.setattr(pipeline, "plan", lambda *_: pipeline.Plan(**(canonical(decided) | {"ranks": 2, "strategy": "ddp"})))
    assert pipeline.trained(config, run).steps_done == 2


def test_held_out_sections_that_were_drawn_are_shown(trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config, run = opened(trained)
    report = read_json(run.stage("data") / "report.json")
    (held_out,) = report["held_out_sections"]
    print_data(run, config, 0)
    shown = capsys.readouterr().out
    assert f"held out: {held_out['section']} (manual.md, page 1)" in shown
    assert ": 1 document, 1 page" in shown
    trains = {json.loads(line)["section"] for line in (run.stage("data") / "rows.jsonl").read_text().splitlines()}
    assert held_out["section"] in {"1 Boats", "2 Winter"} - trains


# --- starts that fail or are stopped


def ends_with(code: int, *words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*words])
    assert ended.value.code == code


@pytest.mark.parametrize("wrong", ["data.rows=[none.jsonl]", "data.context=9999", "model.path=nowhere", "train.validate_every=1"])
@pytest.mark.parametrize("command", ["run", "plan", "evaluate"])
def test_a_start_that_fails_leaves_no_folder(trained, tmp_path, command, wrong):
    ends_with(
        2, command, str(trained / "run.toml"), f'root="{tmp_path}/all/runs"', wrong, *(["model.path=nowhere"] if command == "plan" else [])
    )
    assert list(tmp_path.glob("all")) == []


def test_an_empty_name_is_refused_and_not_taken_for_none(trained, capsys):
    ends_with(2, "data", str(trained / "run.toml"), "--name", "")
    assert "name = ''" in capsys.readouterr().err


def test_a_folder_that_was_there_stays(trained, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    ends_with(2, "run", str(trained / "run.toml"), f'root="{tmp_path}/runs"', "model.path=nowhere")
    assert list((tmp_path / "runs" / "one").iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name", "left"),
    [
        (preparing, "read_sections", []),
        (pipeline, "fill", ["1-data", "2-plan"]),
        (pipeline, "compare_models", ["1-data", "2-plan", "3-train"]),
    ],
    ids=["in data", "in load", "in evaluate"],
)
def test_ctrl_c_outside_a_step_ends_with_130_and_leaves_no_half_stage(trained, tmp_path, monkeypatch, capsys, module, name, left):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for stage in left:
        shutil.copytree(trained / "runs" / "one" / stage, tmp_path / "runs" / "one" / stage)
    monkeypatch.setattr(module, name, interrupted)
    ends_with(130, "run", str(trained / "run.toml"), f'root="{tmp_path}/runs"')
    assert "Interrupted. Nothing that was saved is lost; the same command continues." in capsys.readouterr().err
    found = {path.name for path in (tmp_path / "runs" / "one").iterdir()} if left else {path.name for path in tmp_path.glob("runs/one/*")}
    assert {name for name in found if name[0].isdigit() or name.startswith(".")} == set(left)


# --- where nobody looks


def test_on_a_pipe_long_work_says_a_line_now_and_then(monkeypatch, capsys):
    from burnish import words

    clock = [0.0]
    monkeypatch.setattr(words.time, "monotonic", lambda: clock[0])
    with cli._status() as progress:
        for second in range(35):
            clock[0] = float(second)
            progress(f"answers {second}")
    assert capsys.readouterr().err.splitlines() == ["answers 10", "answers 20", "answers 30"]


def test_on_a_pipe_a_training_says_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    from burnish import words
    from burnish.config import TrainConfig
    from burnish.train.progress import loggers

    clock = [0.0]
    monkeypatch.setattr(words.time, "monotonic", lambda: clock[0])
    record = {"step": 0, "loss": 1.5, "lr": 1e-3, "gradient_norm": 0.5, "tokens_per_s": 10.0, "memory_bytes": 10**9}
    with loggers(TrainConfig(log=("rich",)), Run(tmp_path), 30, 0) as tell:
        for step in range(1, 26):
            clock[0] = float(step)
            tell(record | {"step": step})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["train: step 10 of 30", "train: step 20 of 30"]
    assert "loss 1.5000" in lines[0]


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (24_100_000_000, "24.1 GB of 24.0 GB"),
        (24_010_000_000, "24.01 GB of 24.00 GB"),
        (24_000_001_000, "24.000001 GB of 24.000000 GB"),
        (24_000_000_000, "24.0 GB of 24.0 GB"),
        (90_000_000, "90 MB of 24.0 GB"),
    ],
)
def test_two_amounts_that_differ_are_not_said_to_be_the_same(count, said):
    from burnish.words import gb_of

    assert gb_of(count, 24_000_000_000) == said


@pytest.mark.parametrize(("count", "said"), [(24_000_000_000, "24.0 GB"), (24_000_000_001, "24.1 GB"), (99_000_001, "0.1 GB"), (1, "1 MB")])
def test_what_is_said_to_be_enough_is_never_less(count, said):
    from burnish.words import gb_enough

    assert gb_enough(count) == said


@pytest.mark.parametrize(("number", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")])
def test_one_is_no_plural(number, said):
    from burnish.words import counted

    assert counted(number, "row") == said
    assert counted(number, "process", "processes").endswith("process" if number == 1 else "processes")
