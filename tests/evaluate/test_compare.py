import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from burnish.config import DataConfig, EvaluateConfig
from burnish.data.prepare import prepare
from burnish.errors import UserError
from burnish.evaluate import compare
from burnish.evaluate.compare import EvaluationSet, adapters_off, counter, evaluate, measures_of, sets_of, units_of, write
from burnish.evaluate.generate import generate
from burnish.evaluate.loss import losses
from burnish.evaluate.metrics import METRICS
from burnish.evaluate.report import MEASURES, TITLES, read, render, verdict
from tests.tiny import tiny_tokenizer

MANUAL = """# Boats

The Heron is the flagship of the fleet.

# Dogs

Dogs pay one mark for each crossing.
"""
ASKED = EvaluateConfig(new_tokens=6, batch=4, resamples=200)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "manual.md").write_text(MANUAL)
    rows = [{"question": f"Where is boat {at}?", "answer": f"At pier {at}.", "fact": f"f{at // 2}"} for at in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    asked = [{"question": f"Boat {at} lies at?", "answer": f"At pier {at}.", "fact": f"f{at // 2}", "page": 1} for at in range(16)]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in asked))
    config = DataConfig(
        documents=(str(folder / "manual.md"),),
        rows=(str(folder / "rows.jsonl"),),
        questions=(str(folder / "questions.jsonl"),),
        extract="recall",
        held_out_sections=("Dogs",),
        template="chatml",
        context=128,
    )
    prepare(config, tiny_tokenizer(), folder / "1-data", 256, "digest")
    return folder / "1-data"


@pytest.fixture(scope="module")
def report(built, template, data):
    return evaluate(built, template, sets_of(data), ASKED, 128, 2)


def test_the_two_sets_are_measured_apart(report):
    assert report["burnish"] == "evaluation/1"
    wording, section = report["sets"]["unseen_wording"], report["sets"]["unseen_section"]
    assert (wording["rows"], wording["units"], section["rows"]) == (16, 8, 1)
    assert list(wording["measures"]) == ["loss", "exact_match", "overlap"]
    assert list(section["measures"]) == ["loss"]
    assert section["answers"] == []
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_base_is_the_model_with_its_adapters_off_and_tuned_with_them_on(report, built, template, data):
    members = sets_of(data)["unseen_wording"]
    questions = [row.question for row in members.rows]
    for which, on in (("base", False), ("tuned", True)):
        built.adapters.switch.on = on
        sums, counts = losses(built, members.tokens, 128, 2)
        answers = generate(built, template, questions, ASKED.new_tokens, ASKED.batch)
        built.adapters.switch.on = True
        assert report["sets"]["unseen_wording"]["measures"]["loss"][which]["value"] == pytest.approx(sums.sum() / counts.sum())
        assert [entry[which]["answer"] for entry in report["sets"]["unseen_wording"]["answers"]] == answers
    loss = report["sets"]["unseen_wording"]["measures"]["loss"]
    assert loss["base"]["value"] != loss["tuned"]["value"]
    assert loss["difference"]["value"] == pytest.approx(loss["tuned"]["value"] - loss["base"]["value"])
    assert loss["difference"]["low"] < loss["difference"]["value"] < loss["difference"]["high"]


def test_each_answer_is_kept_with_its_place_and_its_scores(report, data):
    row = sets_of(data)["unseen_wording"].rows[3]
    entry = report["sets"]["unseen_wording"]["answers"][3]
    assert (entry["question"], entry["truth"]) == (row.question, row.answer) == ("Boat 3 lies at?", "At pier 3.")
    assert (entry["file"], entry["line"], entry["page"], entry["fact"]) == (row.file, 4, 1, "f1")
    assert entry["set"] == "unseen_wording"
    assert type(entry["tuned"]["exact_match"]) is bool
    assert 0 <= entry["tuned"]["overlap"] <= 1


def test_right_answers_are_counted(built, template, data, monkeypatch):
    """A base that always errs and a tuned model that errs on the first three rows of sixteen."""
    members = sets_of(data)["unseen_wording"]

    def scripted(model, *_, **__):
        wrong = 3 if model.adapters.switch.on else 16
        return ["no idea" if at < wrong else f"at pier {at}" for at in range(16)]

    monkeypatch.setattr(compare, "generate", scripted)
    measured = evaluate(built, template, {members.name: members}, ASKED, 128, 2)["sets"]["unseen_wording"]["measures"]["exact_match"]
    assert measured["base"] == {"value": 0, "low": 0, "high": 0}
    assert measured["tuned"]["value"] == measured["difference"]["value"] == pytest.approx(13 / 16)
    assert measured["tuned"]["low"] < 13 / 16 < measured["tuned"]["high"] <= 1
    assert measured["clear_of_zero"] is True


def test_the_switch_is_restored_even_after_an_error(built, template, data, monkeypatch):
    def fails(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(compare, "losses", fails)
    with pytest.raises(RuntimeError):
        evaluate(built, template, sets_of(data), ASKED, 128, 2)
    assert built.adapters.switch.on
    built.adapters.switch.on = False
    with adapters_off(built):
        assert not built.adapters.switch.on
    assert not built.adapters.switch.on
    built.adapters.switch.on = True


@pytest.mark.parametrize(("which", "advice"), [("base", "model.dtype=fp32"), ("tuned", "train.lr")])
def test_a_loss_that_is_not_finite_names_the_row_and_the_model(which, advice, built, template, data, monkeypatch):
    def poisoned(model, tokens, *rest):
        sums, counts = losses(model, tokens, *rest)
        if model.adapters.switch.on is (which == "tuned"):
            sums[2] = np.nan
        return sums, counts

    monkeypatch.setattr(compare, "losses", poisoned)
    with pytest.raises(UserError, match=rf"questions.jsonl:3: the loss of the {which} model on this row is nan.*{advice}"):
        evaluate(built, template, sets_of(data), ASKED, 128, 2)


def test_nothing_to_evaluate_on_names_both_ways_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "Who?", "answer": "Heron"}')
    prepare(DataConfig(rows=(str(tmp_path / "rows.jsonl"),), template="chatml"), tiny_tokenizer(), tmp_path / "1-data", 1024, "digest")
    with pytest.raises(UserError, match=r"data\.questions.*data\.held_out_sections"):
        sets_of(tmp_path / "1-data")


def test_an_empty_set_is_skipped(tmp_path, built, template):
    for name, question in (("rows", "Who?"), ("questions", "Which?")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": question, "answer": "Heron", "fact": "f1"}))
    config = DataConfig(rows=(str(tmp_path / "rows.jsonl"),), questions=(str(tmp_path / "questions.jsonl"),), template="chatml")
    prepare(config, tiny_tokenizer(), tmp_path / "1-data", 1024, "digest")
    assert list(sets_of(tmp_path / "1-data")) == ["unseen_wording"]


def test_rows_without_a_fact_are_units_of_their_own(data):
    rows = sets_of(data)["unseen_wording"].rows
    assert len(set(units_of(rows))) == 8
    assert len(set(units_of([replace(row, fact=None) for row in rows]))) == 16
    assert len(set(units_of([*rows, replace(rows[0], fact=None)]))) == 9


def test_too_few_rows_are_not_judged(built, template, data):
    members = sets_of(data)["unseen_section"]
    assert isinstance(members, EvaluationSet)
    loss = evaluate(built, template, {members.name: members}, ASKED, 128, 2)["sets"]["unseen_section"]["measures"]["loss"]
    assert loss["clear_of_zero"] is None
    assert "too few to tell" in verdict(loss, MEASURES["loss"].better)


def test_what_is_written_is_read_back_and_shown(report, tmp_path):
    write(report, tmp_path / "4-evaluate")
    found = read(tmp_path / "4-evaluate")
    assert "answers" not in found["sets"]["unseen_wording"]
    assert found["sets"]["unseen_wording"]["measures"] == report["sets"]["unseen_wording"]["measures"]
    lines = [json.loads(line) for line in (tmp_path / "4-evaluate/answers.jsonl").read_text().splitlines()]
    assert lines == report["sets"]["unseen_wording"]["answers"]
    console = Console(width=80)
    with console.capture() as shown:
        console.print(render(found))
    text = shown.get()
    loss = report["sets"]["unseen_wording"]["measures"]["loss"]
    assert f"[{loss['tuned']['low']:.3f}, {loss['tuned']['high']:.3f}]" in text
    assert f"{loss['difference']['value']:+.3f}" in text
    assert "…" not in text, "a cell is cut off on a terminal of 80 columns"
    assert "+0.0" in text  # of exact match, which random models never reach
    assert "16 rows about 8 facts" in text


def test_reading_refuses_what_is_missing_or_newer(tmp_path):
    with pytest.raises(UserError, match=r"no report\.json"):
        read(tmp_path)
    (tmp_path / "report.json").write_text('{"burnish": "evaluation/9"}')
    with pytest.raises(UserError, match="newer burnish"):
        read(tmp_path)


def test_every_measure_and_set_has_a_name_to_be_shown_by():
    assert set(TITLES) == set(compare.SETS)
    asked = [EvaluateConfig(metric=metric) for metric in METRICS]
    assert set(MEASURES) == {measure for name in compare.SETS for config in asked for measure in measures_of(name, config)}


@pytest.mark.parametrize(
    ("value", "clear", "better", "said"),
    [
        (-0.2, True, -1, "better"),
        (0.2, True, -1, "worse"),
        (0.2, True, 1, "better"),
        (-0.2, True, 1, "worse"),
        (0.2, False, 1, "not clear"),
    ],
)
def test_the_words_follow_the_sign_that_is_better(value, clear, better, said):
    assert verdict({"difference": {"value": value, "low": value - 0.3, "high": value + 0.3}, "clear_of_zero": clear}, better).startswith(
        said
    )


def test_progress_tells_the_start_and_each_tenth_once():
    told: list[str] = []
    advance = counter(told.append, "loss", 40)
    for _ in range(20):
        advance(2)
    assert told == ["loss", *(f"loss: {done} of 40" for done in range(4, 41, 4))]
