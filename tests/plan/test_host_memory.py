"""What the plan makes of optimizers, of layers that are recomputed in part, and of what waits in host memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config import AdaptConfig, ModelConfig, TrainConfig
from burnish.errors import UserError
from burnish.plan import changes as changing
from burnish.plan import phases as counting_phases
from burnish.plan import trace as tracing
from burnish.plan.bytes import ADAPTERS, BUFFERS, FROZEN, MOMENTS, SCALES, WEIGHTS, meta, persistent
from burnish.plan.changes import CHANGES
from burnish.plan.cost import in_words
from burnish.plan.few import depth, kinds_of
from burnish.plan.phases import Measure, needed
from burnish.plan.report import Phase, Report, change_in_words
from burnish.plan.trace import worst_batch
from burnish.train import optimizer
from tests.plan.real_steps import CONTEXT, Cell, zeroed
from tests.plan.searched import overridden
from tests.plan.test_bytes import held
from tests.plan.test_decide import LARGE, TINY, _measured_once, asked, cpu, gpus, planned, reason  # noqa: F401  (the fixture works where it is imported)
from tests.plan.test_trace import as_it_is, of, simulated
from tests.tiny import FAMILIES, SIZES, a_plan, built_from, tiny_folder

SMALL = FAMILIES["llama"](**SIZES)
ADAPT = AdaptConfig(rank=64)


def count(train: TrainConfig, shards: int = 1, **plan: Any):
    return persistent(meta(SMALL, ModelConfig(path="tiny"), ADAPT, a_plan(**plan)), train, shards)


@pytest.mark.parametrize("name", [name for name, kind in optimizer.OPTIMIZERS.items() if not kind.paged])
def test_planned_moments_are_those_that_the_optimizer_keeps(name: str) -> None:
    """Adapters of rank 64: large enough for moments of 8 bits, and magnitudes that are not."""
    train = TrainConfig(optimizer=name)  # pyright: ignore[reportArgumentType]
    parameters = meta(SMALL, ModelConfig(path="tiny"), ADAPT, a_plan()).adapters.trainable()
    real = {part: torch.nn.Parameter(torch.zeros(parameter.shape)) for part, parameter in parameters.items()}
    update = optimizer.build(real, train)
    found = count(train)
    assert found.parts[MOMENTS] == held(tensor for _, _, tensor in optimizer.moments(update, real))
    assert found.step_counters == (4 * len(real) if optimizer.OPTIMIZERS[name].counts else 0)


def test_moments_of_8_bits_take_about_a_quarter_and_paged_ones_the_same_elsewhere() -> None:
    found = {name: count(TrainConfig(optimizer=name)).parts[MOMENTS] for name in optimizer.OPTIMIZERS}  # pyright: ignore
    adapters = count(TrainConfig()).parts[ADAPTERS]
    assert found["adamw"] == found["paged_adamw"] == found["adadelta"] == 2 * found["sgd"] == 2 * adapters
    assert found["adamw8bit"] == found["paged_adamw8bit"]
    assert 0.25 < found["adamw8bit"] / found["adamw"] < 0.28
    assert count(TrainConfig(optimizer="sgd", momentum=0.0)).parts[MOMENTS] == 0


@pytest.mark.parametrize("shards", [2, 3])
def test_blocks_of_8_bits_are_counted_for_the_fullest_rank(shards: int) -> None:
    """Each rank's blocks begin with its own rows, so that a cut may need one block more."""
    whole, cut = count(TrainConfig(optimizer="adamw8bit")), count(TrainConfig(optimizer="adamw8bit"), shards)
    assert whole.parts[MOMENTS] / shards <= cut.parts[MOMENTS] < whole.parts[MOMENTS] / shards * 1.05


def phase(train: dict[str, Any], place: str, **plan: Any) -> Phase:
    config = asked(train=train)
    phases = needed(config, a_plan(device="cuda", **plan), gpus(1), Measure(TINY))
    return next(phase for phase in phases if phase.name == "train step" and phase.place == place)


def parts(phase: Phase) -> dict[str, int]:
    return {part.name: part.bytes for part in phase.parts}


def test_paged_moments_are_counted_in_host_memory() -> None:
    plain, paged = phase({"optimizer": "adamw8bit"}, "GPU"), phase({"optimizer": "paged_adamw8bit"}, "GPU")
    assert MOMENTS not in parts(paged)
    assert parts(plain)[MOMENTS] == parts(phase({"optimizer": "paged_adamw8bit"}, "memory"))[MOMENTS]


def test_a_base_in_host_memory_leaves_two_of_its_layers_on_the_gpu() -> None:
    kept = count(TrainConfig())
    assert sum(kept.moved.values()) == kept.moved[WEIGHTS] + kept.moved[SCALES] > 0
    assert kept.moved[WEIGHTS] == kept.parts[WEIGHTS]
    assert 0 < kept.moved[SCALES] < kept.parts[SCALES], "‖W‖² stays"
    before, after = parts(phase({}, "GPU")), parts(phase({}, "GPU", offload_base=True))
    assert after[WEIGHTS] == 0
    assert before[SCALES] - after[SCALES] == kept.moved[SCALES]
    assert after["two layers of the base"] == 2 * max(kept.base_layers)
    assert parts(phase({}, "memory", offload_base=True))["base in host memory"] >= sum(kept.moved.values())


def test_planned_bytes_are_a_filled_models_whose_base_waits_in_host_memory(tmp_path: Path) -> None:
    built = built_from(tiny_folder(tmp_path), plan=a_plan(offload_base=True))
    kept = persistent(meta(SMALL, ModelConfig(path="tiny"), AdaptConfig(rank=8), a_plan()), TrainConfig(), 1)
    names = {id(getattr(linear, name)) for linear in built.linears.values() for name in linear.names}
    here = held(tensor for tensor in [*built.model.parameters(), *built.model.buffers()] if id(tensor) not in names)
    assert kept.of(*FROZEN, ADAPTERS) - sum(kept.moved.values()) == here
    assert kept.parts[BUFFERS] > 0
    assert sum(kept.base_layers) == held(parameter for parameter in built.model.parameters() if id(parameter) in names)


@pytest.mark.parametrize(("family", "every"), [("llama", 2), ("gemma2", 3)])
def test_a_simulated_step_needs_what_the_real_one_needs_where_some_layers_are_recomputed(family: str, every: int) -> None:
    cell = Cell(family=family, checkpointing=True, every=every)
    found, right = simulated(cell), as_it_is(cell)
    assert found.kept == pytest.approx(right.kept, rel=0.001, abs=1024)
    assert found.peak == pytest.approx(right.peak, rel=0.001, abs=1024)


def test_kinds_tell_recomputed_layers_apart() -> None:
    deep = FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 9}))
    assert [", recomputed" in kind for kind in kinds_of(deep, every=4)] == [number % 4 == 0 for number in range(9)]
    assert depth(kinds_of(deep, every=4)) == 9, "fewer would not end as all do"
    assert depth(kinds_of(FAMILIES["llama"](**(SIZES | {"num_hidden_layers": 40})), every=4)) == 7
    assert depth(kinds_of(deep)) == 5


@pytest.mark.parametrize("every", [1, 2])
def test_activations_in_host_memory_are_counted_there_and_not_on_the_device(every: int) -> None:
    """On a CPU both are one memory: what the plan counts in both is what the real step needs in all."""
    cell = Cell(checkpointing=True, every=every, accumulation=2)  # so that most is alive when all are kept, not when gradients have come
    plan = replace(cell.plan, offload_activations=True)
    built = zeroed(cell, plan=plan)
    trace, without = simulated(cell, offload_activations=True), simulated(cell)
    right = of(built, cell.config.adapt, plan, worst_batch(CONTEXT, 1))
    layer_input = (CONTEXT + 1) * SIZES["hidden_size"] * 4
    assert trace.moved == -(-6 // every) * layer_input
    assert 0.999 * right.peak <= trace.moved + trace.peak <= 1.1 * right.peak
    # the first is a leaf of the graph, and stays
    assert without.kept == pytest.approx(trace.kept + trace.moved - layer_input, abs=1024)


def test_what_moves_to_the_host_is_refused_on_a_cpu_and_where_it_contradicts_itself() -> None:
    with pytest.raises(UserError) as refused:
        planned(cpu(), plan={"offload_base": True, "offload_activations": True, "checkpointing": "none", "checkpoint_every": 2})
    for part in (
        "plan.offload_base = true: on a CPU",
        "plan.offload_activations = true: on a CPU",
        "plan.offload_activations = true: it moves what plan.checkpointing keeps",
        "plan.checkpoint_every = 2: plan.checkpointing = 'none'",
    ):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("ddp", r"with ddp each process would keep a whole base in host memory.*Set plan\.strategy=fsdp"),
        ("fsdp-grad", r"plan\.strategy = 'fsdp-grad' keeps all of them there.*Set plan\.strategy=fsdp, or leave plan\.offload_base out"),
        ("hybrid-grad", r"Set plan\.strategy=hybrid, or leave plan\.offload_base out"),
    ],
)
def test_a_base_in_host_memory_is_refused_where_it_is_no_gain(strategy: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(gpus(4), plan={"strategy": strategy, "shard_ranks": 2 if "hybrid" in strategy else 0, "offload_base": True})


@pytest.mark.parametrize(
    ("pins", "expected"),
    [
        ({}, (4, "fsdp")),
        ({"strategy": "fsdp"}, (4, "fsdp")),
        ({"ranks": 1}, (1, "single")),
        ({"strategy": "single"}, (1, "single")),
        ({"strategy": "hybrid", "shard_ranks": 2}, (4, "hybrid")),
    ],
)
def test_a_base_in_host_memory_is_cut_over_all_gpus_unless_the_pins_say_otherwise(pins: dict[str, Any], expected: tuple[int, str]) -> None:
    plan, _ = planned(gpus(4), plan=pins | {"offload_base": True})
    assert ((plan.ranks, plan.strategy), plan.offload_base) == (expected, True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_keep_their_rows_of_a_base_in_host_memory_and_gather_no_base(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (counting_phases, tracing):  # by the formula, as it is with the base in host memory
        monkeypatch.setattr(module, "can_imagine", lambda: False)
    kept = count(TrainConfig(), ranks)
    pins = {"strategy": "fsdp", "ranks": ranks}
    before, after = parts(phase({}, "GPU", **pins)), parts(phase({}, "GPU", offload_base=True, **pins))
    assert after[WEIGHTS] == 0
    assert after["two layers of the base"] == 2 * max(kept.base_layers) >= 2 * max(count(TrainConfig()).base_layers)
    assert after["rows of a layer that is gathered"] == max(kept.base_shares)
    assert before["gathered layers"] - after["gathered layers"] == 3 * (kept.layer - kept.layer_without_base) > 0
    assert parts(phase({}, "memory", offload_base=True, **pins))["base in host memory"] == sum(_pinned(share) for share in kept.base_shares)


def _pinned(count: int) -> int:
    """torch rounds what it pins up to a power of 2."""
    return next(1 << power for power in range(60) if 1 << power >= count)


def test_pins_of_host_memory_are_obeyed_and_said() -> None:
    plan, report = planned(gpus(1), plan={"offload_base": True, "offload_activations": True, "checkpoint_every": 2})
    assert (plan.ranks, plan.checkpointing, plan.checkpoint_every, plan.offload_activations, plan.offload_base) == (1, True, 2, True, True)
    assert reason(report, "checkpointing") == "plan.offload_activations moves what it keeps"
    values = {decision.name: decision.value for decision in report.decisions}
    assert values["checkpointing"] == "every 2 layers, kept in host memory"
    assert values["base"] == "in host memory"


def test_what_an_optimizer_cannot_do_is_listed_with_all_else() -> None:
    with pytest.raises(UserError, match=r"(?s)train\.optimizer = 'paged_adamw'.*on a CPU") as refused:
        planned(cpu(), train={"optimizer": "paged_adamw"}, model={"path": "tiny", "dtype": "fp64"})
    assert "bitsandbytes computes in fp32" in str(refused.value)
    with pytest.raises(UserError, match="magnitudes of DoRA, and this run trains none"):
        planned(cpu(), train={"lr_magnitude": 1e-3}, adapt={"method": "lora"})


def test_fp16_on_a_cpu_is_allowed_and_said_to_be_slow() -> None:
    plan, report = planned(cpu(), model={"path": "tiny", "dtype": "fp16"})
    assert plan.dtype == "fp16"
    assert "most CPUs compute fp16 slowly" in reason(report, "dtype")


# --- after training


def after(report: Report, place: str, name: str = "evaluate") -> Phase:
    return next(phase for phase in report.phases if (phase.name, phase.place) == (name, place))


def test_a_model_that_fits_cut_in_two_alone_is_evaluated_with_its_base_in_host_memory() -> None:
    """Llama-3-8B in 4 bits takes 4 GB, embeddings and head 2: on two GPUs of 7.4 GB it trains as halves."""
    pins = {"strategy": "fsdp", "offload_base": False, "checkpointing": "layers", "offload_activations": True, "micro_batch": 1}
    sections = {"data": {"context": 128}, "evaluate": {"batch": 4}}
    plan, report = planned(gpus(2, 7.4), LARGE, plan=pins, **sections)
    assert report.fits
    assert (plan.offload_base, plan.offload_base_after) == (False, True)
    assert "there is no room on one GPU with the whole model" in reason(report, "afterwards")
    # 32 layers of 218 million weights, 4 bits each and a scale of 32 for 64 of them, at 24 GB/s
    seconds = 32 * 218_103_808 * (4 + 32 / 64) / 8 / 24e9
    assert [one.value for one in report.decisions if one.name == "answers"] == [f"{in_words(seconds)} for each token of a batch"]
    assert after(report, "GPU").fits
    assert after(report, "GPU", "export").fits
    for name in ("evaluate", "export"):
        assert parts(after(report, "memory", name))["base in host memory"] > 3 * 10**9
    assert not report.warnings
    alone = plan.alone
    assert (alone.ranks, alone.strategy, alone.offload_base) == (1, "single", True)
    assert (alone.checkpointing, alone.offload_activations) == (False, False)

    wide, with_room = planned(gpus(2, 24), LARGE, plan=pins, **sections)
    assert not wide.offload_base_after
    assert not wide.alone.offload_base
    assert "answers" not in [one.name for one in with_room.decisions]
    assert "memory" not in {phase.place for phase in with_room.phases if phase.name == "evaluate"}


@pytest.fixture
def no_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing fits, no changes are tried: that takes longer than all else."""
    monkeypatch.setattr(changing, "CHANGES", {})


def test_a_base_that_waits_only_while_training_is_evaluated_on_the_gpu(no_changes: None) -> None:
    """8B in 4 bits are 6 GB with its ends: beside what training needs there is no room on 12 GB, and alone there is."""
    pins = {"offload_base": True, "checkpointing": "layers", "offload_activations": True, "micro_batch": 1}
    plan, report = planned(gpus(1, 12), LARGE, plan=pins, data={"context": 1024}, evaluate={"batch": 4})
    assert (plan.offload_base, plan.offload_base_after, plan.alone.offload_base) == (True, False, False)
    assert after(report, "GPU").fits
    assert "memory" not in {phase.place for phase in report.phases if phase.name in ("evaluate", "export")}
    assert not {"answers", "afterwards"} & {one.name for one in report.decisions}
    small, said = planned(gpus(1, 5.5), LARGE, plan=pins, data={"context": 128}, evaluate={"batch": 1})
    assert (small.offload_base, small.offload_base_after, small.alone.offload_base) == (True, True, True)
    assert {"answers", "afterwards"} & {one.name for one in said.decisions} == {"answers"}


def test_a_base_that_fits_neither_way_stays_and_what_is_trained_cannot_move(no_changes: None) -> None:
    pins = {"strategy": "fsdp", "offload_base": False, "checkpointing": "layers", "micro_batch": 1}
    small = replace(gpus(2, 6), host_bytes=6 * 10**9)
    plan, report = planned(small, LARGE, plan=pins, data={"context": 128}, evaluate={"batch": 4})
    assert not plan.offload_base_after
    assert report.warnings
    full = {"model": {"path": "8b", "format": "none"}, "adapt": {"method": "full"}}
    assert not planned(gpus(2, 24), LARGE, plan=pins, data={"context": 128}, **full)[0].offload_base_after


@pytest.mark.parametrize("host", [6, 64])
def test_a_change_says_what_would_not_fit_after_training(host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changing, "CHANGES", {"shards on all GPUs": CHANGES["shards on all GPUs"]})
    pins = {"strategy": "ddp", "checkpointing": "layers", "offload_activations": True, "offload_base": False, "micro_batch": 1}
    sections = {"data": {"context": 128}, "evaluate": {"batch": 4}}
    machine = replace(gpus(2, 7.4), host_bytes=host * 10**9)
    (change,) = planned(machine, LARGE, plan=pins, **sections)[1].changes
    assert change.fits
    _, changed = planned(machine, LARGE, **overridden({"plan": dict(pins)} | sections, change.settings))
    assert [phase.name for phase in change.later] == [phase.name for phase in changed.phases if not phase.required and not phase.fits]
    assert ("evaluate may not, with" in change_in_words(change)) == bool(change.later) == (host == 6)


def test_fewer_prompts_are_advised_only_where_they_help(no_changes: None) -> None:
    pins = {"strategy": "fsdp", "offload_base": False, "checkpointing": "layers", "micro_batch": 1}
    for gigabytes, batch, advised in ((6, 4, False), (9, 1, False), (9, 64, True)):
        small = replace(gpus(2, gigabytes), host_bytes=6 * 10**9)
        _, report = planned(small, LARGE, plan=pins, data={"context": 4096}, evaluate={"batch": batch, "new_tokens": 4096})
        assert bool(after(report, "GPU").way_out) == advised


def test_fewer_prompts_are_generated_at_a_time_where_there_is_no_room_for_all() -> None:
    pins = {"strategy": "single", "offload_base": False, "checkpointing": "layers", "micro_batch": 1}
    plan, report = planned(gpus(1, 12), LARGE, plan=pins, data={"context": 1024}, evaluate={"batch": 64})
    assert not plan.offload_base_after
    assert 1 <= plan.evaluate_batch < 64
    assert reason(report, "evaluation") == "there is no room for 64 of 1024 tokens"
    assert after(report, "GPU").fits
    again = replace(plan, evaluate_batch=2 * plan.evaluate_batch)
    config = asked(data={"context": 1024}, evaluate={"batch": 64}, plan=pins)
    more = counting_phases.others(config, again, gpus(1, 12), Measure(LARGE), local=True)
    assert not next(phase for phase in more if phase.name == "evaluate").fits, "more would have fitted"
    assert planned(gpus(1, 24), LARGE, plan=pins, data={"context": 1024}, evaluate={"batch": 4})[0].evaluate_batch == 0
