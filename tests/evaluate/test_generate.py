import logging
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from burnish.data.template import choose_template
from burnish.errors import UserError
from burnish.evaluate.generate import generate
from burnish.model import network
from tests.tiny import FAMILIES, built_from, tiny_folder, tiny_tokenizer, train_a_little

QUESTIONS = [
    "at dawn",
    "the pier is closed at night and the ferry leaves",
    "Who?",
    "the ferry",
    "Is the pier closed, or is it at dawn that it closes?",
]
NEAR_TIE = 1e-4
"""Logits of order 10 whose sums are taken in another order (padding, cache) differ by some 1e-6 of that in fp32: two tokens that are closer
than this may change places. It is ten times the rounding, and rare: a margin of random logits is of order 1."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def template():
    return choose_template(tiny_tokenizer(), "chatml")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    built = built_from(tiny_folder(tmp_path_factory.mktemp("llama")), {"format": "none"})
    train_a_little(built)
    return built


def greedy(built, template, question, new_tokens):
    """(ids of the most probable answer, smallest margin of a choice) of one prompt alone, without padding or cache."""
    ids, margin = template.prompt(question), float("inf")
    start = len(ids)
    while len(ids) < start + new_tokens:
        with torch.no_grad():
            logits = built.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        ids = [*ids, int(logits.argmax())]
        if ids[-1] in template.stop_ids:
            break
    return ids[start:], margin


@pytest.mark.parametrize("form", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_answers_that_each_question_gets_alone(family, form, template, tmp_path):
    built = built_from(tiny_folder(tmp_path, family), {"format": form})
    train_a_little(built)
    alone = [greedy(built, template, question, 8) for question in QUESTIONS]
    assert sum(margin > NEAR_TIE for _, margin in alone) >= 4, "hardly any answer is clear enough to be compared"
    for batch in (1, 2, 5):
        answers = generate(built, template, QUESTIONS, 8, batch)
        for answer, (ids, margin) in zip(answers, alone, strict=True):
            assert answer == template.decode(ids) or margin <= NEAR_TIE


def test_it_answers_the_same_after_a_packed_pass(llama, template):
    before = generate(llama, template, QUESTIONS, 6, 3)
    with network.packed(llama.model):
        pass
    assert generate(llama, template, QUESTIONS, 6, 3) == before


def test_what_a_publisher_recommends_for_chatting_decides_nothing_and_warns_of_nothing(llama, template):
    plain = generate(llama, template, QUESTIONS, 8, 5)
    recommended = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=3, repetition_penalty=9.0, max_length=20, eos_token_id=7
    )
    own, llama.model.generation_config = llama.model.generation_config, recommended
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    transformers_logging.add_handler(handler)
    try:
        assert generate(llama, template, QUESTIONS, 8, 5) == plain
        assert llama.model.generation_config is recommended
    finally:
        transformers_logging.remove_handler(handler)
        llama.model.generation_config = own
    assert messages == []


def test_an_answer_ends_at_the_token_that_ends_answers_whatever_its_neighbours_do(llama, template):
    long = {question: greedy(llama, template, question, 8)[0] for question in QUESTIONS}
    stop = long[QUESTIONS[0]][3]
    stopping = replace(template, stop_ids=frozenset({stop}))
    expected = [template.decode(ids[: ids.index(stop)] if stop in ids else ids) for ids in long.values()]
    assert expected != [template.decode(ids) for ids in long.values()]
    assert generate(llama, stopping, QUESTIONS, 8, 5) == expected


def test_an_answer_ends_with_the_context_and_a_question_that_fills_it_is_refused(llama, template):
    room = llama.model.config.max_position_embeddings
    near = "a" * (room - len(template.prompt("")) - 3)
    assert len(template.prompt(near)) == room - 3
    answers = generate(llama, template, ["the ferry", near], 12, 2)
    assert answers[0] == template.decode(greedy(llama, template, "the ferry", 12)[0])
    assert answers[1] == template.decode(greedy(llama, template, near, 3)[0])
    with pytest.raises(UserError, match="aaa …' fills the 256 tokens"):
        generate(llama, template, ["the ferry", near + "aaa"], 12, 2)


def test_the_mode_of_the_model_is_as_before_and_dropout_is_off(template, tmp_path):
    built = built_from(tiny_folder(tmp_path), {"format": "none"}, {"dropout": 0.5})
    train_a_little(built, size=0.3)
    expected = generate(built, template, QUESTIONS, 6, 5)
    built.model.train()
    assert generate(built, template, QUESTIONS, 6, 5) == expected
    assert built.model.training


def test_progress_counts_every_answer(llama, template):
    told: list[int] = []
    generate(llama, template, QUESTIONS, 2, 2, told.append)
    assert sum(told) == len(QUESTIONS)
