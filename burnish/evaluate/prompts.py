"""Free prompts, without a truth to compare with: what base and tuned answer, side by side."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from burnish.config import EvaluateConfig, canonical
from burnish.data.entries import entries
from burnish.data.files import read_utf8
from burnish.data.rows import listed
from burnish.data.template import Template
from burnish.errors import UserError
from burnish.evaluate.compare import Progress, Untuned, adapters_off, counter
from burnish.evaluate.generate import generate
from burnish.model.network import context_of
from burnish.skeleton import Built
from burnish.words import counted

KIND = "prompts/1"
KEYS = ("prompt", "question")
"""Of an object: the first that it has is asked."""
FOLDER = "4-evaluate-prompts"
"""Beside 4-evaluate: what somebody asked for once is not thrown away when the evaluation is done again."""
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}  # an answer must not steer the terminal


class Prompt(NamedTuple):
    """A prompt and its line, from 1."""

    text: str
    line: int


def read_prompts(file: str | Path) -> list[Prompt]:
    """The prompts of a .txt file, one a line, or of a .jsonl file, one object with the key `prompt` a line; empty lines are passed over.

    Raises a `UserError` for a file that holds none, or another kind of file.
    """
    path = Path(file)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: prompts are read from {' and '.join(READERS)} files.")
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check --prompts.")
    prompts = reader(path)
    if not prompts:
        raise UserError(f'{path} is empty: it holds no prompts. Write one a line, or {{"prompt": …}} objects into a .jsonl file.')
    return prompts


def _lines(path: Path) -> list[Prompt]:
    text = read_utf8(path, "--prompts")
    return [Prompt(line.strip(), number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _objects(path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    problems: list[str] = []
    for line, entry, _ in entries(path):
        prompt = next((entry[key] for key in KEYS if key in entry), None) if isinstance(entry, dict) else None
        if isinstance(entry, Exception):
            problems.append(f"{path}:{line}: {entry}")
        elif not isinstance(prompt, str) or not prompt.strip():
            problems.append(f"{path}:{line}: has no text in one of the keys {', '.join(KEYS)}")
        else:
            prompts.append(Prompt(prompt.strip(), line))
    if problems:
        raise UserError(listed(f"{path}: {counted(len(problems), 'line')} cannot be used.", problems))
    return prompts


READERS: dict[str, Callable[[Path], list[Prompt]]] = {".txt": _lines, ".jsonl": _objects}


def answer_prompts(
    built: Built,
    template: Template,
    prompts: list[Prompt],
    file: str,
    config: EvaluateConfig,
    progress: Progress = lambda _: None,
    untuned: Untuned | None = None,
) -> dict[str, Any]:
    """The report, of plain JSON values: each prompt with the most probable answer of base and tuned, of `new_tokens` tokens at most.

    Base and tuned are one loaded model, first as its base inside `untuned` (see `compare.evaluate`).
    Raises a `UserError` that lists the prompts which leave no room for
    an answer, before anything is generated.
    """
    room = context_of(built.model.config)
    lengths = [len(template.prompt(prompt.text)) for prompt in prompts]
    long = [f"{file}:{prompt.line}: {length} tokens" for prompt, length in zip(prompts, lengths, strict=True) if length >= room]
    if long:
        are = "s leave" if len(long) > 1 else " leaves"
        raise UserError(
            listed(f"{len(long)} prompt{are} no room for an answer in the {room} tokens that the model can read. Shorten:", long)
        )
    texts = [prompt.text for prompt in prompts]
    with untuned() if untuned else adapters_off(built):
        base = generate(built, template, texts, config.new_tokens, config.batch, counter(progress, "answers of the base model", len(texts)))
    tuned = generate(built, template, texts, config.new_tokens, config.batch, counter(progress, "answers of the tuned model", len(texts)))
    answers = [
        {"file": file, "line": prompt.line, "prompt": prompt.text, "base": {"answer": before}, "tuned": {"answer": after}}
        for prompt, before, after in zip(prompts, base, tuned, strict=True)
    ]
    return {"burnish": KIND, "settings": canonical(config), "answers": answers}


def render(report: dict[str, Any]) -> RenderableType:
    """A table of prompts with both answers, as they are: nothing in them is read as markup or sent to the terminal as a control."""
    table = Table(box=SIMPLE_HEAD, show_lines=True, expand=True)
    for column in ("prompt", "base", "tuned"):
        table.add_column(column, ratio=1, overflow="fold")
    for entry in report["answers"]:
        said = (entry["prompt"], entry["base"]["answer"], entry["tuned"]["answer"])
        table.add_row(*(Text(text.translate(_CONTROLS)) for text in said))
    return table
