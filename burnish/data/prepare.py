"""The data stage: documents and rows → rows with their pages, and their tokens, in one folder.

Rows stream: they are read twice, once to check them all and to decide what becomes of each, once to tokenize and write them. What is held
is a few bytes a row (scan.py); documents, their sections and the rows made of these are held whole.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config import DataConfig
from burnish.data.attribute import Finder
from burnish.data.extract import extract_rows
from burnish.data.held_out import TRAIN, UNSEEN_SECTION, VALIDATION, Copies, Division, asked_again, check_unseen_wording, divide
from burnish.data.key import data_key
from burnish.data.mixture import by_source, mix
from burnish.data.packing import pack
from burnish.data.rows import Row, load_rows
from burnish.data.scan import NONE, Scan, scan
from burnish.data.sections import Section, read_sections
from burnish.data.source import Source
from burnish.data.sources import DOCUMENTS, Gathered, gather, template_name
from burnish.data.template import Template, choose_template
from burnish.data.tokens import open_tokens
from burnish.data.write import ROW_FILES, LeftOut, Writer
from burnish.errors import UserError, writing
from burnish.runs import write_json
from burnish.words import counted

__all__ = ["ROW_FILES", "data_key", "load_rows", "prepare"]

REPORT = "data-report/1"


def prepare(config: DataConfig, tokenizer: Any, folder: Path, model_context: int, tokenizer_digest: str) -> dict[str, Any]:
    """Fills `folder` (empty, the caller's to rename) and returns the report, which is also written as report.json.

        rows.jsonl            what is trained, each row with its file, line and page
        unseen_section.jsonl  rows of held-out sections
        unseen_wording.jsonl  questions that are only evaluated
        validation.jsonl      rows whose loss is watched during training
        general.jsonl         general rows that are only evaluated
        tokens/NAME           the same five as tokens; train as often as the mixture says
        sections.jsonl        what was read from the documents

    Raises a `UserError` for everything in config, documents or rows that the user can put right.
    """
    _check(config, model_context)
    template = choose_template(tokenizer, template_name(config), config.system)
    sections = read_sections(config.documents)
    gathered = gather(config, template)
    read = _read(config, sections, gathered)
    if not len(read.rows_scan):
        found = f"data.extract=recall found no heading with text under it in {counted(len(sections), 'section')}: "
        raise UserError(f"There is no row to train on. {found if config.extract != 'none' else ''}Give files of rows with data.rows.")
    division = read.division
    if division is not None:
        trained = division.rows == TRAIN
        for scanned, mask in ((read.rows_scan, trained), (read.replay_scan, division.replay.other == NONE)):
            check_unseen_wording(scanned, mask, (row for row, of in read.questions_with(division) if of == TRAIN))
    writer = Writer(folder, template, config, LeftOut())
    for row, reason in gathered.left_out:
        writer.left_out(row, reason)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_sections(folder / "sections.jsonl", sections)
        counts = {name: writer.write(name, members) for name, members in _sets(read, sections, gathered, writer.left_out).items()}
        of_sources = _mixed(folder, gathered, config, counts["train"])
    report = _report(config, sections, counts, writer.left_out, folder, template) | {"files": read.files(), "sources": of_sources}
    report |= {"tokenizer": tokenizer_digest, "held_out_sections": _held_out(division, sections)}
    write_json(folder / "report.json", report)
    return report


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


def _validation_files(config: DataConfig) -> tuple[str, ...]:
    return config.validation if isinstance(config.validation, tuple) else ()


# --- the first pass


@dataclass(frozen=True)
class _Read:
    """Where rows come from, and what was decided of each."""

    finder: Finder
    rows: Source
    questions: Source
    validation: Source
    rows_scan: Scan
    questions_scan: Scan
    validation_scan: Scan
    replay_scan: Scan
    division: Division | None
    """None where every row is trained, and none is replayed."""

    def rows_with(self, division: Division) -> Iterator[tuple[Row, int]]:
        return zip(self._paged(self.rows, self.rows_scan), division.rows.tolist(), strict=True)

    def questions_with(self, division: Division) -> Iterator[tuple[Row, int]]:
        return zip(self._paged(self.questions, self.questions_scan), division.questions.tolist(), strict=True)

    def all_rows(self) -> Iterator[Row]:
        return self._paged(self.rows, self.rows_scan)

    def all_validation(self) -> Iterator[Row]:
        return self._paged(self.validation, self.validation_scan)

    def files(self) -> list[dict[str, Any]]:
        return [entry for source in (self.rows, self.questions, self.validation) for entry in source.report()]

    def _paged(self, source: Source, scanned: Scan) -> Iterator[Row]:
        """Rows with their page and section, where the documents tell what they do not say themselves."""
        for row, at in zip(source, scanned.sections, strict=True):
            yield row if at == NONE else _paged(row, self.finder, int(at))


def _read(config: DataConfig, sections: list[Section], gathered: Gathered) -> _Read:
    """Every row once: all are checked, and what becomes of each is decided."""
    finder = Finder(sections)
    extracted = extract_rows(sections, config.extract, config.extract_limit)
    rows = Source(gathered.files, config.rows_limit, config.format, gathered.train + extracted)
    questions = Source(config.questions, config.questions_limit, config.format)
    validation = Source(_validation_files(config), None, config.format)
    compare = bool(config.held_out_sections or config.questions or config.validation or gathered.apart or gathered.replay)
    of_rows, of_questions, of_validation = (scan(source, finder, compare) for source in (rows, questions, validation))
    share = 0.0 if isinstance(config.validation, tuple) else config.validation
    of_sets, replay = (scan(source, Finder([]), compare) for source in (gathered.apart, gathered.replay))
    division = None
    if compare and len(of_rows):
        division = divide(of_rows, of_questions, of_validation, sections, config.held_out_sections, share, config.seed, of_sets, replay)
    return _Read(finder, rows, questions, validation, of_rows, of_questions, of_validation, replay, division)


def _paged(row: Row, finder: Finder, at: int) -> Row:
    if row.page is not None and row.section is not None:
        return row
    section = row.section if row.section is not None else (" > ".join(finder.sections[at].path) or None)
    return replace(row, page=row.page if row.page is not None else finder.page(row, at), section=section)


def _sets(read: _Read, sections: list[Section], gathered: Gathered, left_out: LeftOut) -> dict[str, Iterator[Row]]:
    """Each set's rows, streamed. Those that a set keeps apart speak of no document: nothing else is asked of them."""
    sets = _divided(read, sections, gathered, left_out)
    more = {"unseen_section": gathered.apart}
    return {name: chain(sets[name], more.get(name, ())) for name in ROW_FILES}


def _divided(read: _Read, sections: list[Section], gathered: Gathered, left_out: LeftOut) -> dict[str, Iterator[Row]]:
    division = read.division
    if division is None:
        return {name: read.all_rows() if name == "train" else iter(()) for name in ROW_FILES}
    copies = Copies(sections[at] for at in division.sections)
    trained, replayed = division.rows == TRAIN, division.replay.other == NONE  # copies are taken out as they are found

    def train() -> Iterator[Row]:
        for number, (row, of) in enumerate(read.rows_with(division)):
            reason = copies.reason(row) if of == TRAIN else None
            trained[number] &= reason is None
            if of not in (UNSEEN_SECTION, VALIDATION) and (reason or of != TRAIN):
                left_out(row, reason or division.reason(number))
            elif of == TRAIN:
                yield row
        for number, row in enumerate(gathered.replay):
            if reason := division.replay_reason(number) or copies.reason(row):
                replayed[number] = False
                left_out(row, reason)
            else:
                yield row

    def general() -> Iterator[Row]:
        """After `train`, which ROW_FILES has first: by then the copies are known."""
        again = asked_again(scan(gathered.general, Finder([])), [(read.rows_scan, trained), (read.replay_scan, replayed)])
        for row, is_trained in zip(gathered.general, again.tolist(), strict=True):
            if is_trained:
                left_out(row, "a row that is trained asks or says the same")
            else:
                yield row

    def of(kind: int, numbers: np.ndarray, rows: Callable[[Division], Iterator[tuple[Row, int]]]) -> Iterator[Row]:
        return (row for row, of in rows(division) if of == kind) if (numbers == kind).any() else iter(())

    def both(*parts: Iterator[Row]) -> Iterator[Row]:
        return (row for part in parts for row in part)

    return {
        "train": train(),
        "unseen_section": both(
            of(UNSEEN_SECTION, division.rows, read.rows_with), of(UNSEEN_SECTION, division.questions, read.questions_with)
        ),
        "unseen_wording": of(TRAIN, division.questions, read.questions_with),
        "validation": both(of(VALIDATION, division.rows, read.rows_with), read.all_validation()),
        "general": general(),
    }


# --- writing


def _mixed(folder: Path, gathered: Gathered, config: DataConfig, counts: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What each source gives to an epoch. With a mixture or replay the training tokens are written anew, and `counts` set right."""
    known = {*gathered.source_of.values()} | ({DOCUMENTS} if config.extract != "none" else set())
    counted = bool(config.mixture or config.replay)
    if len(known) == 1 and not counted:
        return {known.pop(): {key: counts[key] for key in ("rows", "samples", "tokens")}}
    with (folder / ROW_FILES["train"]).open("rb") as lines:
        names = [gathered.source_of.get(json.loads(line)["file"], DOCUMENTS) for line in lines]
    store = folder / "tokens" / "train"
    if counted:
        tokens = open_tokens(store)
        written = mix(store, [names[tokens.rows_of(at)[0]] for at in range(len(tokens))], config)
        counts |= {key: written[key] for key in ("samples", "tokens", "supervised")}
    return by_source(store, names)


def _held_out(division: Division | None, sections: list[Section]) -> list[dict[str, Any]]:
    """The documents' sections of which nothing is trained."""
    return [
        {"section": " > ".join(sections[at].path) or "(before the first heading)", "file": sections[at].file, "page": sections[at].page}
        for at in (division.sections if division is not None else ())
    ]


def _write_sections(path: Path, sections: list[Section]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for section in sections:
            out.write(json.dumps(asdict(section), ensure_ascii=False) + "\n")


def _report(
    config: DataConfig, sections: list[Section], counts: dict[str, Any], left_out: LeftOut, folder: Path, template: Template
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
        "left_out": left_out.first,
        "left_out_rows": left_out.count,
    }
