"""The table of what is proven: all cells are in it, the cover stands for them, and refused ones are refused at once."""

from dataclasses import replace
from itertools import combinations
from typing import get_args

import pytest

from burnish.adapt.methods import METHODS
from burnish.config import ModelConfig, PlanConfig
from burnish.errors import UserError
from burnish.model import network
from burnish.model.formats import FORMATS
from burnish.skeleton import skeleton
from tests.layers import KINDS, kind_of
from tests.ranks.cells import ALL_FORMATS_RUN, Cell, all_cells, cover, formats, refusal, runnable, strategies
from tests.tiny import FAMILIES, ONE, SIZES, a_plan

REFUSED = [cell for cell in all_cells() if refusal(cell)]


def choices(section: type, setting: str) -> set[str]:
    return set(get_args(section.__dataclass_fields__[setting].type))


def test_every_method_format_and_strategy_that_can_be_asked_for_is_in_the_table():
    cells = all_cells()
    assert len(cells) == len(set(cells)) == len(METHODS) * (len(FORMATS) + 1) * len(strategies())
    assert {cell.method for cell in cells} == set(METHODS)
    assert {cell.format for cell in cells} == {*FORMATS, "stored"}
    assert {cell.sections()[0].format for cell in cells} == choices(ModelConfig, "format")
    assert {cell.strategy for cell in cells} == choices(PlanConfig, "strategy") - {"auto"}
    assert {cell.ranks for cell in cells if cell.strategy.startswith("hybrid")} == {4}


def kind(cell: Cell) -> Cell:
    """The cell with the first format of its kind."""
    return replace(
        cell, format=next((name for name in KINDS if cell.format in FORMATS and kind_of(name) == kind_of(cell.format)), "stored")
    )


def test_every_two_of_method_kind_and_strategy_that_can_meet_do_so_in_the_cover():
    def meetings(cells) -> set[tuple]:
        return {pair for cell in map(kind, cells) for pair in combinations(enumerate((cell.method, cell.format, cell.strategy)), 2)}

    chosen = cover(runnable())
    assert meetings(chosen) == meetings(runnable())
    for strategy in ALL_FORMATS_RUN:
        assert {cell.format for cell in chosen if cell.strategy == strategy} == set(formats())
    assert set(chosen) <= set(runnable())


def test_the_cover_is_hardly_larger_than_it_must_be():
    """A cell holds one pair of a kind and a strategy, so no cover is smaller than their number and that of the other rows."""
    least = (len(KINDS) + 1) * len(strategies()) + (len(FORMATS) - len(KINDS)) * len(ALL_FORMATS_RUN)
    assert least <= len(cover(runnable())) <= 1.1 * least


def test_the_cover_is_the_same_each_time():
    assert cover(runnable()) == cover([replace(cell) for cell in runnable()])


@pytest.mark.parametrize(("row", "more"), [("as_nf4", len(ALL_FORMATS_RUN)), ("of_its_own_kind", len(strategies()))])
def test_a_new_format_enlarges_the_cover(monkeypatch, row, more):
    cells = runnable()
    before = cover(cells)
    if row == "as_nf4":
        monkeypatch.setitem(FORMATS, row, FORMATS["nf4"])
    after = cover([*cells, *(replace(cell, format=row) for cell in cells if cell.format == "nf4")])
    assert len([cell for cell in after if cell.format == row]) >= more
    assert len(after) >= len(before) + more


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.name)
def test_a_refused_cell_is_refused_with_its_reason_before_anything_is_built(cell, monkeypatch):
    monkeypatch.setattr(network, "build", lambda *_: pytest.fail("a network was built"))
    model, adapt, _ = cell.sections()
    with pytest.raises(UserError) as refused:
        skeleton(FAMILIES["llama"](**SIZES), model, adapt, a_plan(), ONE)
    assert str(refused.value) == refusal(cell)
    assert f"model.format = '{model.format}'" in str(refused.value)
    assert "Set model.format=none, or" in str(refused.value)


def test_full_finetuning_of_codes_is_what_is_refused_and_nothing_else():
    assert {(cell.method, cell.format) for cell in REFUSED} == {("full", name) for name in formats() if name != "none"}
