"""The data stage: documents and rows → rows with their pages, and their tokens, in one folder."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from burnish.config import DataConfig, canonical
from burnish.data.attribute import Finder
from burnish.data.extract import extract_rows
from burnish.data.fit import conversations, fit
from burnish.data.held_out import LeftOut, check_unseen_wording, split
from burnish.data.mixture import by_source, mix
from burnish.data.packing import pack
from burnish.data.rows import Row, load_rows, read_rows, write_rows
from burnish.data.sections import Section, document_files, read_sections
from burnish.data.sources import DOCUMENTS, Gathered, gather, input_files, template_name
from burnish.data.template import Template, choose_template
from burnish.data.tokens import Sample, open_tokens, write_tokens
from burnish.errors import UserError, writing
from burnish.runs import file_digest, write_json

__all__ = ["data_key", "load_rows", "prepare"]

VERSION = 1
REPORT = "data-report/1"


def prepare(config: DataConfig, tokenizer: Any, folder: Path, model_context: int, tokenizer_digest: str) -> dict[str, Any]:
    """Fills `folder` (empty, the caller's to rename) and returns the report, which is also written as report.json.

        rows.jsonl            what is trained, each row with its file, line and page
        unseen_section.jsonl  rows of held-out sections
        unseen_wording.jsonl  questions that are only evaluated
        general.jsonl         general rows that are only evaluated
        tokens/NAME           the same four as tokens: train, unseen_section, unseen_wording, general; train as often as the mixture says
        sections.jsonl        what was read from the documents

    Raises a `UserError` for everything in config, documents or rows that the user can put right.
    """
    _check(config, model_context)
    template = choose_template(tokenizer, template_name(config), config.system)
    sections = read_sections(config.documents)
    gathered = gather(config, template)
    rows = gathered.train + extract_rows(sections, config.extract, config.extract_limit)
    questions = [row for file in config.questions for row in read_rows(file, config.questions_limit)]
    if not rows:
        raise UserError("There is no row to train on. Give files with data.rows, or documents with data.extract=recall.")
    finder = Finder(sections)
    rows, questions = ([_paged(row, finder) for row in members] for members in (rows, questions))
    train, unseen_section, unseen_wording, left_out = split(rows, sections, config.held_out_sections, config.seed, questions)
    train, unseen_section, left_out = train + gathered.replay, unseen_section + gathered.apart, left_out + gathered.left_out
    check_unseen_wording(train, unseen_wording)
    sets = {"train": train, "unseen_section": unseen_section, "unseen_wording": unseen_wording, "general": gathered.general}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_sections(folder / "sections.jsonl", sections)
        counts = {}
        for name, members in sets.items():
            counts[name], gone = _write_set(folder, name, members, template, config)
            left_out = left_out + gone
        sources = _mixed(folder, gathered, config, counts["train"])
    report = _report(config, sections, counts, left_out, folder, template) | {"sources": sources, "tokenizer": tokenizer_digest}
    write_json(folder / "report.json", report)
    return report


def data_key(config: DataConfig, tokenizer_digest: str) -> dict[str, Any]:
    """What the prepared data depends on: the section, every input file's bytes, the tokenizer, the version of this stage."""
    inputs = [*document_files(config.documents), *input_files(config), *map(Path, config.questions)]
    for file in inputs:
        if not file.is_file():
            raise UserError(f"{file}: no such file. Check data.rows and data.questions.")
    files = {str(file): file_digest(file) for file in inputs}
    return {"stage": VERSION, "data": canonical(config), "files": files, "tokenizer": tokenizer_digest}


def _check(config: DataConfig, model_context: int) -> None:
    if config.context > model_context:
        raise UserError(f"data.context = {config.context} is more than the {model_context} tokens that the model can read. Lower it.")
    given = config.rows or config.sets or config.mixture
    if not (given or config.documents):
        raise UserError("data names neither rows nor documents. Give data.rows, or data.documents with data.extract=recall.")
    if config.extract != "none" and not config.documents:
        raise UserError(f"data.extract = {config.extract!r} makes rows from documents, but data.documents is empty.")
    if not given and config.extract == "none":
        raise UserError("data.documents alone gives nothing to train on. Add data.rows, or set data.extract=recall.")


def _paged(row: Row, finder: Finder) -> Row:
    """The row with its page and section, where the documents tell what it does not say itself."""
    if row.page is not None and row.section is not None:
        return row
    at = finder.find(row)
    if at is None:
        return row
    path = finder.sections[at].path
    section = row.section if row.section is not None else (" > ".join(path) or None)
    return replace(row, page=row.page if row.page is not None else finder.page(row, at), section=section)


# --- writing


def _write_set(folder: Path, name: str, rows: list[Row], template: Template, config: DataConfig) -> tuple[dict[str, Any], list[LeftOut]]:
    fitted = fit(rows, template, config.context, config.too_long)
    if name == "train" and not fitted.rows:
        raise UserError(f"Every row is longer than data.context = {config.context} tokens and was dropped. Raise data.context.")
    write_rows(folder / ROW_FILES[name], fitted.rows)
    turns = config.turns if name == "train" else 1
    groups = conversations(fitted.rows, fitted.lengths, template, turns, config.context, config.seed)
    written = write_tokens(folder / "tokens" / name, _encoded(fitted.rows, groups, template))
    with_page = sum(row.page is not None for row in fitted.rows)
    counts = {"rows": len(fitted.rows), "rows_with_page": with_page, "longest_row": max(fitted.lengths, default=0)}
    return counts | {key: written[key] for key in ("samples", "tokens", "supervised")}, fitted.left_out


ROW_FILES = {
    "train": "rows.jsonl",
    "unseen_section": "unseen_section.jsonl",
    "unseen_wording": "unseen_wording.jsonl",
    "general": "general.jsonl",
}


def _mixed(folder: Path, gathered: Gathered, config: DataConfig, counts: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What each source gives to an epoch. With a mixture or replay the training tokens are written anew, and `counts` set right."""
    known = {*gathered.source_of.values()} | ({DOCUMENTS} if config.extract != "none" else set())
    counted = bool(config.mixture or config.replay)
    if len(known) == 1 and not counted:
        return {known.pop(): {key: counts[key] for key in ("rows", "samples", "tokens")}}
    files = [row.file for row in load_rows(folder / ROW_FILES["train"])]
    store = folder / "tokens" / "train"
    if counted:
        tokens = open_tokens(store)
        names = [gathered.source_of.get(files[tokens.rows_of(at)[0]], DOCUMENTS) for at in range(len(tokens))]
        written = mix(store, names, config)
        counts |= {key: written[key] for key in ("samples", "tokens", "supervised")}
    return by_source(store, files, gathered.source_of, DOCUMENTS)


def _encoded(rows: list[Row], groups: Iterator[tuple[int, ...]], template: Template) -> Iterator[Sample]:
    for group in groups:
        ids, mask = template.encode([(rows[at].question, rows[at].answer) for at in group])
        yield ids, mask, group


def _write_sections(path: Path, sections: list[Section]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for section in sections:
            out.write(json.dumps(asdict(section), ensure_ascii=False) + "\n")


def _report(
    config: DataConfig, sections: list[Section], counts: dict[str, Any], left_out: list[LeftOut], folder: Path, template: Template
) -> dict[str, Any]:
    last_pages: dict[str, int] = {}
    for section in sections:
        last_pages[section.file] = max(last_pages.get(section.file, 0), section.last_page)
    lengths = open_tokens(folder / "tokens" / "train").lengths
    return {
        "burnish": REPORT,
        "template": template.name,
        "documents": len(last_pages),
        "pages": sum(last_pages.values()),
        "sections": len(sections),
        "context": config.context,
        "contexts": len(pack(lengths, config.context, config.seed, 0)),
        **{name: dict(values) for name, values in counts.items()},
        "left_out": [{"row": gone.row.place, "reason": gone.reason} for gone in left_out],
    }
