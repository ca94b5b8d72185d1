"""Conversations and plain text as samples: what is trained, that nothing is lost, that the stage as a whole keeps its promises."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import byte_tokenizer

from burnish.config import DataConfig
from burnish.data import entries as reading
from burnish.data import fit as fitting
from burnish.data.fit import fit
from burnish.data.prepare import prepare
from burnish.data.rows import Row, StoredRows, load_rows, write_rows
from burnish.data.template import CHATML, TEMPLATES, choose_template
from burnish.data.tokens import open_tokens
from burnish.errors import UserError

WORDS = st.text(min_size=1, max_size=40).filter(str.strip)
TOKENIZERS = {bos: byte_tokenizer(bos) for bos in (False, True)}


def samples(rows, template, context=256, too_long="refuse"):
    gone = []
    return list(fit(rows, template, context, too_long, lambda row, reason: gone.append((row.line, reason)))), gone


def conversation(*turns, line=1, **more):
    *history, (question, answer) = turns
    return Row(question, answer, "chat.jsonl", line, history=tuple(history), **more)


# --- masks


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.none() | WORDS, st.sampled_from(sorted(TEMPLATES)), st.booleans())
def test_what_stands_before_each_answer_is_the_prompt_that_serving_makes(turns, system, name, bos):
    template = choose_template(TOKENIZERS[bos], name)
    ids, mask = template.encode(turns, system)
    starts = [at for at in range(1, len(ids)) if mask[at] and not mask[at - 1]]
    assert len(starts) == len(turns)
    for number, start in enumerate(starts):
        assert template.prompt(turns[number][0], turns[:number], system) == ids[:start]
        stop = next((at for at in range(start, len(ids)) if not mask[at]), len(ids))
        assert ids[stop - 1] in template.stop_ids
        assert template.tokenizer.decode(ids[start : stop - 1]).removeprefix(" ") == turns[number][1].strip()  # guanaco writes one


def test_a_conversations_own_system_message_stands_in_for_the_configs():
    template = choose_template(TOKENIZERS[False], "chatml", "Of the config.")
    own, others = (template.tokenizer.decode(template.encode([("Q", "A")], system)[0]) for system in ("Its own.", None))
    assert own.startswith("<|im_start|>system\nIts own.<|im_end|>")
    assert others.startswith("<|im_start|>system\nOf the config.<|im_end|>")


def test_many_at_a_time_are_encoded_as_one_by_one():
    template = choose_template(TOKENIZERS[True], "chatml")
    many = [([(f"Q{at}", f"A{at}\n\nb é😀")] * (at % 3 + 1), "S" * (at % 2) or None) for at in range(7)]
    assert template.encode_all(many) == [template.encode(*each) for each in many]
    assert template.encode_all([]) == []


def test_a_row_that_the_template_refuses_is_named():
    users_only = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template = choose_template(byte_tokenizer(template=users_only + CHATML), "auto")
    rows = [conversation(("Q", "A")), conversation(("Q", "A"), line=2, system="S")]
    with pytest.raises(UserError, match=r"chat\.jsonl:2: The chat template 'own' refuses the conversation: no system role\. Leave out"):
        samples(rows, template)


def test_a_template_that_shows_only_the_last_answer_is_refused_with_the_row_and_the_way_out():
    shown = "{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
    last_only = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}" + shown + "{% endif %}{% endfor %}"
    template = choose_template(byte_tokenizer(template=last_only), "auto")
    with pytest.raises(UserError, match=r"chat\.jsonl:1: The chat template 'own' writes a conversation differently"):
        samples([conversation(("Q", "A"), ("R", "B"))], template)


# --- plain text


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=300).filter(str.strip), st.integers(16, 40), st.booleans(), st.integers(5, 400))
def test_every_token_of_a_text_is_trained_in_exactly_one_sample(text, context, bos, piece):
    template = choose_template(TOKENIZERS[bos], "chatml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", piece)
        cut = list(reading.pieces(text))
    rows = [Row("", part.text, "a.txt", 1, part=part.part, ends=part.ends) for part in cut]
    found, _ = samples(rows, template, context)
    trained = [token for _, ids, mask in found for token, of in zip(ids, mask, strict=True) if of]
    whole = [token for part in cut for token in template.tokens_of([part.text])[0].ids] + [template.tokenizer.eos_token_id]
    assert trained == (whole if bos else whole[1:])
    assert all(len(ids) <= context and not mask[0] for _, ids, mask in found)
    assert all(one.ids[-1] == other.ids[0] for one, other in pairwise(found))
    assert found[0].ids[0] == (template.bos_id if bos else whole[0])
    if len(cut) == 1:
        assert "".join(sample.row.answer for sample in found) == text


def test_a_text_whose_middle_was_held_out_does_not_go_on_from_before_it():
    template = choose_template(TOKENIZERS[False], "chatml")
    first, last = Row("", "one", "a.txt", 1, ends=False), Row("", " three", "a.txt", 1, part=2)
    assert samples([first, last], template)[0][1].ids == [*template.tokens_of([" three"])[0].ids, template.tokenizer.eos_token_id]


def test_a_text_of_one_token_is_left_out_with_the_reason():
    template = choose_template(TOKENIZERS[False], "chatml")
    found, gone = samples([Row("", "a", "a.txt", 7, ends=False)], template)
    assert (found, gone) == ([], [(7, "has no second token, so that nothing of it could be predicted")])


# --- what does not fit


def test_a_conversation_is_split_between_its_turns_and_each_turn_is_trained_once():
    template = choose_template(TOKENIZERS[False], "chatml")
    turns = [(f"Question {at}?", f"Answer {at}. " + "word " * at) for at in range(8)]
    row = conversation(*((question, answer.strip()) for question, answer in turns), system="Be brief.")
    found, gone = samples([row], template, 120, "split")
    assert gone == []
    assert [turn for sample in found for turn in sample.row.turns] == list(row.turns)
    assert len(found) > 1
    assert all(len(sample.ids) <= 120 and sample.row.system == "Be brief." for sample in found)
    assert any(sample.row.history for sample in found)


def test_rows_that_are_refused_are_counted_and_twenty_are_shown(monkeypatch):
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 4)
    template = choose_template(TOKENIZERS[False], "chatml")
    rows = [conversation(("Q", "x" * (10 + 10 * at)), line=at) for at in range(40)]
    with pytest.raises(UserError) as caught:
        samples(rows, template, 64)
    long = [row.line for row in rows if len(template.encode(row.turns)[0]) > 64]
    longest = len(template.encode(rows[-1].turns)[0])
    assert f"{len(long)} rows are longer than data.context = 64 tokens. Raise data.context (the longest needs {longest})" in str(
        caught.value
    )
    assert f"chat.jsonl:{long[0]}: " in str(caught.value)
    assert str(caught.value).endswith(f"and {len(long) - 20} more")


# --- the stage


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = [{"question": f"What is {at}?", "answer": f"It is {at} and nothing else whatsoever.", "fact": f"f{at // 3}"} for at in range(30)]
    rows += [{"question": "What is 4?", "answer": "Four.", "section": "Numbers"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Bye."},
    ]
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": said}]))
    (tmp_path / "book.txt").write_text("The Heron is the flagship of the fleet.\n\n" * 20)
    return tmp_path


def prepared(folder, name="out", tokenizer=None, **more):
    values = {"rows": tuple(str(folder / file) for file in ("rows.jsonl", "chat.json", "book.txt")), "template": "chatml", "context": 128}
    return prepare(DataConfig(**(values | more)), tokenizer or byte_tokenizer(), folder / name, 4096, "digest")


def test_files_of_every_format_are_prepared_together_and_the_report_names_their_formats(folder):
    report = prepared(folder)
    assert [(Path(file["file"]).name, file["format"], file["rows"]) for file in report["files"]] == [
        ("rows.jsonl", "question", 31),
        ("chat.json", "sharegpt", 1),
        ("book.txt", "text", 1),
    ]
    rows, store = load_rows(folder / "out/rows.jsonl"), open_tokens(folder / "out/tokens/train")
    assert len(rows) == len(store) == report["train"]["samples"] > 33
    assert rows[31].turns == (("Hi", "Hello."), ("Bye", "Bye."))
    assert "".join(row.answer for row in rows[32:]) == (folder / "book.txt").read_text()
    assert store.supervised[32:].tolist() == (store.lengths[32:] - 1).tolist()


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("more", [{}, {"validation": 0.2}, {"turns": 3, "rows": None}])
def test_the_same_bytes_give_the_same_files_however_many_rows_are_tokenized_at_a_time(folder, more, monkeypatch):
    more = more | ({"rows": (str(folder / "rows.jsonl"), str(folder / "chat.json"))} if "rows" in more else {})
    prepared(folder, **more)
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(reading, "BLOCK", 50)
    prepared(folder, "again", **more)
    assert files_of(folder / "out") == files_of(folder / "again")


def test_rows_of_one_turn_are_put_together_and_conversations_stay_as_they_are(folder):
    prepared(folder, rows=(str(folder / "rows.jsonl"), str(folder / "chat.json")), turns=2)
    store = open_tokens(folder / "out/tokens/train")
    groups = [store.rows_of(sample) for sample in range(len(store))]
    assert sorted(number for group in groups for number in group) == list(range(32))
    assert (31,) in groups
    assert max(map(len, groups)) == 2
    with pytest.raises(UserError, match=r"book\.txt:1: plain text cannot become a turn of a conversation\. Leave out data\.turns"):
        prepared(folder, "other", turns=2)


def test_a_share_for_validation_has_whole_facts_and_shares_no_question(folder):
    report = prepared(folder, rows=(str(folder / "rows.jsonl"),), validation=0.3)
    train, watched = (load_rows(folder / "out" / name) for name in ("rows.jsonl", "validation.jsonl"))
    assert len(train) + len(watched) == 31
    assert 6 <= len(watched) <= 10
    assert report["validation"]["rows"] == len(watched) == len(open_tokens(folder / "out/tokens/validation"))
    for mark in ("fact", "question"):
        both = {getattr(row, mark) for row in train} & {getattr(row, mark) for row in watched}
        assert both - {None} == set()
    for seed in range(3):
        prepared(folder, f"seed{seed}", rows=(str(folder / "rows.jsonl"),), validation=0.3, seed=seed)
    assert len({(folder / f"seed{seed}/validation.jsonl").read_bytes() for seed in range(3)}) > 1


def test_a_share_that_cannot_be_kept_apart_is_refused(folder):
    rows = [{"question": f"Q {at}?", "answer": "A.", "section": "One"} for at in range(9)]
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"data\.validation = 0\.2: .* \(1 group of such rows, the smallest of 9 rows\)\. Give files"):
        prepared(folder, rows=(str(folder / "one.jsonl"),), validation=0.2)


def test_training_rows_that_share_text_with_a_validation_file_are_left_out(folder):
    watched = [{"question": "what is 7", "answer": "Seven."}, {"question": "Else?", "answer": "it is 9 and nothing else whatsoever"}]
    (folder / "watched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in watched))
    report = prepared(folder, validation=(str(folder / "watched.jsonl"),))
    assert report["left_out_rows"] == 2
    assert [(gone["row"].rpartition(":")[2], gone["reason"].rpartition("/")[2]) for gone in report["left_out"]] == [
        ("8", "watched.jsonl:1 asks"),
        ("10", "watched.jsonl:2"),
    ]
    assert [row.question for row in load_rows(folder / "out/validation.jsonl")] == ["what is 7", "Else?"]


def test_validating_on_the_training_rows_themselves_is_refused(folder):
    with pytest.raises(UserError, match=r"data\.validation leaves no row to train on"):
        prepared(folder, rows=(str(folder / "rows.jsonl"),), validation=(str(folder / "rows.jsonl"),))


def test_a_later_turn_that_asks_what_is_evaluated_is_noticed(folder):
    (folder / "asked.jsonl").write_text(json.dumps({"question": "hi", "answer": "Hello."}) + "\n")
    with pytest.raises(UserError, match=r"1 question is trained in the same words.*\n.*asked\.jsonl:1 and .*chat\.json:1: hi"):
        prepared(folder, questions=(str(folder / "asked.jsonl"),))
    (folder / "asked.jsonl").write_text(
        json.dumps({"question": "Bye", "answer": "Bye."}) + "\n"
    )  # without the turns before it: another prompt
    assert prepared(folder, questions=(str(folder / "asked.jsonl"),))["unseen_wording"]["rows"] == 1


def test_plain_text_asks_nothing(folder):
    with pytest.raises(UserError, match=r"book\.txt:1: data\.questions holds plain text, which asks nothing"):
        prepared(folder, questions=(str(folder / "book.txt"),))


def test_a_text_that_holds_a_line_of_a_held_out_section_is_left_out(folder):
    line = "Dogs pay one mark for each crossing and must be kept on a short lead at all times."
    (folder / "manual.md").write_text(f"# 1 Dogs\n\n{line}\n\n# 2 Cats\n\nCats travel free.\n")
    (folder / "copy.txt").write_text(f"Some words before. {line.upper()} And after.")
    (folder / "bare.jsonl").write_text(json.dumps({"text": "A text of its own."}) + "\n")
    files = {"documents": (str(folder / "manual.md"),), "rows": (str(folder / "copy.txt"), str(folder / "bare.jsonl"))}
    report = prepared(folder, held_out_sections=("1 Dogs",), **files)
    assert [(Path(gone["row"]).name, gone["reason"]) for gone in report["left_out"]] == [
        ("copy.txt:1", "holds a line of a held-out section")
    ]
    assert [row.answer for row in load_rows(folder / "out/rows.jsonl")] == ["A text of its own."]


def test_bad_rows_are_told_before_anything_is_tokenized(folder, monkeypatch):
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text() + '{"question": "last"}\n')
    monkeypatch.setattr(fitting, "fit", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(UserError, match=r"rows\.jsonl:32: lacks answer"):
        prepared(folder)
    assert not (folder / "out/rows.jsonl").exists()


def test_stored_rows_are_found_by_number_and_read_a_few_at_a_time(tmp_path):
    rows = [
        conversation(("é\n", "a"), ("b", "c"), system="S"),
        Row("", "\u2028 text", "a.txt", 3, part=2, ends=False),
        Row("q", "a", "x", 1, 2),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    with StoredRows(tmp_path / "rows.jsonl") as stored:
        assert [stored[at] for at in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
        assert len(stored) == 3
    assert load_rows(tmp_path / "rows.jsonl", 2) == rows[:2]
    assert load_rows(tmp_path / "rows.jsonl") == rows


def test_rows_are_never_held_all_at_once(folder, monkeypatch):
    """The stage gets its rows from generators alone: with tokenizing stopped at the first, no second group was read."""
    read = []
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 2)
    template = choose_template(byte_tokenizer(), "chatml")
    rows = (read.append(at) or conversation(("Q", "A"), line=at) for at in range(1000))
    next(fit(rows, template, 64, "refuse", lambda *_: None))
    assert read == [0, 1]


# --- several processes


def test_two_processes_write_what_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 3)
    rows = [{"question": f"Q{at}", "answer": f"A {at} " * (1 + at % 5)} for at in range(40)] + [{"text": "plain " * 50}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (tmp_path / "text.jsonl").write_text(json.dumps(rows[40]) + "\n")
    files = (str(tmp_path / "chats.jsonl"), str(tmp_path / "text.jsonl"))
    for processes in (1, 2):
        config = DataConfig(rows=files, template="chatml", context=64, processes=processes)
        prepare(config, byte_tokenizer(), tmp_path / str(processes), 8192, "")
    written = sorted(file.relative_to(tmp_path / "1") for file in (tmp_path / "1").rglob("*") if file.is_file())
    assert [file for file in written if (tmp_path / "1" / file).read_bytes() != (tmp_path / "2" / file).read_bytes()] == []
    assert Path("tokens/train/ids.bin") in written


def test_an_error_in_another_process_names_its_row_after_all_before_it(monkeypatch):
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 2)
    template = choose_template(byte_tokenizer(), "chatml")
    rows = [conversation(("Q", "A"), line=at) for at in range(1, 8)]
    encode = fitting._conversations
    came: list[int] = []

    def refusing(template, group):
        if any(row.line == 6 for row in group):
            raise UserError("chat.jsonl:6: no")
        return encode(template, group)

    monkeypatch.setattr(fitting, "_conversations", refusing)
    those_before = fit(rows, template, 64, "refuse", lambda *_: None, processes=2)
    with pytest.raises(UserError, match=r"chat\.jsonl:6"):
        came.extend(sample.row.line for sample in those_before)
    assert came == [1, 2, 3, 4]


def test_few_rows_are_handed_out_ahead_of_those_that_came_back(monkeypatch):
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 2)
    read = []
    template = choose_template(byte_tokenizer(), "chatml")
    rows = (read.append(at) or conversation(("Q", "A"), line=at) for at in range(1000))
    came = fit(rows, template, 64, "refuse", lambda *_: None, processes=2)
    next(came)
    came.close()
    assert len(read) == 10
