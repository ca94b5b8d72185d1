"""The search for the fastest plan that fits, its reasons, and what is proposed where none does.

Counts are real; what a step needs beside them is a formula here, since tracing takes a second. test_trace.py and test_decide.py trace.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from burnish.config import Plan, RunConfig
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.plan import changes as changing
from burnish.plan import decide as deciding
from burnish.plan import search as searching
from burnish.plan.axes import AXES, Asked, candidates, micro_batches
from burnish.plan.changes import CHANGES
from burnish.plan.decide import decide
from burnish.plan.gpus import GPUS
from burnish.plan.machine import Machine, with_pins
from burnish.plan.phases import Measure
from burnish.plan.report import Part, Phase, Report, enough_in_words
from burnish.plan.search import search, tightest
from burnish.toml import parse_config
from burnish.words import gb_enough

GB = 10**9
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
EIGHT = transformers.LlamaConfig(num_hidden_layers=8, max_position_embeddings=8192, **WIDE)
BASE = Pretrained("8 layers", Path(), None, EIGHT, False)  # 2 billion weights, 1 GB of them quantized, 0.5 GB in embeddings and head
MEASURE = Measure(BASE)
INPUT, WHOLE = 2 * EIGHT.hidden_size, 53 * EIGHT.hidden_size  # bytes that a layer keeps of a token: its input, or all (of a trace)


class Asks:
    """What was measured, in order."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def needed(self, config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
        """The step on the device and on the host."""
        self.plans.append(plan)
        kept = measure.persistent(config.model, config.adapt, config.train, plan)
        tokens, layers = plan.micro_batch * config.data.context, EIGHT.num_hidden_layers
        again = 1 / plan.checkpoint_every if plan.checkpointing else 0
        waiting = round(layers * again * INPUT * tokens) if plan.offload_activations else 0
        activations = round(layers * (again * INPUT + (1 - again) * WHOLE) * tokens) - waiting
        moved = sum(kept.base_layers) if plan.offload_base else 0
        gathered = kept.root + 3 * kept.layer if plan.shards > 1 else 0
        step = (Part("weights", kept.total - moved), Part("gathered layers", gathered), Part("activations", activations))
        if plan.device == "cpu":
            return (Phase("train step", "memory", step, machine.device_bytes),)
        host = (Part("base in host memory", moved), Part("activations in host memory", waiting))
        return (Phase("train step", "GPU", step, machine.device_bytes), Phase("train step", "memory", host, machine.host_bytes))

    def loading(self, config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
        """Weights on the device."""
        kept = measure.persistent(config.model, config.adapt, config.train, plan)
        weights = kept.total - (sum(kept.base_layers) if plan.offload_base else 0)
        return (Phase("load", "GPU", (Part("weights", weights),), machine.device_bytes),)


@pytest.fixture(autouse=True)
def asks(monkeypatch: pytest.MonkeyPatch) -> Asks:
    stub = Asks()
    monkeypatch.setattr(deciding, "Measure", lambda base, longest: MEASURE)
    for module in (searching, changing, deciding):
        monkeypatch.setattr(module, "needed", stub.needed)
    monkeypatch.setattr(changing, "loading", stub.loading)
    monkeypatch.setattr(deciding, "others", lambda *_: ())
    monkeypatch.setattr(changing, "run_folder", lambda *_: Phase("run folder", "disk", (), 1))
    monkeypatch.setattr(deciding, "with_afterwards", lambda config, plan, *_: plan)
    monkeypatch.setattr(changing, "unfit_afterwards", lambda *_: ())
    return stub


def gpus(count: int, gigabytes: float, kind: str = "3090", host: float = 128) -> Machine:
    return Machine("cuda", count, round(gigabytes * GB), round(host * GB), 16, GPUS[kind].bf16, "a GPU", GPUS[kind])


def asked(**sections: Any) -> RunConfig:
    return parse_config({"name": "x", "model": {"path": "8 layers"}, "data": {"context": 1024}} | sections)


def planned(machine: Machine, **sections: Any) -> tuple[Plan, Report]:
    config = asked(**sections)
    return decide(config, BASE, with_pins(machine, config.plan))


def reason(report: Report, name: str) -> str:
    return next(decision.reason for decision in report.decisions if decision.name == name)


def overridden(sections: dict[str, Any], settings: str) -> dict[str, Any]:
    """The sections with what a change says: `model.format=nf4 data.context=512`."""
    sections = {"model": {"path": "8 layers"}, "data": {"context": 1024}, "train": {}, "adapt": {}} | sections
    for word in settings.split():
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        sections[section][name] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    return sections


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


def deciding_plan() -> Plan:
    return Plan(
        device="cuda", ranks=1, strategy="single", dtype="bf16", micro_batch=1, accumulation=1, checkpointing=False
    )  # what `decide` begins with


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


def test_no_more_contexts_at_a_time_than_a_process_has_even_where_more_are_pinned() -> None:
    plan, report = planned(gpus(1, 24), plan={"micro_batch": 99, "checkpointing": "layers"})
    assert (plan.micro_batch, plan.accumulation) == (8, 1)
    assert reason(report, "micro-batch") == "all of the 8 that a process has in a step: plan.micro_batch = 99 is more"


@pytest.mark.parametrize("memory", [0.5, 1.2, 2.2])
def test_the_time_of_each_that_was_measured_is_its_own(memory: float) -> None:
    config = asked(plan={"offload_base": False})
    open_plan = Plan(device="cuda", ranks=1, strategy="single", dtype="bf16", micro_batch=1, accumulation=1, checkpointing=False)
    machine = gpus(2, memory)
    tried = [one for one in search(config, open_plan, machine, MEASURE) if one.tight is not None]
    assert any(one.plan.checkpoint_every > 1 and not one.fits for one in tried)
    for one in tried:
        assert one.seconds == searching.seconds(config, one.plan, machine, MEASURE), one.plan


@pytest.mark.parametrize("memory", [1.24, 1.63, 1.95, 2.05, 3.46])
def test_a_plan_that_leaves_nothing_gives_way_to_one_as_fast_that_leaves_more(memory: float) -> None:
    open_plan = Plan(device="cuda", ranks=1, strategy="single", dtype="bf16", micro_batch=1, accumulation=1, checkpointing=False)
    tried = search(asked(), open_plan, gpus(1, memory), MEASURE)
    shares = [(one.tight.share, one.seconds) for one in tried if one.tight and one.fits]
    assert shares[0][0] <= 0.99
    plainer_but_tight = [share for share, seconds in shares if share > 0.99 and seconds <= 1.1 * min(seconds for _, seconds in shares)]
    assert plainer_but_tight


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
    open_plan = Plan(device="cuda", ranks=1, strategy="single", dtype="bf16", micro_batch=1, accumulation=1, checkpointing=False)
    _, found = changing._the_thriftiest(config, open_plan, machine, MEASURE)  # pyright: ignore[reportPrivateUsage]
    measured = len(asks.plans)
    every = candidates(Asked(config, machine, BASE.config), open_plan)
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


def test_of_two_as_fast_shards_over_all_ranks_come_before_groups_of_them() -> None:
    """The latter keep more on each GPU; where they are clearly faster they are taken."""
    pins = {"offload_base": False, "checkpointing": "layers", "offload_activations": False}
    close, apart = (
        planned(gpus(4, 1.6), plan=pins, train={"rows_per_step": 4}, data={"context": context})[0].strategy for context in (1024, 256)
    )
    assert (close, apart) == ("fsdp", "hybrid")


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


def test_what_is_chosen_never_contradicts_what_was_asked() -> None:
    with pytest.raises(UserError, match="with ddp each process would keep a whole base"):
        planned(gpus(2, 24), plan={"strategy": "ddp", "offload_base": True})


def test_of_each_strategy_the_candidate_that_comes_closest_is_shown_first() -> None:
    _, report = planned(gpus(2, 0.5))
    first = [one.plan.partition(" ")[0] for one in report.candidates[1:5]]
    assert sorted(first) == ["ddp", "fsdp", "fsdp", "single"], "with the base on the device, and in host memory"
    assert all("checkpointing layers" in one.plan for one in report.candidates[:4])
