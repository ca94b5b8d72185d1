"""What a config names is what is trained: sets, mixtures and replay through the whole data stage."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from small_tokenizers import byte_tokenizer

from burnish.config import DataConfig, MixtureSource
from burnish.data.attribute import plain
from burnish.data.batches import Batches
from burnish.data.prepare import data_key, load_rows, prepare
from burnish.data.sources import MOST_GENERAL, template_name, trained_sources, untrained
from burnish.data.template import CHATML
from burnish.data.tokens import open_tokens
from burnish.errors import UserError
from burnish.toml import load_config


def questions(path: Path, name: str, count: int) -> str:
    entries = [{"question": f"What is {name} {at}?", "answer": f"{name} {at}"} for at in range(count)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return {name: questions(tmp_path / f"{name}.jsonl", name, count) for name, count in (("fees", 7), ("boats", 23), ("general", 31))}


def run(config: DataConfig, folder: Path, tokenizer=None):
    return prepare(replace(config, context=256), tokenizer or byte_tokenizer(), folder, 4096, "digest")


def refusal(config: DataConfig, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        run(config, folder / "refused")
    return str(caught.value)


def part(source: str, **settings) -> MixtureSource:
    return MixtureSource(source=source, **settings)


def trained(folder: Path) -> Counter:
    """How often each answer is trained in an epoch."""
    rows, store = load_rows(folder / "rows.jsonl"), open_tokens(folder / "tokens/train")
    return Counter(rows[row].answer for sample in range(len(store)) for row in store.rows_of(sample))


def test_a_set_is_prepared_with_its_own_prompt_even_where_the_model_has_a_template(files, tmp_path):
    config = DataConfig(sets=(f"orca_math={files['fees']}",), sets_limit=5)
    report = run(config, tmp_path / "out", byte_tokenizer(template=CHATML))
    assert (report["template"], report["train"]["rows"]) == ("qna", 5)
    assert report["sources"] == {config.sets[0]: {"rows": 5, "samples": 5, "tokens": report["train"]["tokens"]}}
    text = byte_tokenizer().decode(open_tokens(tmp_path / "out/tokens/train").sample(0)[0])
    assert text.startswith("###Question:\nWhat is fees")
    assert run(replace(config, template="own"), tmp_path / "own", byte_tokenizer(template=CHATML))["template"] == "own"


def test_rows_and_sets_are_trained_together_and_counted_apart(files, tmp_path):
    config = DataConfig(rows=(files["boats"],), sets=(f"gsm8k={files['fees']}",), template="chatml")
    report = run(config, tmp_path / "out")
    assert {name: (own["rows"], own["samples"]) for name, own in report["sources"].items()} == {
        files["boats"]: (23, 23),
        f"gsm8k={files['fees']}": (7, 7),
    }
    assert sum(own["tokens"] for own in report["sources"].values()) == report["train"]["tokens"]


def test_a_mixture_has_exactly_the_rows_that_its_weights_say(files, tmp_path):
    mixture = (part(files["fees"], weight=0.3, epochs=2), part(f"orca_math={files['boats']}", weight=0.7))
    report = run(DataConfig(mixture=mixture, template="chatml"), tmp_path / "out")
    # boats are used up first: 23 / 0.7 = 32.86, so 32 rows: 9.6 and 22.4
    assert {name: own["samples"] for name, own in report["sources"].items()} == {files["fees"]: 10, mixture[1].source: 22}
    times = trained(tmp_path / "out")
    assert (sum(times.values()), report["train"]["samples"]) == (32, 32)
    assert sorted(times[f"fees {at}"] for at in range(7)) == [1, 1, 1, 1, 2, 2, 2]
    assert sorted(times[f"boats {at}"] for at in range(23)) == [0] + [1] * 22
    store = open_tokens(tmp_path / "out/tokens/train")
    assert int(store.lengths.sum()) == report["train"]["tokens"]


def test_the_same_seed_gives_the_same_bytes(files, tmp_path):
    mixture = (part(files["fees"], weight=0.5), part(files["boats"], weight=0.5))
    config = DataConfig(mixture=mixture, replay=(files["general"],), replay_share=0.2, template="chatml")
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        run(replace(config, seed=seed), tmp_path / name)
    contents = {
        name: [file.read_bytes() for file in sorted((tmp_path / name / "tokens/train").iterdir())] for name in ("one", "two", "other")
    }
    assert contents["one"] == contents["two"] != contents["other"]


def test_a_training_goes_on_in_a_mixture_from_any_position(files, tmp_path):
    mixture = (part(files["fees"], weight=0.5, epochs=3), part(files["boats"], weight=0.5))
    run(DataConfig(mixture=mixture, template="chatml"), tmp_path / "out")

    def opened() -> Batches:
        return Batches(open_tokens(tmp_path / "out/tokens/train"), 128, 2, ranks=1, rank=0, micro_batch=1, accumulation=2, seed=3)

    whole = opened()
    steps = [whole.step(position).micro_batches for position in range(0, 40, 2)]  # over the end of an epoch
    assert whole.locate(39)[0] > 0
    for at in (0, 7, 19):
        again = opened().step(at * 2).micro_batches
        assert [batch.samples for batch in again] == [batch.samples for batch in steps[at]]
        assert [batch.ids.tolist() for batch in again] == [batch.ids.tolist() for batch in steps[at]]


def test_one_source_with_several_passes_is_a_mixture_too(files, tmp_path):
    report = run(DataConfig(mixture=(part(files["fees"], epochs=2),), template="chatml"), tmp_path / "out")
    assert report["sources"][files["fees"]]["samples"] == report["train"]["samples"] == 14


def test_extracted_rows_are_a_source_of_a_mixture(files, tmp_path):
    (tmp_path / "manual.md").write_text("# Boats\n\nThe Heron leads the fleet.\n\n# Dogs\n\nDogs pay one mark.\n")
    config = DataConfig(documents=(str(tmp_path / "manual.md"),), extract="recall", template="chatml")
    report = run(replace(config, mixture=(part("documents", epochs=3), part(files["fees"]))), tmp_path / "out")
    assert {name: (own["rows"], own["samples"]) for name, own in report["sources"].items()} == {"documents": (2, 6), files["fees"]: (7, 7)}
    assert "lacks the rows of data.extract" in refusal(replace(config, mixture=(part(files["fees"]),)), tmp_path)
    assert "no rows are made from them" in refusal(replace(config, extract="none", mixture=(part("documents"),)), tmp_path)


def test_replay_is_its_share_and_some_of_it_is_only_evaluated(files, tmp_path):
    config = DataConfig(rows=(files["boats"],), replay=(files["general"],), replay_share=0.25, template="chatml")
    report = run(config, tmp_path / "out")
    assert {name: own["samples"] for name, own in report["sources"].items()} == {files["boats"]: 23, "replay": 8}  # 23 / 3 = 7.67
    general = {row.answer for row in load_rows(tmp_path / "out/general.jsonl")}
    assert (len(general), report["general"]["rows"]) == (15, 15), "half of the 31, which are few"
    assert not general & set(trained(tmp_path / "out"))
    assert MOST_GENERAL == 200
    assert len(open_tokens(tmp_path / "out/tokens/general")) == 15


def test_general_rows_that_are_longer_than_the_context_are_left_out(files, tmp_path):
    with Path(files["general"]).open("a") as out:
        out.write(json.dumps({"question": "All?", "answer": "x" * 600}) + "\n")
    config = DataConfig(rows=(files["boats"],), replay=(files["general"],), replay_share=0.25, template="chatml")
    report = run(config, tmp_path / "out")
    assert [(gone["row"], gone["reason"].partition(" ")[2]) for gone in report["left_out"]] == [
        (f"{files['general']}:32", "tokens, more than the context's 256")
    ]
    Path(files["general"]).write_text('{"question": "Q", "answer": "A"}')
    assert "1 of its rows fits data.context = 256; replay needs two or more" in refusal(config, tmp_path)


def test_general_texts_and_conversations_are_replayed(files, tmp_path):
    texts = [{"text": f"The lake has pier {at}. " * 3} for at in range(6)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    chat = [
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Ada."},
        {"from": "human", "value": "And?"},
        {"from": "gpt", "value": "Bob."},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"conversations": chat[:2] if at else chat}) + "\n" for at in range(2)))
    general = (str(tmp_path / "texts.jsonl"), str(tmp_path / "chats.jsonl"))
    report = run(DataConfig(rows=(files["boats"],), replay=general, replay_share=0.25, template="chatml"), tmp_path / "out")
    assert report["sources"]["replay"]["samples"] == 8
    rows = load_rows(tmp_path / "out/rows.jsonl")[23:] + load_rows(tmp_path / "out/general.jsonl")
    assert sorted(row.is_text for row in rows) == [False] * 2 + [True] * 6
    (tmp_path / "book.txt").write_text("One text.")
    book = DataConfig(rows=(files["boats"],), replay=(str(tmp_path / "book.txt"),), replay_share=0.25, template="chatml")
    assert "replay needs two or more (a file of plain text is one" in refusal(book, tmp_path)


def test_a_question_that_replay_trains_is_refused_as_unseen_wording(files, tmp_path):
    config = DataConfig(
        rows=(files["boats"],), replay=(files["general"],), replay_share=0.25, questions=(files["general"],), template="chatml"
    )
    assert "are trained in the same words" in refusal(config, tmp_path)


def added(path: str, *entries: dict) -> None:
    with Path(path).open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(entry) + "\n" for entry in entries)


def all_trained(folder: Path) -> set[str]:
    return {row.question or row.answer for row in load_rows(folder / "rows.jsonl")}


def test_replay_trains_no_row_of_a_validation_file_and_no_text_of_it(files, tmp_path):
    text = {"text": "The lake has a pier."}
    (tmp_path / "watched").mkdir()
    watched = questions(tmp_path / "watched/watched.jsonl", "general", 31)
    (tmp_path / "watched/texts.jsonl").write_text(json.dumps(text) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [text] * 4))
    added(files["general"], *({"question": f"Of its own {at}?", "answer": "Yes."} for at in range(9)))
    replay = (files["general"], str(tmp_path / "texts.jsonl"))
    kept_apart = (watched, str(tmp_path / "watched/texts.jsonl"))
    config = DataConfig(rows=(files["boats"],), replay=replay, replay_share=0.25, validation=kept_apart, template="chatml")
    report = run(config, tmp_path / "out")
    seen = {row.question or row.answer for row in load_rows(tmp_path / "out/validation.jsonl")}
    assert len(seen) == 32
    assert not seen & all_trained(tmp_path / "out")
    assert any(question.startswith("Of its own") for question in all_trained(tmp_path / "out")), "the others are replayed"
    assert all("the validation row" in gone["reason"] for gone in report["left_out"])
    replayed = len(load_rows(tmp_path / "out/rows.jsonl")) - 23
    assert report["left_out_rows"] + replayed + report["general"]["rows"] == 31 + 9 + 4


def test_replay_trains_no_row_that_is_drawn_for_validation(files, tmp_path):
    questions(tmp_path / "again.jsonl", "boats", 23)
    added(str(tmp_path / "again.jsonl"), *({"question": f"Of its own {at}?", "answer": "Yes."} for at in range(9)))
    replay = (str(tmp_path / "again.jsonl"),)
    config = DataConfig(rows=(files["boats"],), replay=replay, replay_share=0.25, validation=0.3, template="chatml")
    run(config, tmp_path / "out")
    seen = {row.question for row in load_rows(tmp_path / "out/validation.jsonl")}
    assert seen
    assert not seen & all_trained(tmp_path / "out")


def test_replay_trains_nothing_of_a_held_out_section(files, tmp_path):
    dogs = "Dogs pay one mark for each crossing and must be kept on a short lead at all times."
    (tmp_path / "manual.md").write_text(f"# Of dogs\n\n{dogs}\n\n# Of cats\n\nCats travel free.\n")
    added(files["boats"], {"question": "What do dogs pay?", "answer": "One mark.", "section": "Of dogs"})
    (tmp_path / "asked.jsonl").write_text(json.dumps({"question": "A dog costs?", "answer": "One.", "section": "Of dogs"}) + "\n")
    copies = [{"question": question, "answer": "One."} for question in ("what do dogs PAY", "a dog costs")] + [{"text": dogs}]
    (tmp_path / "texts.jsonl").write_text((json.dumps(copies.pop()) + "\n") * 40)
    added(files["general"], *copies * 20)
    config = DataConfig(
        documents=(str(tmp_path / "manual.md"),),
        rows=(files["boats"],),
        questions=(str(tmp_path / "asked.jsonl"),),
        held_out_sections=("Of dogs",),
        replay=(files["general"], str(tmp_path / "texts.jsonl")),
        replay_share=0.25,
        template="chatml",
    )
    report = run(config, tmp_path / "out")
    assert len(load_rows(tmp_path / "out/unseen_section.jsonl")) == 2
    assert not {"what do dogs PAY", "a dog costs", dogs} & all_trained(tmp_path / "out")
    assert {gone["reason"].partition(f" {tmp_path}")[0] for gone in report["left_out"]} == {
        "holds a line of a held-out section",
        "asks what the held-out row",
    }


def sql_set(path: Path, count: int) -> str:
    entries = [{"context": "CREATE TABLE boats (a INT)", "question": f"Boat {at}?", "answer": f"SELECT {at}"} for at in range(count)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return f"sql={path}"


@pytest.mark.parametrize("template", ["chatml", "auto"])
@pytest.mark.parametrize("way", ["rows", "replay", "mixture"])
def test_what_a_set_keeps_apart_is_trained_from_no_other_source(files, tmp_path, way, template):
    """Under its own prompt (`auto`) the set has a heading between context and question, which other files do not have."""
    own = sql_set(tmp_path / "sql.jsonl", 40)
    entries = [{"question": f"CREATE TABLE boats (a INT)\n\nboat {at}", "answer": "SELECT 1"} for at in range(40)]
    added(files["general"], *entries)
    change = {
        "rows": {"sets": (own,), "rows": (files["general"],)},
        "replay": {"sets": (own,), "replay": (files["general"],), "replay_share": 0.25},
        "mixture": {"mixture": (part(own), part(files["general"]))},
    }[way]
    report = run(DataConfig(template=template, **change), tmp_path / "out")
    assert report["template"] == {"auto": "qna"}.get(template, template)
    seen = {plain(row.question.split("\n")[-1]) for row in load_rows(tmp_path / "out/unseen_section.jsonl")}
    asked = {plain(question.split("\n")[-1]) for question in all_trained(tmp_path / "out")}
    assert len(seen) == 4, "a tenth of the set"
    assert not seen & asked
    assert len({question for question in asked if question.startswith("boat")}) == 36
    gone = [entry["reason"] for entry in report["left_out"] if "that a data set keeps apart" in entry["reason"]]
    assert way == "replay" or len(gone) == 4
    assert gone


def test_general_rows_that_the_own_rows_train_are_not_evaluated(files, tmp_path):
    questions(tmp_path / "again.jsonl", "boats", 23)
    config = DataConfig(
        rows=(files["boats"],), replay=(str(tmp_path / "again.jsonl"), files["general"]), replay_share=0.25, template="chatml"
    )
    report = run(config, tmp_path / "out")
    seen = {row.question for row in load_rows(tmp_path / "out/general.jsonl")}
    assert seen
    assert not seen & all_trained(tmp_path / "out")
    assert {gone["reason"] for gone in report["left_out"]} == {"a row that is trained asks or says the same"}


def test_the_format_that_is_set_holds_for_replay_too(files, tmp_path):
    both = [{"text": f"Note {at}", "instruction": f"Say {at}.", "output": str(at)} for at in range(6)]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in both))
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"Own {at} and more."}) + "\n" for at in range(6)))
    config = DataConfig(
        rows=(str(tmp_path / "own.jsonl"),), format="text", replay=(str(tmp_path / "both.jsonl"),), replay_share=0.25, template="chatml"
    )
    run(config, tmp_path / "out")
    assert {row.is_text for row in load_rows(tmp_path / "out/rows.jsonl") + load_rows(tmp_path / "out/general.jsonl")} == {True}


def test_rows_that_ask_what_was_trained_tell_nothing_of_forgetting(files):
    rows = load_rows_of(files["fees"])
    assert untrained(rows, rows[2:]) == rows[:2]


def load_rows_of(path: str):
    from burnish.data.rows import read_rows

    return read_rows(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sets": ("alpcaa",)}, "'alpcaa': no such data set. Did you mean alpaca?"),
        ({"sets": ("alpcaa=FEES",)}, "'alpcaa': no such data set. Did you mean alpaca?"),
        ({"sets": ("alpaca=gone.json",)}, "gone.json: no such file or folder. Check data.sets: alpaca=PATH."),
        ({"mixture": ({"source": "orca_mth"},)}, "data.mixture: 'orca_mth' is no data set and no file. Did you mean orca_math?"),
        ({"mixture": ({"source": "gone.jsonl"},)}, "gone.jsonl: no such file. data.mixture names data sets, or files of rows"),
        ({"mixture": ({"source": "FOLDER"},)}, "is a folder. data.mixture names data sets"),
        ({"mixture": ({"source": "FEES", "weight": 0.0},)}, "the weights sum to 0"),
        (
            {"rows": ("BOATS",), "mixture": ({"source": "FEES"},)},
            "stands in the place of data.rows and data.sets, but data.rows is given too",
        ),
        ({"rows": ("FEES",), "replay_share": 0.1}, "data.replay_share = 0.1, but data.replay names no rows"),
        ({"rows": ("FEES",), "replay": ("BOATS",)}, "data.replay names rows, but data.replay_share is 0"),
        ({"rows": ("FEES",), "replay": ("FEES",), "replay_share": 0.1}, "is named twice: by "),
        ({"mixture": ({"source": "FEES"},), "turns": 2}, "data.mixture counts rows one by one, but data.turns = 2"),
        ({"sets": ("sql=FEES", "alpaca=BOATS")}, "alpaca the template 'alpaca_full' has. Choose one for all with data.template"),
        ({"sets": ("sql=FEES",)}, "7 entries are none of the data set sql"),
        ({"template": "own", "rows": ("FEES",)}, "data.template = 'own', but the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_gathered_is_refused(files, tmp_path, change, reason):
    def real(text: str) -> str:
        return text.replace("FEES", files["fees"]).replace("BOATS", files["boats"]).replace("FOLDER", str(tmp_path))

    for key in ("sets", "rows", "replay"):
        change = change | ({key: tuple(real(text) for text in change[key])} if key in change else {})
    if "mixture" in change:
        change = change | {"mixture": tuple(MixtureSource(**part | {"source": real(part["source"])}) for part in change["mixture"])}
    assert reason in refusal(DataConfig(**change), tmp_path)


def test_replay_chooses_no_template_and_one_set_chooses_for_all(files):
    assert template_name(DataConfig(rows=(files["fees"],), replay=("alpaca",), replay_share=0.1)) == "auto"
    assert template_name(DataConfig(rows=(files["fees"],), sets=("alpaca", "gsm8k"))) == "alpaca_full"
    assert template_name(DataConfig(mixture=(part("sql"), part("orca_math=gone.json")))) == "qna", "the file may be gone when it is served"
    assert template_name(DataConfig(sets=("sql", "alpaca"), template="chatml")) == "chatml"


def test_the_key_follows_the_files_of_sets_mixtures_and_replay(files):
    for config in (
        DataConfig(sets=(f"gsm8k={files['fees']}",)),
        DataConfig(mixture=(part(files["fees"]),)),
        DataConfig(rows=(files["boats"],), replay=(files["fees"],), replay_share=0.1),
    ):
        before = data_key(config, "a")
        text = Path(files["fees"]).read_text()
        Path(files["fees"]).write_text(text + "\n")
        assert data_key(config, "a") != before
        Path(files["fees"]).write_text(text)
        assert data_key(config, "a") == before == json.loads(json.dumps(before))


def test_paths_of_sources_are_relative_to_the_config_file_and_names_stay(tmp_path):
    (tmp_path / "run.toml").write_text(
        'name = "a"\n[model]\npath = "m"\n[data]\nreplay = ["general.jsonl", "guanaco"]\nreplay_share = 0.1\n'
        '[[data.mixture]]\nsource = "alpaca=rows/a.json"\nweight = 2\n[[data.mixture]]\nsource = "orca_math"\nweight = 1\n'
        '[evaluate]\ngeneral = ["../other.jsonl", "gsm8k=math"]\n'
    )
    config = load_config(tmp_path / "run.toml")
    assert config.data.replay == (str(tmp_path / "general.jsonl"), "guanaco")
    assert [part.source for part in config.data.mixture] == [f"alpaca={tmp_path}/rows/a.json", "orca_math"]
    assert config.evaluate.general == (str(tmp_path.parent / "other.jsonl"), f"gsm8k={tmp_path}/math")
    with pytest.raises(UserError, match=r"data\.mixture\.0\.wieght: no such setting\. Did you mean weight\?"):
        load_config(tmp_path / "run.toml", ('data.mixture=[{source="sql", wieght=1.0}]',))


def test_without_a_mixture_the_sources_are_rows_and_sets_in_that_order(files):
    config = DataConfig(rows=(files["fees"],), sets=("gsm8k", f"alpaca={files['boats']}"))
    assert [(source.name, source.path) for source in trained_sources(config)] == [
        (None, files["fees"]),
        ("gsm8k", None),
        ("alpaca", files["boats"]),
    ]
