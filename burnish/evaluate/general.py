"""What was forgotten: general rows, which nothing of the training speaks of. A loss that rises on them was paid for what was learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from burnish.config import DataConfig, EvaluateConfig
from burnish.data.fit import Fitted, fit
from burnish.data.key import source_by_name
from burnish.data.prepare import ROW_FILES
from burnish.data.rows import Row, StoredRows
from burnish.data.sources import parse_source, read_source, untrained
from burnish.data.template import Template
from burnish.data.tokens import open_tokens, write_tokens
from burnish.errors import UserError
from burnish.evaluate.compare import EvaluationSet
from burnish.runs import file_digest

SETTING = "evaluate.general"


def general_key(config: EvaluateConfig) -> tuple[list[str], dict[str, str]]:
    """(the entries of `evaluate.general` by their names, their files by their bytes): the same wherever they lie."""
    entries = [source_by_name(text, SETTING) for text in config.general]
    files = {f"{at}: {name}" + f": {inner}" * bool(inner): file for at, (name, inside) in enumerate(entries, 1) for inner, file in inside}
    return [name for name, _ in entries], {name: file_digest(file) for name, file in files.items()}


@contextmanager
def general_set(config: EvaluateConfig, data: DataConfig, template: Template, data_folder: Path) -> Iterator[dict[str, EvaluationSet]]:
    """{"general": the rows of `evaluate.general`}, or nothing where it names none; the tokens lie on disk as long as the block lasts.

    Rows that ask what a trained row asks are left out, and so are those that are longer than the context: neither would tell anything.
    Raises a `UserError` where none is left.
    """
    if not config.general:
        yield {}
        return
    gone: list[str] = []
    fitted: list[Fitted] = []
    with StoredRows(data_folder / ROW_FILES["train"]) as trained:
        for rows in _rows(config, data, template):
            others = untrained(rows, (trained[at] for at in range(len(trained))))
            samples = fit(others, template, data.context, "drop", lambda row, reason: gone.append(f"{row.place}: {reason}"))
            fitted += islice(samples, config.general_limit)  # one text alone gives many
    if not fitted:
        why = f" ({gone[0]})" if gone else " (each is among the trained rows)"
        raise UserError(f"{SETTING} gives no row to evaluate on{why}. Give other rows, or leave it out.")
    with TemporaryDirectory() as folder:
        store = Path(folder) / "tokens"
        write_tokens(store, ((sample.ids, sample.mask, (at,)) for at, sample in enumerate(fitted)))
        yield {"general": EvaluationSet("general", [sample.row for sample in fitted], open_tokens(store))}


def _rows(config: EvaluateConfig, data: DataConfig, template: Template) -> Iterator[list[Row]]:
    for text in config.general:
        read = read_source(parse_source(text, SETTING), config.general_limit, template, data)
        yield (read.train + read.apart)[: config.general_limit]
