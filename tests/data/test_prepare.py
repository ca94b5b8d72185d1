import json
from dataclasses import replace

import pytest
from small_tokenizers import byte_tokenizer

from burnish.config import DataConfig, MixtureSource, canonical
from burnish.data.key import data_keys
from burnish.data.prepare import data_key, load_rows, prepare
from burnish.data.show import show
from burnish.data.template import choose_template
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.runs import file_digest

MANUAL = """# 1 Boats

The Heron is the flagship of the fleet.

# 2 Fares

## 2.1 Dogs

Dogs pay one mark for each crossing and must be kept on a short lead.
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "manual.md").write_text(MANUAL)
    rows = [
        {"question": "Which vessel leads?", "answer": "The Heron is the flagship."},
        {"question": "What do dogs pay?", "answer": "One mark for each crossing.", "page": 1, "section": "2.1 Dogs", "fact": "f2"},
        {"question": "Who is the king?", "answer": "Nobody knows his name here."},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "Name the flagship.", "answer": "Heron", "fact": "f1"}))
    paths = {
        key: (str(tmp_path / name),) for key, name in [("documents", "manual.md"), ("rows", "rows.jsonl"), ("questions", "questions.jsonl")]
    }
    return DataConfig(**paths, context=256)


def run(config, folder, tokenizer=None):
    return prepare(config, tokenizer or byte_tokenizer(), folder, 4096, "digest")


def refusal(config, folder):
    with pytest.raises(UserError) as caught:
        run(config, folder)
    return str(caught.value)


def test_everything_that_the_stage_promises_is_written(config, tmp_path):
    report = run(replace(config, extract="recall", held_out_sections=("2",)), tmp_path / "out")
    rows = load_rows(tmp_path / "out/rows.jsonl")
    assert [(row.line, row.page, row.section) for row in rows[:2]] == [(1, 1, "1 Boats"), (3, None, None)]
    assert rows[2].question == 'What does the section "1 Boats" say?'
    unseen = load_rows(tmp_path / "out/unseen_section.jsonl")
    assert [row.section for row in unseen] == ["2.1 Dogs", "2 Fares > 2.1 Dogs"]
    assert (report["documents"], report["sections"], report["train"]["rows"], report["train"]["rows_with_page"]) == (1, 2, 3, 2)
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    for name, count in {"train": 3, "unseen_section": 2, "unseen_wording": 1}.items():
        store = open_tokens(tmp_path / "out/tokens" / name)
        assert (len(store), int(store.lengths.sum())) == (count, report[name]["tokens"])
        assert store.supervised.min() > 0


def test_samples_hold_the_rows_that_they_name(config, tmp_path):
    run(replace(config, turns=2), tmp_path / "out")
    tokenizer = byte_tokenizer()
    template = choose_template(tokenizer, "auto", None)
    rows, store = load_rows(tmp_path / "out/rows.jsonl"), open_tokens(tmp_path / "out/tokens/train")
    assert sorted(number for sample in range(len(store)) for number in store.rows_of(sample)) == [0, 1, 2]
    assert sorted(len(store.rows_of(sample)) for sample in range(len(store))) == [1, 2]
    for sample in range(len(store)):
        turns = [(rows[number].question, rows[number].answer) for number in store.rows_of(sample)]
        assert (store.sample(sample)[0].tolist(), store.sample(sample)[1].tolist()) == template.encode(turns)


def test_a_conversation_ends_early_where_it_would_not_fit(config, tmp_path):
    single = run(config, tmp_path / "one")["train"]["longest_row"]
    report = run(replace(config, turns=3, context=single + 10), tmp_path / "out")
    store = open_tokens(tmp_path / "out/tokens/train")
    assert report["train"]["samples"] > 1
    assert store.lengths.max() <= single + 10
    assert sorted(number for sample in range(len(store)) for number in store.rows_of(sample)) == [0, 1, 2]


def long_row(config, tmp_path):
    answer = "\n\n".join(f"Paragraph {n} has a first sentence. It also has a second one, {'x' * 40}." for n in range(12))
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"question": "Tell all.", "answer": answer}) + "\n" + json.dumps({"question": "Short?", "answer": "Yes."})
    )
    return replace(config, questions=(), context=200), answer


def test_a_row_that_is_too_long_is_refused_with_its_place_and_length(config, tmp_path):
    config, _ = long_row(config, tmp_path)
    message = refusal(config, tmp_path / "out")
    assert "1 row is longer than data.context = 200 tokens" in message
    assert f"{tmp_path}/rows.jsonl:1: " in message
    assert "rows.jsonl:2" not in message


def test_a_row_that_is_too_long_is_dropped_and_reported(config, tmp_path):
    config, _ = long_row(config, tmp_path)
    report = run(replace(config, too_long="drop"), tmp_path / "out")
    assert report["train"]["rows"] == 1
    assert report["left_out"][0]["row"].endswith("rows.jsonl:1")
    assert "more than the context's 200" in report["left_out"][0]["reason"]


@pytest.mark.parametrize("answer", [None, "one sentence, " * 60, "x" * 900])
def test_a_row_that_is_too_long_is_split_without_losing_a_letter(config, tmp_path, answer):
    config, paragraphs = long_row(config, tmp_path)
    if answer:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Tell all.", "answer": answer}))
    run(replace(config, too_long="split"), tmp_path / "out")
    rows = [row for row in load_rows(tmp_path / "out/rows.jsonl") if row.line == 1]
    assert "".join("".join(row.answer.split()) for row in rows) == "".join((answer or paragraphs).split())
    assert [row.question for row in rows[:3]] == ["Tell all.", "Tell all. (continued, part 2)", "Tell all. (continued, part 3)"]
    assert open_tokens(tmp_path / "out/tokens/train").lengths.max() <= 200
    if answer is None:
        assert all(row.answer.startswith("Paragraph") and row.answer.endswith("x.") for row in rows)


def test_a_question_that_fills_the_context_alone_cannot_be_split(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "why " * 200, "answer": "So."}))
    assert "rows.jsonl:1: the question leaves no room" in refusal(replace(config, too_long="split"), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": 5000}, r"data.context = 5000 is more than the 4096 tokens"),
        ({"documents": (), "rows": ()}, "data names neither rows nor documents"),
        ({"rows": ()}, "Add data.rows, or set data.extract=recall"),
        ({"documents": (), "extract": "recall"}, "data.documents is empty"),
        ({"template": "lama"}, "no such template"),
        ({"held_out_sections": ("9",)}, "no heading has '9' in it"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, tmp_path, change, reason):
    assert reason in refusal(replace(config, **change), tmp_path / "out")


def test_a_trained_question_is_refused_as_unseen_wording(config, tmp_path):
    config = replace(config, questions=config.rows)
    assert "3 questions are trained in the same words" in refusal(config, tmp_path / "out")


def test_the_key_changes_with_every_input_and_with_nothing_else(config, tmp_path):
    key = data_key(config, "a")
    assert key == data_key(config, "a") == json.loads(json.dumps(key))
    assert key != data_key(config, "b")
    assert key != data_key(replace(config, seed=1), "a")
    for name in ("manual.md", "rows.jsonl", "questions.jsonl"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(before + "\n")
        assert key != data_key(config, "a")
        (tmp_path / name).write_text(before)
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="no such file"):
        data_key(config, "a")


def test_a_project_that_was_moved_has_the_key_that_it_had_and_other_bytes_or_names_have_not(config, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "rows.jsonl").write_text(json.dumps({"question": f"{name}?", "answer": name}))
        (tmp_path / "a" / name / "page.md").write_text(f"# {name}\n\nText.\n")

    def key(place):
        folders = (f"{place}/one/rows.jsonl", f"{place}/two/rows.jsonl")
        asked = replace(config, documents=(f"{place}/one", f"{place}/t*/*.md"), rows=folders, questions=())
        others = DataConfig(mixture=(MixtureSource(source=folders[0]), MixtureSource(source=f"alpaca={place}/two")), context=256)
        return [data_key(one, "digest") for one in (asked, others)]

    before = key(tmp_path / "a")
    assert before[0]["data"]["rows"] == ["rows.jsonl", "rows.jsonl (2)"]
    assert sorted(before[0]["files"]) == [
        "documents: *.md: two/page.md",
        "documents: one: page.md",
        "rows: rows.jsonl",
        "rows: rows.jsonl (2)",
    ]
    assert [part["source"] for part in before[1]["data"]["mixture"]] == ["rows.jsonl", "alpaca=two"]
    assert str(tmp_path) not in json.dumps(before)
    (tmp_path / "a").rename(tmp_path / "b")
    assert key(tmp_path / "b") == before
    (tmp_path / "b/two/page.md").rename(tmp_path / "b/two/other.md")
    assert key(tmp_path / "b")[0] != before[0]
    (tmp_path / "b/two/other.md").rename(tmp_path / "b/two/page.md")
    swapped = replace(config, rows=(f"{tmp_path}/b/two/rows.jsonl", f"{tmp_path}/b/one/rows.jsonl"))
    assert data_key(swapped, "digest") != data_key(replace(swapped, rows=swapped.rows[::-1]), "digest")


def test_documents_without_a_heading_are_said_to_give_no_row(config, tmp_path):
    (tmp_path / "manual.md").write_text("Text without a heading.\n")
    message = refusal(replace(config, rows=(), questions=(), extract="recall"), tmp_path / "out")
    assert "data.extract=recall found no heading with text under it in 1 section: Give files of rows with data.rows." in message


def test_a_folder_of_rows_is_told_from_one_that_is_missing(config, tmp_path):
    with pytest.raises(UserError, match=r"is a folder\. Name its files"):
        data_key(replace(config, rows=(str(tmp_path),)), "digest")


def test_the_key_that_an_earlier_version_wrote_is_known(config, tmp_path):
    """As version 3 wrote it: whole paths, and no number of processes."""
    _, old = data_keys(config, "digest")
    section = canonical(config)
    del section["processes"]
    digests = {str(tmp_path / name): file_digest(tmp_path / name) for name in ("manual.md", "rows.jsonl", "questions.jsonl")}
    assert old == {"stage": 3, "data": section, "files": digests, "tokenizer": "digest"}


def test_samples_are_shown_with_their_source_and_what_is_trained(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    run(config, tmp_path / "out")
    show(tmp_path / "out", byte_tokenizer(), 1)
    shown = capsys.readouterr().out.replace("\n", "")
    assert "⟦The Heron is the flagship.</s>⟧" in shown
    assert "Which vessel leads?" in shown
    assert "rows.jsonl:1, page 1, section 1 Boats" in shown


@pytest.mark.model
def test_130_real_rows_are_prepared_with_the_book_that_they_were_made_from(smollm2, real_data, tmp_path):
    book = real_data / "guidelines/uganda2023"
    rows = (str(book / "uganda_clinical_guidelines_alpaca_dataset.json"),)
    report = run(
        DataConfig(documents=(str(book / "UCG2023.pdf"),), rows=rows, held_out_sections=("2.3.3 Measles",)), tmp_path / "out", smollm2
    )
    assert report["train"]["rows"] + report["unseen_section"]["rows"] + len(report["left_out"]) == 130
    # Many of these answers are not in the book (data/README.md counts 72); those must not be given a page all the same.
    assert 30 <= report["train"]["rows_with_page"] < 125
