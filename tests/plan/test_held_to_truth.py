"""Law 8: what the plan says a step needs, against two whole steps of the training loop on real tensors, counted as they run."""

from pathlib import Path

import pytest

from burnish.load.pretrained import Pretrained
from burnish.plan import phases, trace
from burnish.plan.machine import Machine
from burnish.plan.phases import Measure, needed
from tests.plan.real_steps import Cell, real

ROOMY = Machine("cpu", 1, 10**12, 10**12, 8, False, "a CPU")
NOT_COUNTED = ("allocator", "Python and its libraries")
MEASURES: dict[str, Measure] = {}


def planned(cell: Cell) -> dict[str, int]:
    """The parts of the training step that can be counted."""
    measure = MEASURES.setdefault(cell.family, Measure(Pretrained("tiny", Path(), None, cell.net, False)))
    step = next(phase for phase in needed(cell.config, cell.plan, ROOMY, measure) if phase.name == "train step")
    return {part.name: part.bytes for part in step.parts if part.name not in NOT_COUNTED}


CELLS = [
    *(Cell(method, form, True) for method in ("lora", "dora") for form in ("none", "nf4")),
    *(Cell("dora", form) for form in ("int4", "hqq4", "q4_1")),
    Cell("expand", "nf4", True),
    Cell("full", "none", True),
    Cell("full", "none"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.method}-{cell.format}-{cell.checkpointing}")
def test_a_planned_step_is_an_upper_bound_of_the_real_one_and_within_a_tenth(cell: Cell) -> None:
    """Of one micro-batch and of two, whose gradients are there while the second runs: one simulation serves both."""
    for accumulation in (1, 2):
        cut = Cell(cell.method, cell.format, cell.checkpointing, accumulation=accumulation)
        found, right = sum(planned(cut).values()), real(cut)
        assert right.total <= found <= 1.1 * right.total
        assert right.peaks[0] == right.peaks[1], "the first step needs what every other needs"


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp-grad"])
def test_a_process_that_has_ranks_already_plans_an_upper_bound(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot imagine others, and counts what FSDP2 gathers by a formula."""
    cell = Cell("lora", "none", True, ranks=2, strategy=strategy)
    simulated = planned(cell)
    MEASURES.clear()
    monkeypatch.setattr(phases, "can_imagine", lambda: False)
    monkeypatch.setattr(trace, "can_imagine", lambda: False)
    bound = planned(cell)
    MEASURES.clear()
    assert simulated["gathered layers"] <= bound["gathered layers"]
    assert sum(simulated.values()) <= sum(bound.values()) <= 1.35 * sum(simulated.values())
