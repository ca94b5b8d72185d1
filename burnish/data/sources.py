"""Where rows come from, as a config names it: files of rows, named sets, a mixture of both, and general rows to replay."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from burnish.config import DataConfig
from burnish.data.attribute import plain
from burnish.data.draws import shuffled
from burnish.data.mixture import REPLAY, check_turns, check_weights
from burnish.data.named import NAMED, named_set, without_headings
from burnish.data.rows import Row, read_rows
from burnish.data.set_rows import LeftOut, SetRows, files_of, read_set
from burnish.data.template import Template
from burnish.errors import UserError, did_you_mean

DOCUMENTS = "documents"
"""What the rows that are extracted from documents are called in a mixture and in the report."""
MOST_GENERAL = 200
"""Rows of data.replay that are kept from training to tell what was forgotten: so many, or half of the rows where they are few."""


@dataclass(frozen=True)
class Source:
    """One place of rows: a set (`name`, and a `path` in its place), or a file of rows (`path` alone)."""

    text: str
    """As the config has it, and as the report calls it."""
    name: str | None
    path: str | None

    def files(self) -> list[Path]:
        """The local files that are read."""
        if self.name is None:
            return [Path(self.path or "")]
        return files_of(self.name, self.path) if self.path else []


@dataclass(frozen=True)
class Gathered:
    """All rows that the config names, by what becomes of them."""

    files: list[str] = field(default_factory=list)
    """Files of rows to train on. They are not read here: a file may be larger than memory."""
    train: list[Row] = field(default_factory=list)
    """Rows of sets."""
    apart: list[Row] = field(default_factory=list)
    """Rows of sets that are never trained."""
    replay: list[Row] = field(default_factory=list)
    general: list[Row] = field(default_factory=list)
    """Rows of data.replay that are only evaluated, as far as none that is trained asks the same."""
    left_out: list[LeftOut] = field(default_factory=list)
    source_of: dict[str, str] = field(default_factory=dict)
    """The source of each row's file."""


def parse_source(text: str, setting: str) -> Source:
    """A set's name, `name=path`, or a path. Raises a `UserError` for a name that no set and no file has."""
    name, equals, path = text.partition("=")
    if equals and name.isidentifier():
        named_set(name)
        if not Path(path).exists():
            raise UserError(f"{path}: no such file or folder. Check {setting}: {name}=PATH.")
        return Source(text, name, path)
    if text in NAMED:
        return Source(text, text, None)
    if Path(text).is_file():
        return Source(text, None, text)
    if Path(text).suffix or Path(text).is_dir():
        what = "is a folder" if Path(text).is_dir() else "no such file"
        raise UserError(f"{text}: {what}. {setting} names data sets, or files of rows; a folder stands in a set's place as name={text}.")
    raise UserError(f"{setting}: {Path(text).name!r} is no data set and no file.{did_you_mean(Path(text).name, list(NAMED))}")


def trained_sources(config: DataConfig) -> list[Source]:
    """The sources of what is trained, without documents and replay. Raises a `UserError` for what does not go together."""
    if not config.mixture:
        for text in config.sets:
            named_set(text.partition("=")[0])  # data.sets names no plain files
        return [Source(path, None, path) for path in config.rows] + [parse_source(text, "data.sets") for text in config.sets]
    if config.rows or config.sets:
        which = "data.rows" if config.rows else "data.sets"
        raise UserError(
            f"data.mixture stands in the place of data.rows and data.sets, but {which} is given too. Name its files in the mixture."
        )
    check_weights(config.mixture)
    texts = [part.source for part in config.mixture]
    if config.extract != "none" and DOCUMENTS not in texts:
        raise UserError('data.mixture lacks the rows of data.extract. Add a part with source = "documents", or set data.extract=none.')
    if config.extract == "none" and DOCUMENTS in texts:
        raise UserError("data.mixture has the source 'documents', but no rows are made from them. Set data.extract=recall.")
    return [parse_source(text, "data.mixture") for text in texts if text != DOCUMENTS]


def input_files(config: DataConfig) -> list[Path]:
    """Every local file of rows that the data stage reads, for its key. What comes from the hub is known by its name alone."""
    replay = [parse_source(text, "data.replay") for text in config.replay]
    return [file for source in (*trained_sources(config), *replay) for file in source.files()]


def template_name(config: DataConfig) -> str:
    """`data.template`; where that is `auto`, the template of the sets that are trained, if they have one.

    Raises a `UserError` where they differ: a served model reads one kind of prompt.
    """
    if config.template != "auto":
        return config.template
    names = [text.partition("=")[0] for text in (*config.sets, *(part.source for part in config.mixture))]  # the files may be gone by now
    wanted = {NAMED[name].template: name for name in names if name in NAMED and NAMED[name].template}
    if len(wanted) > 1:
        asked = " and ".join(f"{name} the template {template!r}" for template, name in wanted.items())
        raise UserError(f"data.template = 'auto', but {asked} has. Choose one for all with data.template; 'own' is the model's.")
    return next(iter(wanted), None) or "auto"


def gather(config: DataConfig, template: Template) -> Gathered:
    """Reads every source. Rows of data.replay that are longer than the context are left out, whatever `too_long` says."""
    check_replay(config)
    check_turns(config)
    found = Gathered()
    for source in trained_sources(config):
        if source.name is None:
            found.files.append(source.path or "")
            _name(found, source.path or "", source.text)
            continue
        read = read_source(source, config.sets_limit, template, config)
        _take(found, source.text, read)
        found.train.extend(read.train)
        found.apart.extend(read.apart)
    general: list[Row] = []
    for text in config.replay:
        source = parse_source(text, "data.replay")
        read = read_source(source, config.sets_limit if source.name else config.rows_limit, template, config)
        _take(found, REPLAY, read)
        general += read.train + read.apart
    if general:
        _share_out(found, general, template, config)
    return found


def read_source(source: Source, limit: int | None, template: Template, config: DataConfig) -> SetRows:
    """The rows of one source: of a file in `config.format`, of a set from the hub or its local place."""
    if source.name is None:
        return SetRows(read_rows(source.path or "", limit, config.format), [], [])
    return read_set(source.name, source.path, limit, template, config.context, config.seed)


def check_replay(config: DataConfig) -> None:
    """Raises a `UserError` for a share without rows, and for rows without a share."""
    if config.replay_share and not config.replay:
        raise UserError(
            f"data.replay_share = {config.replay_share}, but data.replay names no rows. Give it files or sets, or set the share to 0."
        )
    if config.replay and not config.replay_share:
        raise UserError(
            "data.replay names rows, but data.replay_share is 0. Give it a share, 0.1 for example; "
            "rows that are only evaluated belong into evaluate.general."
        )


def _take(found: Gathered, name: str, read: SetRows) -> None:
    found.left_out.extend(read.left_out)
    for file in dict.fromkeys(row.file for row in (*read.train, *read.apart)):
        _name(found, file, name)


def _name(found: Gathered, file: str, name: str) -> None:
    if found.source_of.setdefault(str(Path(file)), name) != name:
        raise UserError(f"{file} is named twice: by {found.source_of[str(Path(file))]} and by {name}. Name it once.")


def _share_out(found: Gathered, rows: list[Row], template: Template, config: DataConfig) -> None:
    """Some general rows for the evaluation, the others to be trained."""
    lengths = [0 if row.is_text else len(template.encode(row.turns, row.system)[0]) for row in rows]  # a text is cut into contexts
    why = f"tokens, more than the context's {config.context}"
    found.left_out.extend(LeftOut(row, f"{length} {why}") for row, length in zip(rows, lengths, strict=True) if length > config.context)
    rows = [row for row, length in zip(rows, lengths, strict=True) if length <= config.context]
    if len(rows) < 2:
        hint = "(a file of plain text is one: give several files, or JSONL with the key text)"
        raise UserError(f"data.replay: {len(rows)} of its rows fits data.context = {config.context}; replay needs two or more {hint}.")
    apart = set(shuffled(len(rows), config.seed, "replay")[: min(MOST_GENERAL, len(rows) // 2)])
    found.replay.extend(row for at, row in enumerate(rows) if at not in apart)
    found.general.extend(rows[at] for at in sorted(apart))


def untrained(rows: list[Row], trained: Iterable[Row]) -> list[Row]:
    """The rows that ask nothing that a trained row asks, and say no text that is trained. Holds nothing of the trained rows."""
    keys = [plain(without_headings(row.asked or row.answer)) for row in rows]
    wanted = set(keys)
    found = {text for row in trained if (text := plain(without_headings(row.asked or row.answer))) in wanted}
    return [row for row, text in zip(rows, keys, strict=True) if text not in found]
