"""Every cell of method × format × strategy, from the tables that offer them: which are refused and why, which stand for the rest.

Nothing here is listed by hand: a new row of METHODS, of FORMATS or of the plan's strategies is in the next table.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import get_args

from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ExportConfig, ModelConfig, Plan, PlanConfig, RunConfig, TrainConfig, settings_of
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.model.formats import FORMATS
from burnish.plan.decide import check
from burnish.plan.machine import this_machine
from tests.layers import kind_of
from tests.tiny import FAMILIES, METHOD_SECTIONS, SIZES

LAWS = 1
"""Goes up when the laws of test_support.py ask for more than they did: what was proven before is then not run."""
BLOCK = 32
ALL_FORMATS_RUN = ("single", "fsdp")
"""The cover has every row of FORMATS under these, and one row of each kind under the other strategies."""


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train."""

    method: str
    format: str
    """A row of FORMATS, or `stored`."""
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.method}/{self.format}/{self.strategy}"

    @property
    def ranks(self) -> int:
        """The fewest that show what the strategy does; three cut no matrix of the tiny models evenly."""
        return {"single": 1, "fsdp": 3, "hybrid": 4, "hybrid-grad": 4}.get(self.strategy, 2)

    @property
    def shard_ranks(self) -> int:
        return 2 if self.strategy.startswith("hybrid") else 0

    @property
    def checkpointing(self) -> bool:
        """Of the runs on several ranks, by the name: about half of the cells recompute, and no new row changes which."""
        return self.ranks > 1 and zlib.crc32(self.name.encode()) % 2 == 0

    @property
    def version(self) -> str:
        """Of what was proven, where it was: of the laws, and of the format's bytes."""
        rows = [FORMATS[self.format]] if self.format in FORMATS else [form for form in FORMATS.values() if form.adopt is not None]
        return f"laws {LAWS}, format {'.'.join(str(form.version) for form in rows)}"

    def sections(self) -> tuple[ModelConfig, AdaptConfig, PlanConfig]:
        """What a user would write, for the model in the folder `model` or the file `model.gguf`."""
        path = "model" if self.format in FORMATS else "model.gguf"
        model = ModelConfig(path=path, cache=False, block=BLOCK, dtype="fp64", **settings_of(self.format))
        adapt = AdaptConfig(**({"method": self.method, "rank": 4, "alpha": 8.0} | METHOD_SECTIONS[self.method][1]))
        plan = PlanConfig(strategy=self.strategy, ranks=self.ranks, shard_ranks=self.shard_ranks)  # pyright: ignore[reportArgumentType]
        return model, adapt, plan


def strategies() -> tuple[str, ...]:
    """Those of a plan, once they are chosen."""
    return get_args(next(entry.type for entry in fields(Plan) if entry.name == "strategy"))


def formats() -> tuple[str, ...]:
    """The rows of FORMATS, and the settings that ask for none of them because each file has its own: `stored`."""
    asked = get_args(next(entry.type for entry in fields(ModelConfig) if entry.name == "format"))
    rows = {settings_of(name)["format"] for name in FORMATS}
    return (*FORMATS, *(name for name in asked if name not in rows))


def all_cells() -> list[Cell]:
    """Refused ones too, in the order of the tables."""
    return [Cell(method, form, strategy) for method in METHODS for form in formats() for strategy in strategies()]


@cache
def refusal(cell: Cell) -> str | None:
    """What a plan for the cell is refused with on a CPU, or None. Asks what `burnish plan` asks first; builds nothing."""
    model, adapt, plan = cell.sections()
    config = RunConfig(
        name="cell",
        model=model,
        adapt=adapt,
        plan=plan,
        train=TrainConfig(log=()),
        export=ExportConfig(writers=("transformers",)),  # every method has this one
    )
    found = Pretrained(model.path, Path(), Path(model.path) if model.format == "stored" else None, FAMILIES["llama"](**SIZES), False)
    try:
        check(replace(config, data=replace(config.data, context=64)), found, replace(this_machine(), device="cpu", devices=1))
    except UserError as refused:
        return str(refused)
    return None


def runnable() -> list[Cell]:
    """All that are not refused."""
    return [cell for cell in all_cells() if refusal(cell) is None]


def cover(cells: Sequence[Cell]) -> list[Cell]:
    """Some of the cells, in which each pair of method, kind of format and strategy occurs that occurs in any of them, and each format
    under `ALL_FORMATS_RUN`.

    Greedy: always the cell with the most pairs that are still missing, among equals one of the method that was taken least, among those
    the first. So the same cells in the same order give the same cover.
    """
    pairs = {cell: _pairs(cell) for cell in cells}
    missing = set().union(*pairs.values())
    chosen: list[Cell] = []
    uses: Counter[str] = Counter()
    while missing:
        best = max(cells, key=lambda cell: (len(pairs[cell] & missing), -uses[cell.method]))
        chosen.append(best)
        uses[best.method] += 1
        missing -= pairs[best]
    return sorted(chosen, key=list(cells).index)


def _pairs(cell: Cell) -> set[tuple[object, ...]]:
    kind = kind_of(cell.format) if cell.format in FORMATS else cell.format
    pairs = {
        ("method, format", cell.method, kind),
        ("method, strategy", cell.method, cell.strategy),
        ("format, strategy", kind, cell.strategy),
    }
    return pairs | ({("row, strategy", cell.format, cell.strategy)} if cell.strategy in ALL_FORMATS_RUN else set())


def named(cells: Iterable[Cell]) -> dict[str, Cell]:
    return {cell.name: cell for cell in cells}
