"""Law 8 on ranks: what the plan simulates for one of several ranks, against two whole steps on real ones, through FSDP2 and DDP."""

import pytest

from tests.plan.real_steps import Cell, real_on_ranks
from tests.plan.test_held_to_truth import planned

pytestmark = pytest.mark.ranks

FORMATS = ("none", "nf4", "int4", "hqq4", "q4_1")
SHARDED = [
    *(Cell(method, form, on, 2, "fsdp") for method in ("lora", "dora", "expand") for form in FORMATS for on in (False, True)),
    *(Cell("full", "none", on, 2, "fsdp") for on in (False, True)),
]
OTHERS = [
    Cell("dora", "nf4", True, 2, "fsdp-grad"),
    Cell("expand", "nf4", True, 2, "fsdp-grad"),
    Cell("full", "none", False, 2, "fsdp-grad"),
    Cell("dora", "nf4", False, 2, "fsdp", accumulation=2),
    Cell("full", "none", True, 2, "fsdp", accumulation=2),
    Cell("dora", "nf4", True, 2, "ddp"),
    Cell("full", "none", False, 2, "ddp", accumulation=2),
    Cell("dora", "nf4", True, 2, "fsdp", family="gemma2", dtype="bf16"),
]


AT_ONCE = 8


@pytest.mark.parametrize(
    "cells", [cells[at : at + AT_ONCE] for cells in (SHARDED, OTHERS) for at in range(0, len(cells), AT_ONCE)], ids=len
)
def test_a_planned_step_of_two_ranks_is_an_upper_bound_of_the_real_one_and_within_a_tenth(pool, cells) -> None:
    ranks = pool.run(2, real_on_ranks, tuple(cells))
    wrong = []
    for cell, *rights in zip(cells, *ranks, strict=True):
        found = sum(planned(cell).values())
        right = min(right.least for right in rights)
        wrong += [] if right <= found <= 1.1 * right else [(cell, found / right)]
    assert wrong == []


def test_a_planned_step_of_four_ranks_in_groups_of_two_is_an_upper_bound_too(pool) -> None:
    cells = (Cell("lora", "nf4", True, 4, "hybrid", 2), Cell("full", "none", False, 4, "hybrid-grad", 2))
    for cell, *rights in zip(cells, *pool.run(4, real_on_ranks, cells), strict=True):
        found = sum(planned(cell).values())
        right = min(right.least for right in rights)
        assert right <= found <= 1.1 * right, (cell, found, rights)
