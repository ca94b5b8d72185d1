"""The whole path on rows that are no single questions: conversations, plain text, and some that are watched."""

import json

import pytest

from burnish import pipeline
from burnish.errors import UserError
from burnish.evaluate import generate as generating
from burnish.runs import open_run
from burnish.summary import print_data
from burnish.toml import load_config
from tests.tiny import tiny_folder

HISTORY = [("user", "Hi"), ("assistant", "Hello.")]


def chat(*said):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    tiny_folder(root / "model")
    turns = [[*HISTORY, ("user", f"Boat {at}?"), ("assistant", f"at {at}")] for at in range(10)]
    (root / "chat.jsonl").write_text("".join(chat(*turn) for turn in turns))
    (root / "asked.jsonl").write_text("".join(chat(*HISTORY, ("user", f"When boat {at}?"), ("assistant", f"at {at}")) for at in range(6)))
    (root / "book.txt").write_text("The ferry leaves the pier at dawn. " * 30)
    (root / "run.toml").write_text(
        f"""name = "chat"
root = "{root}/runs"
[model]
path = "model"
[data]
rows = ["chat.jsonl", "book.txt"]
questions = ["asked.jsonl"]
validation = 0.2
template = "chatml"
context = 128
[train]
steps = 3
rows_per_step = 2
validate_every = 2
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


def test_conversations_and_text_are_trained_watched_evaluated_and_exported(folder, monkeypatch, capsys):
    config = load_config(folder / "run.toml")
    run = open_run(config.root, config.name)
    prompts, real = [], generating._continue
    monkeypatch.setattr(
        generating, "_continue", lambda model, template, some, budget: prompts.extend(some) or real(model, template, some, budget)
    )
    pipeline.run_all(config, run)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [record["step"] for record in records if record.get("validation_loss", 0) > 0] == [2, 3]
    _, template = pipeline.load(run)
    asked = [template.prompt(f"When boat {at}?", [("Hi", "Hello.")]) for at in range(6)]
    assert sorted(prompts) == sorted(asked * 2)  # of base and tuned
    answers = [json.loads(line) for line in (run.stage("evaluate") / "answers.jsonl").read_text().splitlines()]
    assert answers[0]["history"] == [["Hi", "Hello."]]
    assert json.loads((run.stage("export") / "report.json").read_text())["transformers"]["distance"]["max"] < 1e-4
    monkeypatch.setenv("COLUMNS", "300")
    print_data(run, config, 0)
    shown = capsys.readouterr().out
    assert "chat.jsonl: 10 rows in the format messages (messages: a list of {role, content})" in shown
    assert "book.txt: 1 row in the format text (text)" in shown


def test_plain_text_alone_is_trained_and_exported(folder):
    more = ("name=text", 'data.rows=["book.txt"]', "data.questions=[]", "data.validation=0", "train.validate_every=0")
    config = load_config(folder / "run.toml", more)
    run = open_run(config.root, config.name)
    pipeline.run_all(config, run)
    assert json.loads((run.stage("export") / "report.json").read_text())["transformers"]["distance"]["max"] < 1e-4
    assert "validation_loss" not in run.metrics.read_text()


def test_watching_no_rows_is_refused_at_once(folder):
    config = load_config(folder / "run.toml", ("name=nothing", "data.validation=0"))
    with pytest.raises(UserError, match=r"train\.validate_every = 2, but data\.validation gives no rows"):
        pipeline.prepare(config, open_run(config.root, config.name))
