"""Writes docs/support.md from the tables and docs/support.json, the record of `make support`: `python docs/support.py` (`--check` exits
with 1 where the page is stale)."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from burnish.adapt.methods import METHODS
from tests.ranks import record
from tests.ranks.cells import Cell, all_cells, cover, formats, refusal, runnable, strategies

PAGE = Path(__file__).with_name("support.md")
HEAD = """# What is proven

One cell is one way to train: a method ({methods}), a format of the base, a strategy. Three words:

* **proven**: a tiny model was trained so, in float64. The loss fell; what should be trained moved, magnitudes too, and every other byte
  stayed; losses, gradients, weights and the base's bytes were those of one process; and the run that continued from what a kill in
  mid-epoch leaves was the uninterrupted one, bit for bit.
* **refused**: `burnish plan` says why before it reads a weight, and no training starts.
* **not run**: nobody tried. That is everything on a GPU: these cells ran on a CPU, with gloo, and none on CUDA with NCCL ([what that leaves
  out](not_run.md)).

{counts} CI runs {cover} of them, in which every two of method, kind of format and
strategy meet that can, and every format meets `single` and `fsdp`; `make support` runs all that are not refused and writes the record,
`docs/support.json`. This page is made from the record and the tables of the code. {about}

Ranks: {ranks}. {recomputed} cells recompute their layers. `stored` is a GGUF file with blocks of
several types, as they are.
"""


def word(cell: Cell, cells: dict[str, str]) -> str:
    """One of three."""
    if refusal(cell) is not None:
        return "refused"
    return "proven" if record.is_proven(cell, cells) else "not run"


def page(recorded: dict[str, Any]) -> str:
    """The page. Exits, naming them, where cells failed when they were last run: there is no word for those."""
    cells = recorded["cells"]
    broken = [cell.name for cell in all_cells() if cells.get(cell.name) == record.entry(cell, record.FAILED)]
    if broken:
        sys.exit(f"these cells do not keep the laws: {', '.join(broken)}. Mend them, then make support.")
    counts = Counter(word(cell, cells) for cell in all_cells())
    head = HEAD.format(
        methods=", ".join(f"`{method}`" for method in METHODS),
        counts=f"Of {counts.total()} cells {counts['proven']} are proven, {counts['refused']} refused and {counts['not run']} not run.",
        cover=len(cover(runnable())),
        about=f"Last written {recorded['about']['date']} with torch {recorded['about']['torch']}." if recorded["about"] else "",
        ranks=", ".join(f"{cell.ranks} for `{cell.strategy}`" for cell in all_cells()[: len(strategies())]),
        recomputed=sum(cell.checkpointing for cell in runnable()),
    )
    return head + "".join(_table(method, cells) for method in METHODS)


def _table(method: str, cells: dict[str, str]) -> str:
    lines = [f"\n## {method}: {METHODS[method].title}\n", f"| format | {' | '.join(strategies())} |", "|---|" + "---|" * len(strategies())]
    reasons: list[str] = []
    for form in formats():
        words = []
        for strategy in strategies():
            cell = Cell(method, form, strategy)
            said = word(cell, cells)
            if said == "refused":
                why = _reason(cell)
                reasons += [why] if why not in reasons else []
                said += f" ({reasons.index(why) + 1})"
            words.append(said)
        lines.append(f"| `{form}` | {' | '.join(words)} |")
    told = [f"({number}) {why}" for number, why in enumerate(reasons, 1)]
    return "\n".join([*lines, *(["", *told] if told else []), ""])


def _reason(cell: Cell) -> str:
    """What the user is told, with `…` for the format."""
    return (refusal(cell) or "").replace(repr(cell.sections()[0].format), "…").replace("\n", " ")


if __name__ == "__main__":
    made = page(record.read())
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == made else "docs/support.md is stale: python docs/support.py")
    PAGE.write_text(made, encoding="utf-8")
