"""Greedy answers, many prompts at a time. Base and tuned are asked with the same code and the same prompts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from burnish.data.rows import Row
from burnish.data.template import Template
from burnish.errors import UserError
from burnish.model.network import context_of
from burnish.skeleton import Built


def generate(
    built: Built,
    template: Template,
    questions: Sequence[str | Row],
    new_tokens: int,
    batch: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The model's most probable answer to each question, in the questions' order, of at most `new_tokens` tokens each.

    Of a row that is a conversation, the last question is asked, after its history.
    Prompts of like length share a batch (at most `batch` of them), padded on the left, with a key-value cache. What stands beside a
    prompt does not change its answer, except where rounding decides between two tokens that are equally probable. An answer ends with
    the model's context at the latest. `advance` is told the answers done. Raises a `UserError` for a question that leaves no room for one.
    """
    prompts = [template.prompt_of(asked) if isinstance(asked, Row) else template.prompt(asked) for asked in questions]
    room = context_of(built.model.config)
    budgets = [min(new_tokens, room - len(prompt)) for prompt in prompts]
    words = [asked.question if isinstance(asked, Row) else asked for asked in questions]
    for asked, budget in zip(words, budgets, strict=True):
        if budget < 1:
            raise UserError(
                f"The question {shortened(asked)!r} fills the {room} tokens that the model can read. Shorten it, or leave it out."
            )
    answers = [""] * len(questions)
    order = sorted(range(len(prompts)), key=lambda at: (-budgets[at], len(prompts[at])))
    with inference(built.model):
        for budget, group in groupby(order, key=lambda at: budgets[at]):
            members = list(group)
            for start in range(0, len(members), batch):
                some = members[start : start + batch]
                for at, ids in zip(some, _continue(built.model, template, [prompts[at] for at in some], budget), strict=True):
                    answers[at] = template.decode(ids)
                advance(len(some))
    return answers


def _continue(model: PreTrainedModel, template: Template, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The tokens after each prompt, with whatever follows the one that ends an answer."""
    width = max(map(len, prompts))
    pad = padding_id(template)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(template.stop_ids),
        pad_token_id=pad,
    )
    ask: Any = model.generate
    with nothing_inherited(model):
        output = ask(ids, attention_mask=mask, generation_config=settings)  # it counts positions from the mask
    return output[:, width:].tolist()


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """No gradients and no dropout inside the block; the model's mode as before outside it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def nothing_inherited(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model has no generation settings of its own: transformers would fill with them whatever is not set.

    (A repetition penalty or a temperature that a publisher recommends for chatting must not decide what is measured.)
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def padding_id(template: Template) -> int:
    """What fills a batch. It is masked, so any token will do; some tokenizers name none."""
    pad = template.tokenizer.pad_token_id
    return min(template.stop_ids) if pad is None else pad


def shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 2]} …"
