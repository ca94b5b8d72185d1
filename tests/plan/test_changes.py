"""What is proposed where no plan fits. What a step needs is a formula (`searched.py`)."""

import pytest

from burnish.plan import changes as changing
from burnish.plan.axes import Asked, candidates
from burnish.plan.changes import CHANGES
from burnish.plan.report import enough_in_words
from burnish.plan.search import tightest
from burnish.words import gb_enough
from tests.plan.searched import BASE, GB, MEASURE, Asks, asked, counted_by_formula, deciding_plan, gpus, overridden, planned  # noqa: F401  (the fixture works where it is imported)


def test_the_smallest_change_is_said_first_and_fits_when_it_is_made() -> None:
    pins = {"checkpointing": "none", "micro_batch": 8, "offload_base": False}
    _, report = planned(gpus(1, 5), plan=pins)
    assert not report.fits
    smallest = report.smallest_change
    assert smallest is not None
    assert smallest.settings == "plan.checkpointing=layers"
    assert planned(gpus(1, 5), plan=pins | {"checkpointing": "layers"})[1].fits


@pytest.mark.parametrize("memory", [0.8, 1.0, 1.2, 1.5, 1.8, 2.2])
def test_a_change_fits_if_and_only_if_it_is_said_to(memory: float) -> None:
    pins = {"strategy": "ddp", "checkpointing": "none", "micro_batch": 2}
    _, report = planned(gpus(2, memory), plan=pins)
    assert report.changes
    for change in report.changes:
        sections = overridden({"plan": dict(pins)}, change.settings)
        assert planned(gpus(2, memory), **sections)[1].fits == change.fits, change.settings


def test_a_change_is_made_no_larger_than_it_must_be() -> None:
    _, report = planned(gpus(1, 2.75), data={"context": 4096}, plan={"offload_base": False, "checkpointing": "none"})
    context = next(change for change in report.changes if change.settings.startswith("data.context="))
    size = int(context.settings.partition("=")[2])
    assert context.fits
    assert size > 256
    assert not planned(gpus(1, 2.75), data={"context": 2 * size}, plan={"offload_base": False, "checkpointing": "none"})[1].fits


def test_several_changes_are_put_together_where_none_is_enough_and_no_more_of_them_than_it_takes() -> None:
    pins = {"checkpointing": "none", "micro_batch": 16, "offload_base": False}
    _, report = planned(gpus(1, 1.4), plan=pins)
    assert not any(change.fits for change in report.changes[:-1])
    assert report.changes[-1].settings == "plan.micro_batch=1 plan.checkpointing=layers plan.offload_base=true"
    assert report.changes[-1].fits


def test_a_change_that_needs_no_less_is_not_said() -> None:
    """Host memory is short for what layers keep there, which the base, the rank and the optimizer do not change."""
    pins = {"checkpointing": "layers", "offload_activations": True, "micro_batch": 2, "offload_base": False}
    _, report = planned(gpus(1, 24, host=0.01), plan=pins)
    (need,) = report.needs
    assert need.place == "memory"
    *single, together = report.changes
    assert [change.settings for change in single] == ["plan.micro_batch=1", "data.context=256"]
    assert all(change.needs[0].bytes < need.bytes for change in report.changes)
    assert "plan.offload_base" not in together.settings  # which needs more of it


@pytest.mark.parametrize("memory", [0.2, 0.4, 0.8, 1.6])
def test_the_closest_is_found_without_measuring_what_cannot_even_be_loaded(memory: float, asks: Asks) -> None:
    config, machine = asked(plan={"offload_base": False}), gpus(4, memory)
    _, found = changing._the_thriftiest(config, deciding_plan(), machine, MEASURE)  # pyright: ignore[reportPrivateUsage]
    measured = len(asks.plans)
    every = candidates(Asked(config, machine, BASE.config), deciding_plan())
    closest = min(tightest(asks.needed(config, option, machine, MEASURE)).share for option in every)
    assert tightest(found).fits == (closest <= 1)
    assert tightest(found).fits or tightest(found).share == closest
    assert measured <= 2  # of four strategies


@pytest.mark.parametrize("gigabytes", [0.45, 0.9])
def test_what_would_be_enough_is_enough(gigabytes: float) -> None:
    """As it was asked, and with the change that needs least where no change makes it fit."""
    pins = {"checkpointing": "none", "micro_batch": 2, "offload_base": False}
    _, report = planned(gpus(1, gigabytes), plan=pins)
    (need,) = report.needs
    assert need.place == "GPU"
    assert planned(gpus(1, need.bytes / GB), plan=pins)[1].fits
    assert not planned(gpus(1, (need.bytes - 1000) / GB), plan=pins)[1].fits
    said = enough_in_words(report)
    assert said.startswith(f"As asked, training would fit with {gb_enough(need.bytes)} on each GPU")
    enough = float(gb_enough(need.bytes).split()[0])
    assert planned(gpus(1, enough), plan=pins)[1].fits  # as it is said
    assert (". With " in said) == (report.smallest_change is None)
    if report.smallest_change is None:
        settings, _, gigabytes = said.partition(". With ")[2].partition(" it would with ")
        changed = overridden({"plan": dict(pins)}, settings)
        assert planned(gpus(1, float(gigabytes.split()[0])), **changed)[1].fits
        assert not planned(gpus(1, float(gigabytes.split()[0]) - 0.1), **changed)[1].fits


def test_where_gpus_are_too_small_the_host_memory_that_would_do_is_named() -> None:
    pins = {"checkpointing": "layers", "micro_batch": 1}
    _, report = planned(gpus(1, 1.0, host=0.2), plan=pins)
    assert [need.place for need in report.needs] == ["GPU"]
    (need,) = report.instead
    assert need.place == "memory"
    assert f" on each GPU, or with {gb_enough(need.bytes)} of memory on each machine" in enough_in_words(report)
    assert planned(gpus(1, 1.0, host=need.bytes / GB), plan=pins)[1].fits
    assert not planned(gpus(1, 1.0, host=(need.bytes - 1000) / GB), plan=pins)[1].fits
    assert planned(gpus(1, 1.0, host=0.2), plan=pins | {"offload_base": False})[1].instead == ()


def test_settings_that_change_nothing_are_not_proposed() -> None:
    config = asked(plan={"checkpointing": "layers"}, model={"path": "8 layers", "double_quantized": True}, data={"context": 256})
    proposed = {name for name, change in CHANGES.items() if change(config, gpus(1, 1)) is not None}
    assert proposed == {"moments in 8 bits", "embeddings and head in 8 bits, then in 4", "half the rank", "3 bits"}


def test_where_all_weights_are_too_many_adapters_are_proposed_and_no_codes_for_weights() -> None:
    sections = {"model": {"path": "8 layers", "format": "none"}, "export": {"writers": ["transformers"]}}
    _, report = planned(gpus(1, 10), adapt={"method": "full"}, **sections)
    assert not report.fits
    changes = {change.settings: change.fits for change in report.changes}
    assert "model.format=nf4" not in changes
    assert changes["model.format=nf4 adapt.method=dora"]
