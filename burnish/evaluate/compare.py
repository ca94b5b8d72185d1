"""Base against tuned, on what was not trained: questions in another wording, sections that were held out, general rows. Never mixed."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config import EvaluateConfig, canonical
from burnish.data.prepare import ROW_FILES
from burnish.data.rows import Row, load_rows
from burnish.data.template import Template
from burnish.data.tokens import TokenSet, open_tokens
from burnish.errors import UserError, writing
from burnish.evaluate.generate import generate
from burnish.evaluate.intervals import FEWEST, Interval, ratio_interval
from burnish.evaluate.loss import losses
from burnish.evaluate.metrics import METRICS
from burnish.evaluate.text import overlap
from burnish.runs import write_json, write_whole
from burnish.skeleton import Built

KIND = "evaluation/1"
RIGHT = "right"
SETS: dict[str, tuple[str, ...]] = {"unseen_wording": ("loss", RIGHT, "overlap"), "unseen_section": ("loss",), "general": ("loss",)}
"""What is measured on each set; RIGHT by the metric that is asked for. In an unseen section nothing was trained, so that no answer can be
recalled: loss alone. On general rows it tells what was forgotten."""
TEXT_MEASURES: dict[str, Callable[[str, str], float]] = {metric.measure: metric.right for metric in METRICS.values()} | {"overlap": overlap}
"""Measures of (answer, truth), by generation."""

Progress = Callable[[str], None]
"""Is told in a line what is being done, and each tenth of it."""

Untuned = Callable[[], AbstractContextManager[None]]
"""Makes the model its untuned base inside the block."""


@dataclass(frozen=True)
class EvaluationSet:
    """Rows that were not trained, and the same rows as tokens, one sample each."""

    name: str
    rows: list[Row]
    tokens: TokenSet


@dataclass(frozen=True)
class Measured:
    """One model on one set. `amounts` and `weights` [S] of each measure: its value is Σ amounts / Σ weights."""

    amounts: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    answers: list[str]
    """Empty where the set has no measure of answers."""


def measures_of(name: str, config: EvaluateConfig) -> tuple[str, ...]:
    """What is measured on a set, by the names that reports have for it."""
    return tuple(METRICS[config.metric].measure if measure == RIGHT else measure for measure in SETS[name])


def sets_of(data_folder: Path, needed: bool = True) -> dict[str, EvaluationSet]:
    """The sets that a data folder holds, without the empty ones. Raises a `UserError` where there is none and one is `needed`."""
    sets = {}
    for name in SETS:
        file = data_folder / ROW_FILES[name]
        rows = load_rows(file) if file.exists() else []  # an older data folder has no general rows
        if rows:
            sets[name] = EvaluationSet(name, rows, open_tokens(data_folder / "tokens" / name))
    if not sets and needed:
        raise UserError(
            "There is nothing to evaluate on: no row was kept out of training. Give files of questions with data.questions "
            "(facts that were trained, worded differently), or keep sections out with data.held_out_sections."
        )
    return sets


def evaluate(
    built: Built,
    template: Template,
    sets: dict[str, EvaluationSet],
    config: EvaluateConfig,
    context: int,
    micro_batch: int,
    progress: Progress = lambda _: None,
    untuned: Untuned | None = None,
) -> dict[str, Any]:
    """The report, of plain JSON values: each set's measures for base, tuned and their difference (tuned − base), and every answer.

    Base and tuned are one loaded model, first as its base inside `untuned` (its adapters or new blocks switched off, where none is given)
    and then as it is. Costs two passes over each set's tokens, and two answers to each question.
    Raises a `UserError` that names the row where a loss is not finite.
    """
    report: dict[str, Any] = {"burnish": KIND, "settings": canonical(config), "sets": {}}
    with untuned() if untuned else adapters_off(built):
        bases = {name: _measure("base", built, template, members, config, context, micro_batch, progress) for name, members in sets.items()}
    for name, members in sets.items():
        tuned = _measure("tuned", built, template, members, config, context, micro_batch, progress)
        report["sets"][name] = _compare(members, bases[name], tuned, config)
    return report


def write(report: dict[str, Any], folder: Path) -> None:
    """answers.jsonl (one question a line) and then report.json (everything else), each whole or not at all."""
    answers = [answer for members in report["sets"].values() for answer in members["answers"]]
    sets = {name: {key: value for key, value in members.items() if key != "answers"} for name, members in report["sets"].items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "answers.jsonl", "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    write_json(folder / "report.json", report | {"sets": sets})


@contextmanager
def adapters_off(built: Built) -> Iterator[None]:
    """The untuned base inside the block, and whatever it was outside it. Not where weights of the base itself were trained."""
    assert built.adapters.holds_base, "the base is held nowhere"
    switch = built.adapters.switch
    before, switch.on = switch.on, False
    try:
        yield
    finally:
        switch.on = before


def _measure(
    which: str,
    built: Built,
    template: Template,
    members: EvaluationSet,
    config: EvaluateConfig,
    context: int,
    micro_batch: int,
    progress: Progress,
) -> Measured:
    """One model on one set."""
    rows, tokens = members.rows, members.tokens
    assert len(rows) == len(tokens), "a set has one sample for each row"
    sums, counts = losses(built, tokens, context, micro_batch, counter(progress, f"{members.name}: loss of the {which} model", len(rows)))
    for at in np.flatnonzero(~np.isfinite(sums)):
        raise UserError(f"{rows[at].place}: the loss of the {which} model on this row is {sums[at]}. {_NOT_FINITE[which]}")
    amounts: dict[str, np.ndarray] = {"loss": sums}
    weights: dict[str, np.ndarray] = {"loss": counts}
    answers: list[str] = []
    wanted = [measure for measure in measures_of(members.name, config) if measure in TEXT_MEASURES]
    if wanted:
        advance = counter(progress, f"{members.name}: answers of the {which} model", len(rows))
        answers = generate(built, template, rows, config.new_tokens, config.batch, advance)
    for measure in wanted:
        score = TEXT_MEASURES[measure]
        amounts[measure] = np.array([score(answer, row.answer) for answer, row in zip(answers, rows, strict=True)], np.float64)
        weights[measure] = np.ones(len(rows))
    return Measured(amounts, weights, answers)


def counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """A function that is told how many more are done, and tells `progress` of the start and of each tenth."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if before * 10 // total < done * 10 // total:
            progress(f"{what}: {done} of {total}")

    progress(what)
    return advance


_NOT_FINITE = {
    "base": "Its numbers overflow before any training: try model.dtype=fp32, and check the download.",
    "tuned": "Training has diverged: lower train.lr and train again (--redo train).",
}


def _compare(members: EvaluationSet, base: Measured, tuned: Measured, config: EvaluateConfig) -> dict[str, Any]:
    units = units_of(members.rows)
    distinct = len(set(units))
    measures = {}
    for measure in measures_of(members.name, config):
        weights = base.weights[measure]

        def interval(amounts: np.ndarray, weights: np.ndarray = weights) -> Interval:
            return ratio_interval(amounts, weights, config.resamples, config.seed, units)

        difference = interval(tuned.amounts[measure] - base.amounts[measure])
        measures[measure] = {
            "base": asdict(interval(base.amounts[measure])),
            "tuned": asdict(interval(tuned.amounts[measure])),
            "difference": asdict(difference),
            "clear_of_zero": difference.clear_of_zero if distinct >= FEWEST else None,
        }
    counts = {"rows": len(members.rows), "units": distinct, "supervised_tokens": int(base.weights["loss"].sum())}
    return counts | {"measures": measures, "answers": list(_answers(members, base, tuned))}


def units_of(rows: Sequence[Row]) -> list[str]:
    """What is drawn anew for an interval: a fact with all its wordings, where rows name facts; else the row."""
    return [f"fact {row.fact}" if row.fact is not None else f"row {at}" for at, row in enumerate(rows)]


def _answers(members: EvaluationSet, base: Measured, tuned: Measured) -> Iterator[dict[str, Any]]:
    """One entry for each row: its place, question, truth, both answers and their scores."""
    for at, row in enumerate(members.rows) if base.answers else ():
        entry: dict[str, Any] = {
            "set": members.name,
            "file": row.file,
            "line": row.line,
            "page": row.page,
            "section": row.section,
            "fact": row.fact,
        }
        entry |= {"question": row.question, "truth": row.answer}
        if row.history:
            entry["history"] = row.history
        for which, model in (("base", base), ("tuned", tuned)):
            scores = {measure: float(amounts[at]) for measure, amounts in model.amounts.items() if measure in TEXT_MEASURES}
            marks = {metric.measure: bool(scores[metric.measure]) for metric in METRICS.values() if metric.measure in scores}
            entry[which] = {"answer": model.answers[at], **scores, **marks}
        yield entry
