"""How many steps a run has, and that few are pointed out."""

import pytest

from burnish.plan.decide import Prepared, decide
from burnish.plan.reasons import FEW_STEPS
from tests.plan.test_decide import TINY, _measured_once, asked, cpu, reason  # noqa: F401  (the fixture works where it is imported)


@pytest.mark.parametrize(
    ("train", "contexts", "steps", "why"),
    [
        ({"steps": FEW_STEPS}, None, "20", "as train.steps says"),
        ({"steps": FEW_STEPS - 1}, None, "19", "as train.steps says; that is few: a lower train.rows_per_step or data.context, or more"),
        ({"epochs": 3, "rows_per_step": 4}, 9, "7", "3 epochs of 9 contexts; that is few"),
        ({"epochs": 1, "rows_per_step": 1}, 1, "1", "1 epoch of 1 context; that is few"),
        ({"epochs": 2.5, "rows_per_step": 1}, 8, "20", "2.5 epochs of 8 contexts"),
    ],
)
def test_a_run_has_so_many_steps_and_few_are_pointed_out(train, contexts, steps, why):
    report = decide(asked(train=train), TINY, cpu(), contexts and Prepared(contexts, 64))[1]
    assert next(decision.value for decision in report.decisions if decision.name == "steps") == steps
    assert reason(report, "steps").startswith(why)
    assert ("that is few" in reason(report, "steps")) == (int(steps) < FEW_STEPS)
