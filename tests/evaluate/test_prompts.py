"""Free prompts: read, answered by base and tuned alike, shown side by side."""

import json

import pytest
from rich.console import Console

from burnish.config import EvaluateConfig
from burnish.errors import UserError
from burnish.evaluate import prompts as asking
from burnish.evaluate.compare import adapters_off
from burnish.evaluate.generate import generate
from burnish.evaluate.prompts import Prompt, answer_prompts, read_prompts, render

ASKED = EvaluateConfig(new_tokens=6, batch=2)


def test_a_text_file_has_a_prompt_a_line_and_an_object_file_has_them_under_their_key(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf Who leads? \r\n\r\nAnd why?")
    assert read_prompts(tmp_path / "a.txt") == [Prompt("Who leads?", 1), Prompt("And why?", 3)]
    (tmp_path / "a.jsonl").write_text('{"prompt": "Tell\\nall.", "id": 3}\n\n{"prompt": "Who?"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt("Tell\nall.", 1), Prompt("Who?", 3)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", 'a.txt is empty: it holds no prompts. Write one a line, or {"prompt": …} objects'),
        ("a.txt", " \n\n", "is empty"),
        ("a.jsonl", "\n", "is empty"),
        ("a.jsonl", '{"prompt": "Who?"}\n{"text": "Who?"}\n["x"]\n{"prompt": " "}', "a.jsonl: 3 lines cannot be used."),
        ("a.jsonl", '{"prompt": "Who?"}\n{"text": "Who?"}', "a.jsonl:2: has no text in one of the keys prompt, question"),
        ("a.jsonl", '{"prompt": ', "a.jsonl:1: not valid JSON"),
        ("a.csv", "Who?", "a.csv: prompts are read from .txt and .jsonl files."),
    ],
)
def test_a_file_without_prompts_is_refused_with_what_one_looks_like(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_a_missing_file_names_the_option(tmp_path):
    with pytest.raises(UserError, match=r"no such file\. Check --prompts"):
        read_prompts(tmp_path / "gone.txt")


def test_base_and_tuned_answer_each_prompt(built, template):
    prompts = [Prompt("Where is the pier?", 1), Prompt("When?", 4), Prompt("Who is at the pier at dawn?", 5)]
    report = answer_prompts(built, template, prompts, "p.txt", ASKED)
    texts = [prompt.text for prompt in prompts]
    tuned = generate(built, template, texts, 6, 2)
    with adapters_off(built):
        base = generate(built, template, texts, 6, 2)
    assert [(entry["base"]["answer"], entry["tuned"]["answer"]) for entry in report["answers"]] == list(zip(base, tuned, strict=True))
    assert base != tuned
    assert [(entry["file"], entry["line"], entry["prompt"]) for entry in report["answers"]] == [("p.txt", p.line, p.text) for p in prompts]
    assert report["burnish"] == "prompts/1"
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert built.adapters.switch.on


def test_prompts_that_leave_no_room_are_all_named_before_anything_is_generated(built, template, monkeypatch):
    monkeypatch.setattr(asking, "generate", lambda *_: pytest.fail("something was generated"))
    prompts = [Prompt("Who?", 1), Prompt("x " * 300, 2), Prompt("y " * 300, 7)]
    with pytest.raises(UserError) as caught:
        answer_prompts(built, template, prompts, "p.txt", ASKED)
    message = str(caught.value)
    assert message.startswith("2 prompts leave no room for an answer in the 256 tokens that the model can read. Shorten:")
    assert "p.txt:2: " in message
    assert "p.txt:7: " in message
    assert "p.txt:1: " not in message


def test_the_longest_prompt_that_leaves_room_is_answered(built, template):
    words = next(count for count in range(300) if len(template.prompt("z" * count)) == 255)
    report = answer_prompts(built, template, [Prompt("z" * words, 1)], "p.txt", ASKED)
    assert len(report["answers"]) == 1
    with pytest.raises(UserError, match=r"p\.txt:9: 256 tokens"):
        answer_prompts(built, template, [Prompt("z" * (words + 1), 9)], "p.txt", ASKED)


def test_answers_stand_side_by_side_as_they_are_and_cannot_steer_the_terminal():
    entry = {"prompt": "[bold]Who?[/]", "base": {"answer": "no \x1b[31midea"}, "tuned": {"answer": "the Heron\nof the lake"}}
    console = Console(width=90)
    with console.capture() as shown:
        console.print(render({"answers": [entry]}))
    text = shown.get()
    assert "\x1b" not in text
    line = next(line for line in text.splitlines() if "[bold]Who?[/]" in line)
    assert "no [31midea" in line
    assert "the Heron" in line
