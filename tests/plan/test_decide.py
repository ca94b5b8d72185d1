"""Decisions of the plan: each with its reason; and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from rich.console import Console

from burnish.config import Plan, RunConfig
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.plan import decide as deciding
from burnish.plan import disk
from burnish.plan import machine as machines
from burnish.plan.decide import Prepared, decide
from burnish.plan.machine import Machine, host_bytes, this_machine, with_pins
from burnish.plan.phases import Measure
from burnish.plan.render import render
from burnish.plan.report import Report, as_json, enough_in_words, refuse_unless_fits
from burnish.toml import parse_config
from burnish.words import gb_enough
from tests.tiny import FAMILIES, SIZES

GB = 10**9
FIXED = {"checkpointing": "layers", "micro_batch": 1, "offload_activations": False, "offload_base": False}
"""Pins that leave one candidate."""
TINY = Pretrained("tiny", Path(), None, transformers.LlamaConfig(**SIZES), False)
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
LARGE = Pretrained("8b", Path(), None, transformers.LlamaConfig(num_hidden_layers=32, max_position_embeddings=8192, **WIDE), False)
HUGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
HUGEST = Pretrained("70b", Path(), None, transformers.LlamaConfig(num_hidden_layers=80, max_position_embeddings=8192, **HUGE), False)


MEASURES: dict[tuple[int, int | None], Measure] = {}


@pytest.fixture(autouse=True)
def _measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and traces of a base are the same in every test: a trace takes a second."""
    monkeypatch.setattr(deciding, "Measure", lambda base, longest=None: MEASURES.setdefault((id(base), longest), Measure(base, longest)))


def cpu(host: float = 16) -> Machine:
    return Machine("cpu", 1, round(host * GB), round(host * GB), 8, False, "a CPU")


def gpus(count: int, gigabytes: float = 24, bf16: bool = True) -> Machine:
    return Machine("cuda", count, round(gigabytes * GB), 128 * GB, 16, bf16, "a GPU")


def asked(**sections: Any) -> RunConfig:
    return parse_config({"name": "x", "model": {"path": "tiny"}, "data": {"context": 64}} | sections)


def planned(machine: Machine, base: Pretrained = TINY, **sections: Any) -> tuple[Plan, Report]:
    config = asked(**sections)
    return decide(config, base, with_pins(machine, config.plan))


def reason(report: Report, name: str) -> str:
    return next(decision.reason for decision in report.decisions if decision.name == name)


def test_a_cpu_gets_one_process_in_fp32_and_at_least_512_tokens_at_a_time() -> None:
    plan, report = planned(cpu(), train={"rows_per_step": 24})
    assert plan == Plan(device="cpu", ranks=1, strategy="single", dtype="fp32", micro_batch=8, accumulation=3, checkpointing=False)
    assert report.fits
    assert "few are faster in bf16" in reason(report, "dtype")
    assert planned(cpu(), data={"context": 256})[0].micro_batch == 2


@pytest.mark.parametrize(("context", "rows", "expected"), [(64, 3, 2), (64, 1, 1), (256, 8, 2), (64, 64, 8)])
def test_no_more_contexts_at_a_time_than_a_step_has(context: int, rows: int, expected: int) -> None:
    plan, _ = planned(cpu(), data={"context": context}, train={"rows_per_step": rows})
    assert plan.micro_batch == expected
    assert plan.micro_batch * plan.accumulation >= rows > plan.micro_batch * (plan.accumulation - 1)


@pytest.mark.parametrize(
    ("ranks", "rows", "expected"),
    [
        (1, 1, "1 context in a step, over 1 × 1"),
        (4, 8, "8 contexts in a step, over 4 × 1"),
        (
            4,
            6,
            "6 contexts in a step, over 4 × 1; waiting for the others: 2 (none with a multiple of 4 in train.rows_per_step)",
        ),
        (
            4,
            3,
            "3 contexts in a step, over 4 × 1; waiting for the others: 1 (none with a multiple of 4 in train.rows_per_step)",
        ),
    ],
)
def test_who_waits_in_a_step_is_said(ranks: int, rows: int, expected: str) -> None:
    pins = {"ranks": ranks, "micro_batch": 1, "checkpointing": "layers", "offload_base": False}
    report = planned(gpus(4), plan=pins | {"strategy": "ddp" if ranks > 1 else "single"}, train={"rows_per_step": rows})[1]
    assert reason(report, "accumulation") == expected


def test_one_gpu_without_bf16_computes_in_fp16() -> None:
    plan, report = planned(gpus(1, bf16=False), plan=FIXED)
    assert (plan.ranks, plan.strategy, plan.dtype) == (1, "single", "fp16")
    assert reason(report, "dtype") == "this GPU has no bf16; the loss is scaled"


def test_pins_are_obeyed() -> None:
    pins = {"ranks": 2, "strategy": "fsdp", "micro_batch": 2, "checkpointing": "layers"}
    plan, _ = planned(gpus(4), plan=pins, model={"path": "tiny", "dtype": "fp32"})
    assert plan == Plan(device="cuda", ranks=2, strategy="fsdp", dtype="fp32", micro_batch=2, accumulation=2, checkpointing=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sharding_over_one_process_is_a_single_one(strategy: str) -> None:
    plan, report = planned(cpu(), plan={"strategy": strategy, "ranks": 1})
    assert plan.strategy == "single"
    assert strategy in reason(report, "strategy")


def test_hybrid_cuts_each_of_several_copies_over_a_group_of_ranks() -> None:
    plan, report = planned(cpu(), plan={"strategy": "hybrid", "ranks": 4, "shard_ranks": 2})
    assert (plan.shard_ranks, plan.shards) == (2, 2)
    assert "2 copies, each cut over 2 ranks" in reason(report, "strategy")


def test_hybrid_takes_the_ranks_of_one_machine_where_several_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    plan, _ = planned(gpus(4), plan=FIXED | {"strategy": "hybrid", "ranks": 8})
    assert plan.shards == 4


@pytest.mark.parametrize(
    ("ranks", "group", "way_out"), [(4, 3, "plan.shard_ranks to one of 2"), (4, 0, "one of 2"), (2, 0, "strategy=fsdp")]
)
def test_hybrid_without_several_groups_is_refused(ranks: int, group: int, way_out: str) -> None:
    with pytest.raises(UserError, match=way_out):
        planned(cpu(), plan={"strategy": "hybrid", "ranks": ranks, "shard_ranks": group})


def test_a_group_size_without_hybrid_is_refused() -> None:
    with pytest.raises(UserError, match=r"plan\.shard_ranks = 2 is for plan\.strategy=hybrid"):
        planned(cpu(), plan={"ranks": 2, "shard_ranks": 2})


def test_keeping_layers_gathered_is_counted() -> None:
    shards, kept = (
        next(
            phase
            for phase in planned(gpus(2), LARGE, plan=FIXED | {"strategy": strategy}, data={"context": 256})[1].phases
            if phase.name == "train step" and phase.place == "GPU"
        )
        for strategy in ("fsdp", "fsdp-grad")
    )
    part = {phase: next(part.bytes for part in phase.parts if part.name == "gathered layers") for phase in (shards, kept)}
    assert part[kept] > 2.5 * part[shards]  # 32 layers instead of 2, beside the head, which is gathered twice


def test_all_settings_that_contradict_each_other_are_listed() -> None:
    with pytest.raises(UserError) as refused:
        planned(
            gpus(2, bf16=False), model={"path": "tiny", "dtype": "bf16"}, plan={"strategy": "single", "ranks": 3}, data={"context": 512}
        )
    for part in ("data.context = 512: tiny reads at most 256", "plan.strategy = 'single'", "plan.ranks = 3", "model.dtype = 'bf16'"):
        assert part in str(refused.value)


def test_a_context_that_the_model_can_just_read_is_not_refused() -> None:
    assert planned(cpu(), data={"context": 256})[1].fits


def test_new_blocks_of_a_quantized_base_are_planned() -> None:
    sections = {"model": {"path": "8b"}, "export": {"writers": ["transformers"]}, "data": {"context": 1024}}
    _, report = planned(gpus(1, 24), LARGE, adapt={"method": "expand", "new_blocks": 1}, plan=FIXED, **sections)
    step = {part.name: part.bytes for phase in report.phases if phase.name == "train step" for part in phase.parts}
    assert step["trained weights"] == 4 * 218_112_000  # one block
    assert all(phase.fits for phase in report.phases if phase.place != "disk")


def test_a_report_is_plain_json_and_a_short_table() -> None:
    for report in (planned(cpu())[1], planned(gpus(1, 6), LARGE, data={"context": 256}, plan=FIXED | {"micro_batch": 2})[1]):
        values = json.loads(json.dumps(as_json(report)))
        assert values["fits"] == report.fits
        assert all(phase["bytes"] == sum(part["bytes"] for part in phase["parts"]) for phase in values["phases"])
        console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(render(report))
        text = console.export_text()
        assert "train step" in text
        assert ("It fits" in text) == report.fits
        assert len(text.splitlines()) < 40


def test_pinned_memory_takes_the_place_of_the_machines() -> None:
    pins = asked(plan={"device_gb": 8, "host_gb": 20}).plan
    pinned = with_pins(gpus(1), pins)
    assert (pinned.device_bytes, pinned.host_bytes) == (8 * GB, 20 * GB)
    assert with_pins(cpu(), asked(plan={"host_gb": 4}).plan).device_bytes == 4 * GB
    assert not planned(cpu(), plan={"host_gb": 0.3})[1].fits


def test_processes_share_the_hosts_memory() -> None:
    assert planned(gpus(4), plan=FIXED | {"ranks": 1, "host_gb": 4})[1].fits
    _, report = planned(gpus(4), plan=FIXED | {"ranks": 4, "strategy": "ddp", "host_gb": 4})
    assert not report.fits
    assert {problem.partition(":")[0] for problem in report.problems} == {"load", "train step", "save"}
    for problem in report.problems:  # one process at a time has all of what is saved, beside the others
        assert ("of 4.0 GB memory" if problem.startswith("save") else "of 1.0 GB memory") in problem
    (need,) = report.needs  # of the machine, not of one process
    assert need.place == "memory"
    for host, enough in ((need.bytes, True), (need.bytes - 10_000, False)):
        assert planned(gpus(4), plan=FIXED | {"ranks": 4, "strategy": "ddp", "host_gb": host / GB})[1].fits == enough


def test_only_one_process_holds_what_is_saved_whole() -> None:
    """Full finetuning of Llama-3-8B on eight GPUs: 96 GB of weights and moments in the host's memory once, not eight times."""
    full = {"adapt": {"method": "full"}, "model": {"path": "8b", "format": "none"}, "export": {"writers": ["transformers"]}}
    pins = FIXED | {"ranks": 8, "strategy": "fsdp", "checkpointing": "layers"}
    for host, enough in ((128, True), (96, False)):
        _, report = planned(gpus(8, 80), LARGE, plan=pins | {"host_gb": host}, **full)
        save = next(phase for phase in report.phases if phase.name == "save")
        named = {part.name: part.bytes for part in save.parts}
        assert named["trained weights and moments, whole"] == 3 * 4 * 8_030_261_248
        assert named["the other processes"] == 7 * named["Python and its libraries"]
        assert (save.fits, save.limit_bytes) == (enough, host * GB)


def test_a_disk_has_room_for_run_folder_and_cache_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    free = 10**10
    monkeypatch.setattr(disk.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(disk, "_free", lambda folder: free)
    _, report = planned(cpu(), LARGE, root=str(tmp_path), model={"path": "8b", "cache": True}, plan=FIXED)
    folder, download, cache = (phase for phase in report.phases if phase.place == "disk")
    assert folder.limit_bytes == free
    assert download.limit_bytes == free - folder.bytes < free
    assert cache.limit_bytes == 0
    assert download.bytes == 2 * 8_030_261_248
    assert [line.partition(":")[0] for line in report.warnings] == ["download", "quantized cache"]
    assert report.warnings[0] == (
        f"download: 16.1 GB of {download.limit_bytes / 1e9:.1f} GB free disk. Set HF_HUB_CACHE to a folder on another disk."
    )


def test_folders_on_two_disks_have_the_room_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", "/elsewhere/cache")
    monkeypatch.setattr(disk.constants, "HF_HUB_CACHE", "/elsewhere/hub")
    monkeypatch.setattr(disk, "_free", lambda folder: 10**11)
    monkeypatch.setattr(disk, "_existing", lambda folder: SimpleNamespace(stat=lambda: SimpleNamespace(st_dev=len(folder.parts[1]))))
    _, report = planned(cpu(64), LARGE, root=str(tmp_path), model={"path": "8b", "cache": True}, plan=FIXED)
    folder, download, cache = (phase for phase in report.phases if phase.place == "disk")
    assert (folder.limit_bytes, download.limit_bytes) == (10**11, 10**11)
    assert cache.limit_bytes == 10**11 - download.bytes


def test_what_is_on_the_machine_is_not_downloaded(tmp_path: Path) -> None:
    local = replace(TINY, asked=str(tmp_path))
    assert [phase.name for phase in planned(cpu(), local)[1].phases if phase.place == "disk"] == ["run folder", "quantized cache"]
    assert "from the hub" in reason(planned(cpu())[1], "start")
    assert "from the hub" not in reason(planned(cpu(), local)[1], "start")


def test_a_full_disk_is_no_reason_to_train_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_free", lambda folder: 1000)
    _, report = planned(cpu())
    assert not report.fits
    assert [problem.partition(":")[0] for problem in report.problems] == ["run folder"]
    assert report.problems[0].endswith("Set root to a folder on another disk, or lower train.keep.")
    assert report.changes == ()
    (need,) = report.needs
    monkeypatch.setattr(disk, "_free", lambda folder: need.bytes)
    assert planned(cpu())[1].fits
    assert enough_in_words(report) == f"As asked, training would fit with {gb_enough(need.bytes)} of free disk"


def test_a_change_that_leaves_a_full_disk_full_is_not_said_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"plan": FIXED | {"checkpointing": "none"}, "data": {"context": 1024}, "model": {"path": "8b"}}
    monkeypatch.setattr(disk, "_free", lambda folder: 10**12)
    _, report = planned(gpus(1, 12), LARGE, **sections)
    fitting = report.smallest_change
    assert fitting is not None
    monkeypatch.setattr(disk, "_free", lambda folder: 1000)
    _, report = planned(gpus(1, 12), LARGE, **sections)
    assert {need.place for need in report.needs} == {"GPU", "disk"}
    assert report.smallest_change is None
    same = next(change for change in report.changes if change.settings == fitting.settings)
    assert [need.place for need in same.needs] == ["disk"]
    elsewhere = planned(replace(gpus(1, 12), here=False), LARGE, **sections)[1]
    assert elsewhere.smallest_change is not None, "the disk is this machine's"
    assert elsewhere.smallest_change.settings == fitting.settings


def test_on_a_cpu_the_memory_of_plan_device_gb_is_shared_too() -> None:
    pins = FIXED | {"ranks": 2, "strategy": "ddp"}
    (need,) = planned(cpu(16), plan=pins | {"device_gb": 0.8})[1].needs
    assert planned(cpu(16), plan=pins | {"device_gb": need.bytes / GB})[1].fits
    assert not planned(cpu(16), plan=pins | {"device_gb": (need.bytes - 10_000) / GB})[1].fits


def test_a_refusal_says_what_would_be_enough_and_its_json_where() -> None:
    _, report = planned(gpus(1, 0.9), plan=FIXED | {"micro_batch": 8}, data={"context": 256})
    assert report.smallest_change is None
    with pytest.raises(UserError) as refused:
        refuse_unless_fits(report, anyway=False)
    said = str(refused.value)
    for part in (
        "this run does not fit:",
        "what else was planned:",
        "training would fit with",
        "Take a smaller model, or more of what is short; or",
    ):
        assert part in said
    values = json.loads(json.dumps(as_json(report)))
    assert [need["place"] for need in values["needs"]] == ["GPU"]
    assert values["changes"]
    for change in values["changes"]:
        assert set(change) == {"settings", "phase", "place", "bytes", "limit_bytes", "fits", "needs", "warnings"}
        assert (change["place"], change["fits"], change["needs"][0]["bytes"]) == ("GPU", False, change["bytes"])
    refuse_unless_fits(report, anyway=True)


def test_new_blocks_are_not_downloaded() -> None:
    sections = {"model": {"path": "8b"}, "export": {"writers": ["transformers"]}, "data": {"context": 256}}
    plain = planned(gpus(1, 40), LARGE, plan=FIXED, model={"path": "8b"}, data={"context": 256})[1]
    grown = planned(gpus(1, 40), LARGE, adapt={"method": "expand", "new_blocks": 4}, plan=FIXED, **sections)[1]
    assert grown.start is not None
    assert plain.start is not None
    assert grown.start.download == plain.start.download


def test_why_a_base_waits_in_host_memory_says_what_the_gpu_could_still_do() -> None:
    """Not that it cannot: recomputing more may fit, and is slower."""
    plan, report = planned(gpus(1, 12.5), LARGE, data={"context": 2048}, model={"path": "8b"})
    assert plan.offload_base
    assert re.search(r"takes .* of 12\.5 GB GPU; with more recomputation it may fit, in .* a step or more; pinned", reason(report, "base"))
    assert {one.fits for one in report.candidates if not one.measured} == {None}


def test_the_machine_is_described_within_its_limits() -> None:
    machine = this_machine()
    assert 0 < machine.host_bytes == host_bytes()
    assert machine.cores > 0
    assert machine.devices > 0
    assert machine.device == "cuda" or machine.device_bytes == machine.host_bytes


def test_a_container_limit_lowers_the_hosts_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machines, "_MEMORY_LIMITS", (str(limit),))
    whole = host_bytes()
    limit.write_text("1000000\n")
    assert host_bytes() == 1000000 < whole
    limit.write_text("max\n")
    assert host_bytes() == whole


def test_a_model_of_70_billion_weights_is_planned_without_its_memory() -> None:
    plan, report = planned(gpus(2, 48), HUGEST, data={"context": 1024}, plan=FIXED | {"strategy": "fsdp"})
    assert (plan.ranks, plan.strategy, plan.micro_batch) == (2, "fsdp", 1)
    assert report.fits
    weights = next(
        part.bytes for phase in report.phases for part in phase.parts if phase.name == "evaluate" and part.name == "quantized weights"
    )
    linears = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert weights == linears // 2


def test_the_longest_sample_of_prepared_data_counts_and_not_the_context() -> None:
    base = Pretrained("gemma", Path(), None, FAMILIES["gemma2"](**SIZES), False)
    whole, short = (decide(asked(plan={"micro_batch": 1}), base, cpu(), prepared)[1] for prepared in (None, Prepared(10, 16)))
    before, after = (next(phase for phase in report.phases if phase.name == "train step").bytes for report in (whole, short))
    assert after < before
