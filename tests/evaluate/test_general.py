"""What was forgotten is measured on rows that were not trained, and is told apart from what was learned."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from burnish.config import DataConfig, EvaluateConfig
from burnish.data.prepare import prepare
from burnish.errors import UserError
from burnish.evaluate import compare
from burnish.evaluate.compare import evaluate, sets_of
from burnish.evaluate.general import general_key, general_set
from burnish.evaluate.loss import losses
from burnish.evaluate.report import render
from tests.tiny import tiny_tokenizer

ASKED = EvaluateConfig(new_tokens=6, batch=4, resamples=200)


def written(path, name, count, extra=()):
    rows = [{"question": f"What is {name} {at}?", "answer": f"{name} {at}"} for at in range(count)] + list(extra)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    config = DataConfig(
        rows=(written(tmp_path / "rows.jsonl", "own", 9),),
        replay=(written(tmp_path / "general.jsonl", "lake", 21),),
        replay_share=0.25,
        template="chatml",
        context=128,
    )
    prepare(config, tiny_tokenizer(), tmp_path / "1-data", 256, "digest")
    return config


def test_replays_untrained_rows_are_a_set_of_their_own_with_an_interval(data, built, template, tmp_path):
    sets = sets_of(tmp_path / "1-data")
    assert list(sets) == ["general"]
    report = evaluate(built, template, sets, ASKED, 128, 1)["sets"]["general"]
    assert (report["rows"], list(report["measures"]), report["answers"]) == (10, ["loss"], [])
    loss = report["measures"]["loss"]
    sums, counts = losses(built, sets["general"].tokens, 128, 1)
    assert loss["tuned"]["value"] == pytest.approx(sums.sum() / counts.sum())
    assert loss["difference"]["low"] < loss["difference"]["value"] < loss["difference"]["high"]
    console = Console(width=100)
    with console.capture() as shown:
        console.print(render({"sets": {"general": report}}))
    assert "what their loss rises by was forgotten" in " ".join(shown.get().split())


def test_rows_of_the_evaluation_stand_in_for_replays(data, built, template, tmp_path):
    path = written(
        tmp_path / "other.jsonl", "sky", 7, [{"question": "What is own 3?", "answer": "?"}, {"question": "All?", "answer": "x" * 300}]
    )
    config = EvaluateConfig(general=(path,))
    with general_set(config, data, template, tmp_path / "1-data") as found:
        assert [row.answer for row in found["general"].rows] == [f"sky {at}" for at in range(7)], "neither trained nor too long"
        sums, counts = losses(built, found["general"].tokens, 128, 1)
        assert len(sums) == 7
        ids, mask = template.encode([("What is sky 0?", "sky 0")])
        assert (found["general"].tokens.sample(0)[0].tolist(), counts[0]) == (ids, sum(mask))
    with general_set(EvaluateConfig(general=(path,), general_limit=3), data, template, tmp_path / "1-data") as found:
        assert len(found["general"].rows) == 3


def test_plain_text_and_conversations_are_general_rows_too(data, template, tmp_path):
    (tmp_path / "book.txt").write_text("the pier is closed at night and the ferry leaves at dawn " * 60)
    turns = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, ("Who?", "Ada.", "And?", "Bob."), strict=True)
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    config = EvaluateConfig(general=(str(tmp_path / "book.txt"), str(tmp_path / "chats.jsonl")), general_limit=3)
    with general_set(config, data, template, tmp_path / "1-data") as found:
        tokens = found["general"].tokens
        assert [row.is_text for row in found["general"].rows] == [True, True, True, False], "the limit holds for a text's contexts"
        assert tokens.sample(3)[0].tolist() == template.encode([("Who?", "Ada."), ("And?", "Bob.")])[0]


def test_the_format_that_is_set_holds_for_general_rows_too(data, template, tmp_path):
    both = [{"text": f"Note {at} and more", "question": f"Say {at}.", "answer": str(at)} for at in range(3)]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in both))
    config = EvaluateConfig(general=(str(tmp_path / "both.jsonl"),))
    for form, texts in (("auto", [False] * 3), ("text", [True] * 3)):
        with general_set(config, replace(data, format=form), template, tmp_path / "1-data") as found:
            assert [row.is_text for row in found["general"].rows] == texts


def test_without_general_rows_there_is_no_set_of_them(data, template, tmp_path):
    with general_set(EvaluateConfig(), data, template, tmp_path / "1-data") as found:
        assert found == {}


def test_general_rows_of_which_none_is_left_are_refused_with_the_reason(data, template, tmp_path):
    same = written(tmp_path / "same.jsonl", "own", 9)
    long = written(tmp_path / "long.jsonl", "x" * 400, 1)
    for path, reason in ((same, "each is among the trained rows"), (long, r"long\.jsonl:1: \d+ tokens, more than the context's 128")):
        with pytest.raises(UserError, match=reason), general_set(EvaluateConfig(general=(path,)), data, template, tmp_path / "1-data"):
            pass
    with pytest.raises(UserError, match=r"evaluate\.general: 'guanacoo' is no data set and no file\. Did you mean guanaco\?"):
        general_key(EvaluateConfig(general=("guanacoo",)))


def test_the_key_follows_the_files_and_a_set_of_the_hub_is_none(tmp_path):
    path = written(tmp_path / "a.jsonl", "a", 2)
    config = EvaluateConfig(general=(path, "guanaco"))
    before = general_key(config)
    assert (before[0], list(before[1])) == (["a.jsonl", "guanaco"], ["1: a.jsonl"])
    written(tmp_path / "a.jsonl", "b", 2)
    assert general_key(config) != before


def test_a_data_folder_of_before_has_no_general_rows_and_is_read(data, tmp_path):
    (tmp_path / "1-data/general.jsonl").unlink()
    assert sets_of(tmp_path / "1-data", needed=False) == {}
    with pytest.raises(UserError, match="nothing to evaluate on"):
        sets_of(tmp_path / "1-data")


def test_the_metric_that_is_asked_for_marks_the_answers_and_names_the_measure(built, template, tmp_path, monkeypatch):
    rows = [{"question": f"Sum {at}?", "answer": f"first 1, then #### {at}"} for at in range(8)]
    for name in ("rows", "questions"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row | {"question": f"{name} {row['question']}"}) + "\n" for row in rows))
    config = DataConfig(rows=(str(tmp_path / "rows.jsonl"),), questions=(str(tmp_path / "questions.jsonl"),), template="chatml")
    prepare(config, tiny_tokenizer(), tmp_path / "1-data", 1024, "digest")
    monkeypatch.setattr(compare, "generate", lambda *_: [f"it is {at if at > 2 else 99}.00" for at in range(8)])
    sets = sets_of(tmp_path / "1-data")
    by_number = evaluate(built, template, sets, EvaluateConfig(metric="number", resamples=200), 128, 1)["sets"]["unseen_wording"]
    assert list(by_number["measures"]) == ["loss", "number_match", "overlap"]
    assert by_number["measures"]["number_match"]["tuned"]["value"] == 5 / 8
    assert by_number["measures"]["number_match"]["tuned"]["low"] < 5 / 8 < by_number["measures"]["number_match"]["tuned"]["high"]
    assert [entry["tuned"]["number_match"] for entry in by_number["answers"]] == [False] * 3 + [True] * 5
    by_words = evaluate(built, template, sets, EvaluateConfig(resamples=200), 128, 1)["sets"]["unseen_wording"]
    assert by_words["measures"]["exact_match"]["tuned"]["value"] == 0
    console = Console(width=90)
    with console.capture() as shown:
        console.print(render({"sets": {"unseen_wording": by_number}}))
    assert "same number, %" in shown.get()
