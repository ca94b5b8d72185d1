"""The search for the fastest plan that fits, and its reasons. What a step needs is a formula (`searched.py`); test_trace.py and
test_decide.py trace."""

import re
from dataclasses import replace
from typing import Any

import pytest

from burnish.config import Plan
from burnish.errors import UserError
from burnish.plan import search as searching
from burnish.plan.axes import AXES, Asked, candidates, micro_batches
from burnish.plan.machine import Machine
from burnish.plan.search import search
from tests.plan.searched import EIGHT, GB, MEASURE, Asks, asked, counted_by_formula, deciding_plan, gpus, planned, reason  # noqa: F401  (the fixture works where it is imported)


def said(plan: Plan) -> tuple[str, int, bool, int, bool, bool]:
    return (plan.strategy, plan.ranks, plan.checkpointing, plan.checkpoint_every, plan.offload_activations, plan.offload_base)


# --- the choice


@pytest.mark.parametrize("memory", [2.5, 3, 3.5, 4, 5, 7, 24])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_choice_is_the_fastest_of_all_candidates_that_fit(count: int, memory: float, asks: Asks) -> None:
    config, machine = asked(), gpus(count, memory)
    found = search(config, deciding_plan(), machine, MEASURE)
    every = [
        replace(option, micro_batch=size, accumulation=-(-config.train.rows_per_step // option.ranks // size))
        for option in candidates(Asked(config, machine, EIGHT), deciding_plan())
        for size in micro_batches(Asked(config, machine, EIGHT), option)
    ]
    fitting = [plan for plan in every if all(phase.fits for phase in asks.needed(config, plan, machine, MEASURE))]
    assert found[0].fits == bool(fitting)
    if fitting:
        fastest = min(searching.seconds(config, plan, machine, MEASURE) for plan in fitting)
        assert found[0].plan in fitting
        assert found[0].seconds <= searching.MARGIN * fastest


@pytest.mark.parametrize(
    ("machine", "choice"),
    [
        (gpus(1, 24), ("single", 1, False, 1, False, False)),
        (gpus(2, 24), ("ddp", 2, False, 1, False, False)),
        (gpus(1, 2.5), ("single", 1, False, 1, False, True)),
        (gpus(1, 3, host=0.5), ("single", 1, True, 2, False, False)),
        (gpus(1, 1.4), ("single", 1, True, 1, False, True)),
        (gpus(2, 2.2), ("fsdp", 2, True, 4, False, True)),
        (gpus(2, 1.6), ("fsdp", 2, True, 2, False, True)),
        (gpus(2, 1.3), ("fsdp", 2, True, 1, False, True)),
    ],
)
def test_less_memory_is_paid_for_with_time(machine: Machine, choice: tuple[Any, ...]) -> None:
    plan, report = planned(machine)
    assert report.fits
    assert said(plan) == choice


def test_of_what_is_as_fast_the_plainest_is_chosen() -> None:
    plan, _ = planned(gpus(2, 24, "h100"), train={"rows_per_step": 2})
    assert said(plan) == ("ddp", 2, False, 1, False, False)


def test_where_copies_are_too_large_shards_are_taken_and_the_reason_says_so() -> None:
    plan, report = planned(gpus(2, 1.6), plan={"checkpointing": "layers"})
    assert plan.strategy == "fsdp"
    assert re.fullmatch(r"a whole model in each process takes 1\.[7-9] GB of 1\.6 GB GPU", reason(report, "strategy"))


def test_nothing_slower_than_what_fits_is_measured(asks: Asks) -> None:
    _, report = planned(gpus(2, 24))
    assert {plan.checkpointing for plan in asks.plans} == {False}
    assert {one.verdict for one in report.candidates if not one.measured} == {"slower, not measured"}


def test_what_lies_between_two_that_were_measured_is_not_where_it_is_clearly_too_large(asks: Asks) -> None:
    planned(gpus(1, 1.4))
    assert {plan.checkpoint_every for plan in asks.plans if plan.checkpointing} == {1}
    asks.plans.clear()
    planned(gpus(1, 3, host=0.5))
    assert 2 in {plan.checkpoint_every for plan in asks.plans}


@pytest.mark.parametrize("memory", [4, 6, 9, 13, 40, 90])
def test_the_micro_batch_is_the_largest_power_of_two_that_fits(memory: float) -> None:
    pins = {"checkpointing": "none", "offload_base": False}
    plan, report = planned(gpus(1, memory), plan=pins, train={"rows_per_step": 50})
    fits = [
        size
        for size in (1, 2, 4, 8, 16, 32)
        if planned(gpus(1, memory), plan=pins | {"micro_batch": size}, train={"rows_per_step": 50})[1].fits
    ]
    assert plan.micro_batch == max(fits, default=1)
    assert plan.micro_batch * plan.accumulation >= 50 > plan.micro_batch * (plan.accumulation - 1)
    if report.fits and plan.micro_batch < 32:
        assert f"{2 * plan.micro_batch} at a time take" in reason(report, "micro-batch")


PINS = [
    {"strategy": "fsdp"},
    {"strategy": "ddp"},
    {"strategy": "single"},
    {"strategy": "fsdp-grad"},
    {"strategy": "hybrid", "shard_ranks": 2},
    {"ranks": 3},
    {"micro_batch": 2},
    {"checkpointing": "none"},
    {"checkpointing": "layers"},
    {"checkpoint_every": 3},
    {"offload_activations": True},
    {"offload_activations": False},
    {"offload_base": True},
    {"offload_base": False},
]


@pytest.mark.parametrize("pin", PINS, ids=str)
@pytest.mark.parametrize("memory", [1.5, 3, 24])
def test_a_pin_is_obeyed_by_every_candidate(pin: dict[str, Any], memory: float) -> None:
    found = search(asked(plan=pin), deciding_plan(), gpus(4, memory), MEASURE)
    for candidate in (one.plan for one in found):
        for name, value in pin.items():
            if name == "checkpointing":
                assert candidate.checkpointing == (value == "layers")
            elif name == "checkpoint_every":
                assert candidate.checkpoint_every == value or not candidate.checkpointing
            else:
                assert getattr(candidate, name) == value


def test_hybrid_groups_are_tried_by_themselves_where_there_are_enough_gpus() -> None:
    options = candidates(Asked(asked(), gpus(8, 24), EIGHT), deciding_plan())
    assert {option.shard_ranks for option in options if option.strategy == "hybrid"} == {2, 4}
    assert not [option for option in candidates(Asked(asked(), gpus(2, 24), EIGHT), deciding_plan()) if option.hybrid]


def test_an_optimizer_that_cannot_be_sharded_leaves_copies() -> None:
    options = candidates(Asked(asked(train={"optimizer": "paged_adamw"}), gpus(4, 24), EIGHT), deciding_plan())
    assert {option.strategy for option in options} == {"ddp", "single"}


def test_every_axis_lists_the_plainest_first() -> None:
    first = candidates(Asked(asked(), gpus(4, 24), EIGHT), deciding_plan())[0]
    assert said(first) == ("ddp", 4, False, 1, False, False)
    assert set(AXES) == {"strategy", "base", "checkpointing"}


# --- what does not fit


def test_the_plan_of_a_run_that_does_not_fit_is_the_one_that_needs_least() -> None:
    _, report = planned(gpus(2, 0.5))
    assert not report.fits
    shares = [phase.bytes / phase.limit_bytes for phase in report.phases]
    assert max(shares) > 1
    assert len(report.candidates) == len({one.plan for one in report.candidates}) > 8
    assert not any(one.fits or not one.measured for one in report.candidates)
    assert all(re.search(r"takes [\d.]+ [GM]B of 0\.50* GB GPU, most of it", one.verdict) for one in report.candidates)


def test_no_more_contexts_at_a_time_than_a_process_has_even_where_more_are_pinned() -> None:
    plan, report = planned(gpus(1, 24), plan={"micro_batch": 99, "checkpointing": "layers"})
    assert (plan.micro_batch, plan.accumulation) == (8, 1)
    assert reason(report, "micro-batch") == "all of the 8 that a process has in a step: plan.micro_batch = 99 is more"


@pytest.mark.parametrize("memory", [0.5, 1.2, 2.2])
def test_the_time_of_each_that_was_measured_is_its_own(memory: float) -> None:
    config = asked(plan={"offload_base": False})
    machine = gpus(2, memory)
    tried = [one for one in search(config, deciding_plan(), machine, MEASURE) if one.tight is not None]
    assert any(one.plan.checkpoint_every > 1 and not one.fits for one in tried)
    for one in tried:
        assert one.seconds == searching.seconds(config, one.plan, machine, MEASURE), one.plan


@pytest.mark.parametrize("memory", [1.24, 1.63, 1.95, 2.05, 3.46])
def test_a_plan_that_leaves_nothing_gives_way_to_one_as_fast_that_leaves_more(memory: float) -> None:
    tried = search(asked(), deciding_plan(), gpus(1, memory), MEASURE)
    shares = [(one.tight.share, one.seconds) for one in tried if one.tight and one.fits]
    assert shares[0][0] <= 0.99
    plainer_but_tight = [share for share, seconds in shares if share > 0.99 and seconds <= 1.1 * min(seconds for _, seconds in shares)]
    assert plainer_but_tight


def test_of_two_as_fast_shards_over_all_ranks_come_before_groups_of_them() -> None:
    """The latter keep more on each GPU; where they are clearly faster they are taken."""
    pins = {"offload_base": False, "checkpointing": "layers", "offload_activations": False}
    close, apart = (
        planned(gpus(4, 1.6), plan=pins, train={"rows_per_step": 4}, data={"context": context})[0].strategy for context in (1024, 256)
    )
    assert (close, apart) == ("fsdp", "hybrid")


def test_what_is_chosen_never_contradicts_what_was_asked() -> None:
    with pytest.raises(UserError, match="with ddp each process would keep a whole base"):
        planned(gpus(2, 24), plan={"strategy": "ddp", "offload_base": True})


def test_of_each_strategy_the_candidate_that_comes_closest_is_shown_first() -> None:
    _, report = planned(gpus(2, 0.5))
    first = [one.plan.partition(" ")[0] for one in report.candidates[1:5]]
    assert sorted(first) == ["ddp", "fsdp", "fsdp", "single"], "with the base on the device, and in host memory"
    assert all("checkpointing layers" in one.plan for one in report.candidates[:4])
