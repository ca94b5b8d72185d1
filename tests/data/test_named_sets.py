"""Named sets give the prompts that models were trained on before, to the byte, and train the answers alone."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_tokenizers import byte_tokenizer

from burnish.data.named import NAMED, guanaco_turns, named_set
from burnish.data.set_rows import files_of, read_set
from burnish.data.template import TEMPLATES, choose_template
from burnish.errors import UserError

ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"}
ALPACA_ALONE = {"instruction": "Say yes.", "input": "", "output": "Yes."}
SQL = {"context": "CREATE TABLE boats (name TEXT)", "question": "All boats?", "answer": "SELECT * FROM boats"}
MATH = {"question": "What is 1 + 2?", "answer": "It is 3."}
GUANACO = {"text": "### Human: Who?### Assistant: Ada.### Human: And\nthen?### Assistant: Bob.\nThen Eve.### Human: Bye"}

PROMPTS = [
    (
        "alpaca",
        ALPACA,
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:",
        "3",
    ),
    (
        "alpaca",
        ALPACA_ALONE,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay yes.\n\n### Response:",
        "Yes.",
    ),
    (
        "sql",
        SQL,
        "###Context:\nCREATE TABLE boats (name TEXT)\n###Question:\nAll boats?\n###Answer:\n",
        "SELECT * FROM boats",
    ),
    ("orca_math", MATH, "###Question:\nWhat is 1 + 2?\n###Answer:\n", "It is 3."),
]


def written(path: Path, *entries) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def template_of(name: str, bos: bool = False):
    return choose_template(byte_tokenizer(bos), NAMED[name].template or "auto")


def rows_of(name: str, path: str, limit: int | None = None, seed: int = 0):
    return read_set(name, path, limit, template_of(name), 256, seed)


def trained(template, ids, mask):
    return template.tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("name", "entry", "prompt", "answer"), PROMPTS)
def test_the_text_is_that_of_the_set_and_its_answer_alone_is_trained(tmp_path, name, entry, prompt, answer, bos):
    template = template_of(name, bos)
    row = read_set(name, written(tmp_path / "rows.jsonl", entry), None, template, 256, 0).train[0]
    ids, mask = template.encode([(row.question, row.answer)])
    start = "<s>" if bos else ""
    assert template.tokenizer.decode(ids) == f"{start}{prompt}{answer}</s>"
    assert trained(template, ids, mask) == f"{answer}</s>"
    assert template.tokenizer.decode(template.prompt(row.question)) == f"{start}{prompt}"


def test_every_answer_of_a_guanaco_conversation_is_trained_and_nothing_that_a_human_said(tmp_path):
    template = template_of("guanaco")
    (row,) = rows_of("guanaco", written(tmp_path / "rows.jsonl", GUANACO)).train
    ids, mask = template.encode(row.turns)
    assert template.tokenizer.decode(ids) == (
        "### Human: Who?### Assistant: Ada.</s>### Human: And\nthen?### Assistant: Bob.\nThen Eve.</s>"
    )
    assert trained(template, ids, mask) == " Ada.</s> Bob.\nThen Eve.</s>"
    for number, (question, _) in enumerate(row.turns):
        prompt = template.prompt(question, row.turns[:number])
        assert ids[: len(prompt)] == prompt, "the model is asked with other tokens than it was trained with"


@pytest.mark.parametrize("text", ["", "no headings", "### Assistant: I begin.", "### Human: Hello?"])
def test_a_text_that_no_human_begins_or_nobody_answers_has_no_turns(text):
    assert guanaco_turns(text) == []


def test_under_another_template_the_parts_are_paragraphs(tmp_path):
    template = choose_template(byte_tokenizer(), "chatml")
    for name, entry, question in (("alpaca", ALPACA, "Add the numbers.\n\n1 and 2"), ("sql", SQL, f"{SQL['context']}\n\nAll boats?")):
        row = read_set(name, written(tmp_path / "rows.jsonl", entry), None, template, 256, 0).train[0]
        assert row.question == question


def test_a_chat_without_context_gets_the_prompt_without_one():
    messages = [{"role": "user", "content": "Why?"}]
    assert template_of("sql").render(messages, prompt=True) == "###Question:\nWhy?\n###Answer:\n"
    assert "### Input" not in template_of("alpaca").render(messages, prompt=True)


@pytest.mark.parametrize("context", [255, 300])
def test_each_dummy_row_fills_the_context(context):
    template = template_of("dummy")
    rows = read_set("dummy", None, 3, template, context, 0).train
    assert len(rows) == 3
    assert rows[0].question == "instruction\n\n### Input:\ninput"
    assert set(rows[0].answer.split("output")) == {""}
    length = len(template.encode([(rows[0].question, rows[0].answer)])[0])
    one_more = len(template.encode([(rows[0].question, rows[0].answer + "output")])[0])
    assert length <= context < one_more
    assert len(read_set("dummy", None, None, template, context, 0).train) == 512


def test_a_context_without_room_for_a_dummy_answer_is_refused():
    with pytest.raises(UserError, match=r"data\.context = 16 has no room"):
        read_set("dummy", None, 3, template_of("dummy"), 16, 0)


def test_a_sample_is_the_first_rows_and_a_drawn_one_depends_on_the_seed_alone(tmp_path):
    alpaca = written(tmp_path / "alpaca.jsonl", *[ALPACA | {"output": str(at)} for at in range(600)])
    assert [row.answer for row in rows_of("alpaca_sample", alpaca).train] == [str(at) for at in range(512)]
    assert len(rows_of("alpaca", alpaca).train) == 600
    assert [row.line for row in rows_of("alpaca", alpaca, 3).train] == [1, 2, 3]
    math = written(tmp_path / "math.jsonl", *[{"question": f"Sum {at}?", "answer": str(at)} for at in range(100)])
    first, again, other = (rows_of("orca_math", math, 10, seed).train for seed in (0, 0, 1))
    assert first == again != other
    assert [row.line for row in first] == sorted(row.line for row in first) != list(range(1, 11))


def test_some_sql_rows_are_kept_apart_and_what_asks_the_same_is_left_out(tmp_path):
    entries = [SQL | {"question": f"Boat {at}?"} for at in range(100)]
    path = written(tmp_path / "sql.jsonl", *entries, *entries)
    read = rows_of("sql", path)
    asked = {row.question for row in read.apart}
    assert len(read.apart) == 20, "a tenth of a small copy, and never more than a thousand"
    assert not asked & {row.question for row in read.train}
    assert len(read.train) + len(read.apart) + len(read.left_out) == 200
    assert all("which is kept apart" in gone.reason for gone in read.left_out)
    assert NAMED["sql"].apart == 1000


def test_a_row_with_nothing_to_ask_or_to_say_is_left_out_with_its_reason(tmp_path):
    path = written(
        tmp_path / "a.jsonl", ALPACA, ALPACA | {"output": "  "}, ALPACA | {"instruction": ""}, {"instruction": "Q", "output": "A"}
    )
    read = rows_of("alpaca", path)
    assert [row.line for row in read.train] == [1, 4]
    assert [(gone.row.line, gone.reason) for gone in read.left_out] == [(2, "its answer is empty"), (3, "its question is empty")]


def test_a_conversation_that_nobody_answers_is_left_out_with_its_reason(tmp_path):
    read = rows_of("guanaco", written(tmp_path / "a.jsonl", GUANACO, {"text": "### Human: Hello?"}))
    assert [(gone.row.line, gone.reason) for gone in read.left_out] == [(2, "nobody answers in it")]


def refusal(name: str, path: str) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(name, path)
    return str(caught.value)


def test_a_file_of_another_kind_is_refused_with_its_lines(tmp_path):
    path = written(tmp_path / "rows.jsonl", SQL, MATH, ["x"], SQL | {"context": None})
    message = refusal("sql", path)
    assert message.splitlines()[0] == f"{path}: 3 entries are none of the data set sql; it has the keys context, question, answer."
    assert f"{path}:2: lacks a text for context" in message
    assert f"{path}:3: is not an object" in message
    Path(path).write_text('{"question": "half')
    assert f"{path}:1: not valid JSON" in refusal("orca_math", path)


def test_places_without_rows_say_what_they_lack(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "no .json, .jsonl or .parquet file in this folder" in refusal("sql", str(tmp_path / "folder"))
    assert "no such file" in refusal("sql", str(tmp_path / "nothing.jsonl"))
    assert "there is no row in it that can be used" in refusal("alpaca", written(tmp_path / "a.jsonl", ALPACA | {"output": ""}))
    (tmp_path / "a.csv").write_text("a,b")
    assert "rows are read from .json" in refusal("sql", str(tmp_path / "a.csv"))


def test_of_a_folder_the_files_of_the_sets_split_are_read(tmp_path):
    for name in ("data/train-00000.jsonl", "data/test-00000.jsonl", "dataset_infos.json", ".cache/train.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        written(tmp_path / name, MATH)
    assert files_of("gsm8k", str(tmp_path)) == [tmp_path / "data/train-00000.jsonl"]
    assert len(files_of("sql", str(tmp_path))) == 2, "no name has the split in it: all of them"
    assert [row.place for row in rows_of("gsm8k", str(tmp_path)).train] == [f"{tmp_path / 'data/train-00000.jsonl'}:1"]


def test_a_parquet_file_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = sys.modules["pyarrow"].Table.from_pylist([MATH, MATH | {"answer": "Four."}])
    parquet.write_table(table, tmp_path / "train.parquet")
    assert [(row.answer, row.line) for row in rows_of("orca_math", str(tmp_path)).train] == [("It is 3.", 1), ("Four.", 2)]


# --- the hub


class Refused(Exception):
    """Stands in for the library's own."""


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load, exceptions=SimpleNamespace(DatasetsError=Refused)))


def test_a_set_without_a_path_comes_from_the_hub(monkeypatch):
    asked = []

    def load(*where, **how):
        asked.append((where, how))
        return [SQL, SQL | {"question": "Other?"}]

    hub(monkeypatch, load)
    read = read_set("sql", None, None, template_of("sql"), 256, 0)
    assert asked == [(("knowrohit07/know_sql", None), {"split": "validation"})]
    assert [row.place for row in read.train] == ["sql:1", "sql:2"]


@pytest.mark.parametrize("problem", [ConnectionError("no route to it\nmore"), ValueError("no route to it"), Refused("no route to it")])
def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch, problem):
    def load(*where, **how):
        raise problem

    hub(monkeypatch, load)
    with pytest.raises(UserError, match=r"orca_math could not be had .*: no route to it\. .* give a local copy: orca_math=PATH") as caught:
        read_set("orca_math", None, None, template_of("orca_math"), 256, 0)
    assert "more" not in str(caught.value)


def test_without_the_library_the_message_says_how_to_get_it_or_to_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'burnish\[sets\]'\), or give a local copy in its place: guanaco=PATH"):
        read_set("guanaco", None, None, template_of("guanaco"), 256, 0)


# --- the table


def test_an_unknown_set_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'orca_maths': no such data set\. Did you mean orca_math\?"):
        named_set("orca_maths")


def test_every_set_names_a_template_that_there_is():
    assert {kind.template for kind in NAMED.values()} <= {*TEMPLATES, None}


def test_the_page_of_sets_names_each_with_its_source_and_template():
    page = (Path(__file__).parents[2] / "docs/sets.md").read_text(encoding="utf-8")
    for name, kind in NAMED.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert kind.hub is None or kind.hub in line
        assert kind.template is None or f"`{kind.template}`" in line


def test_real_files_are_read_in_the_place_of_two_sets(real_data):
    assert len(rows_of("gsm8k", str(real_data / "math")).train) == 7473
    assert len(rows_of("alpaca", str(real_data / "instruct/alpaca_identity.json")).train) == 91
