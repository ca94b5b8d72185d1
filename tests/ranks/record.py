"""docs/support.json: what the last run of each cell came to, and what it was a run of. `make support` writes it."""

import json
import time
from pathlib import Path
from typing import Any

from burnish.runs import about, write_json
from tests.ranks.cells import Cell, all_cells

FILE = Path(__file__).parents[2] / "docs" / "support.json"
KIND = "support/1"
PROVEN, FAILED = "proven", "failed"
KEPT = ("burnish", "torch", "transformers", "python")


def read(file: Path = FILE) -> dict[str, Any]:
    """Cells by name; none where there is no record."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"burnish": KIND, "about": {}, "cells": {}}


def entry(cell: Cell, outcome: str) -> str:
    return f"{outcome}: {cell.version}"


def is_proven(cell: Cell, cells: dict[str, str] | None = None) -> bool:
    """Of these laws and this format; a record of others is no proof."""
    return (read()["cells"] if cells is None else cells).get(cell.name) == entry(cell, PROVEN)


def proven(cell: Cell, file: Path = FILE) -> None:
    _write(cell, PROVEN, file)


def failed(cell: Cell, file: Path = FILE) -> None:
    """Said before a cell is run, so that one that never ends is not taken for what it was before."""
    _write(cell, FAILED, file)


def _write(cell: Cell, outcome: str, file: Path) -> None:
    cells = read(file)["cells"] | {cell.name: entry(cell, outcome)}
    kept = {known.name: cells[known.name] for known in all_cells() if known.name in cells}
    versions = {name: about()["versions"][name] for name in KEPT}
    write_json(file, {"burnish": KIND, "about": versions | {"date": time.strftime("%Y-%m-%d")}, "cells": kept})
