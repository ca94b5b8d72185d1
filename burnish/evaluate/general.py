"""What was forgotten: general rows, which nothing of the training speaks of. A loss that rises on them was paid for what was learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from burnish.config import DataConfig, EvaluateConfig
from burnish.data.held_out import LeftOut
from burnish.data.prepare import ROW_FILES
from burnish.data.rows import Row, load_rows
from burnish.data.sources import parse_source, read_source, untrained
from burnish.data.template import Template
from burnish.data.tokens import open_tokens, write_tokens
from burnish.errors import UserError
from burnish.evaluate.compare import EvaluationSet
from burnish.runs import file_digest

SETTING = "evaluate.general"


def general_key(config: EvaluateConfig) -> dict[str, str]:
    """The files of `evaluate.general` by their bytes."""
    sources = [parse_source(text, SETTING) for text in config.general]
    return {str(file): file_digest(file) for source in sources for file in source.files()}


@contextmanager
def general_set(config: EvaluateConfig, data: DataConfig, template: Template, data_folder: Path) -> Iterator[dict[str, EvaluationSet]]:
    """{"general": the rows of `evaluate.general`}, or nothing where it names none; the tokens lie on disk as long as the block lasts.

    Rows that ask what a trained row asks are left out, and so are those that are longer than the context: neither would tell anything.
    Raises a `UserError` where none is left.
    """
    if not config.general:
        yield {}
        return
    rows, gone = _rows(config, data, template)
    rows = untrained(rows, load_rows(data_folder / ROW_FILES["train"]))
    if not rows:
        why = f" ({gone[0].reason})" if gone else " (each is among the trained rows)"
        raise UserError(f"{SETTING} gives no row to evaluate on{why}. Give other rows, or leave it out.")
    with TemporaryDirectory() as folder:
        store = Path(folder) / "tokens"
        write_tokens(store, ((*template.encode([(row.question, row.answer)]), (at,)) for at, row in enumerate(rows)))
        yield {"general": EvaluationSet("general", rows, open_tokens(store))}


def _rows(config: EvaluateConfig, data: DataConfig, template: Template) -> tuple[list[Row], list[LeftOut]]:
    rows: list[Row] = []
    gone: list[LeftOut] = []
    for text in config.general:
        read = read_source(parse_source(text, SETTING), config.general_limit, template, data.context, data.seed)
        for row in (read.train + read.apart)[: config.general_limit]:
            length = len(template.encode([(row.question, row.answer)])[0])
            if length > data.context:
                gone.append(LeftOut(row, f"{row.place}: {length} tokens, more than the context's {data.context}"))
            else:
                rows.append(row)
    return rows, gone
