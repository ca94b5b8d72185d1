"""Machines by name, and how fast the cost model takes them to be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from burnish.config import Plan
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.plan import cost
from burnish.plan import machine as machines
from burnish.plan.cost import in_words, start_cost, step_cost
from burnish.plan.gpus import GPUS, like, parse_gpus
from burnish.plan.machine import Machine, imagined_machine, this_machine
from burnish.plan.phases import Measure
from burnish.toml import parse_config

NET = transformers.LlamaConfig(
    num_hidden_layers=4, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000
)
MEASURE = Measure(Pretrained("4 layers", Path(), None, NET, False))
MACHINE = Machine("cuda", 4, 24 * 10**9, 128 * 10**9, 16, True, "4090s", GPUS["4090"])


@pytest.mark.parametrize(
    ("text", "count", "name", "memory"),
    [
        ("2x4090", 2, "RTX 4090", GPUS["4090"].bytes),
        ("4xA5000", 4, "RTX A5000", GPUS["a5000"].bytes),
        ("8xa100-40", 8, "A100", GPUS["a100-40"].bytes),
        ("8 x A100-80GB", 8, "A100", GPUS["a100-80"].bytes),
        ("1x3060-12", 1, "RTX 3060", GPUS["3060-12"].bytes),
        ("3060", 1, "RTX 3060", GPUS["3060-12"].bytes),
        ("2×RTX 3090 Ti", 2, "RTX 3090 Ti", GPUS["3090ti"].bytes),
        ("1xT4", 1, "T4", GPUS["t4"].bytes),
        ("2x24GB", 2, "RTX 3090", 24 * 10**9),
        ("2x24GiB", 2, "RTX 3090", 24 * 2**30),
        ("1x7.5gb", 1, "RTX 3090", 7_500_000_000),
    ],
)
def test_gpus_are_read_as_people_write_them(text: str, count: int, name: str, memory: int) -> None:
    found = parse_gpus(text)
    assert (found[0], found[1].name, found[2]) == (count, name, memory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2x4099", r"no such GPU is known\. Did you mean 4090\? Its memory alone will do"),
        ("a100", "several kinds of it. Write a100-40 or a100-80"),
        ("0x4090", "no GPU at all is `--gpus none`"),
        ("1x4090,1x3090", "write how many of what.*like the smallest"),
        ("", "write how many of what"),
        ("2x0GB", "a GPU without memory holds nothing"),
    ],
)
def test_what_names_no_machine_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_gpus(text)


@pytest.mark.parametrize("key", GPUS)
def test_every_gpu_is_found_by_its_key_and_is_plausible(key: str) -> None:
    assert parse_gpus(f"3x{key}") == (3, GPUS[key], GPUS[key].bytes)
    gpu = GPUS[key]
    assert 5 < gpu.gib < 200
    assert gpu.pcie in cost.PCIE
    assert 0.02 < gpu.teraflops / gpu.gigabytes_per_second < 0.5  # FLOPs for a byte: 50 to 500 on all of them


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA GeForce RTX 4090", 23.5, "4090"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA RTX A5000", 23.7, "a5000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.4, "6000ada"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 NVL", 93.0, None),
        ("Tesla T4", 14.6, "t4"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-16"),
        ("NVIDIA GeForce RTX 3080", 9.8, "3080-10"),
    ],
)
def test_the_gpus_of_this_machine_are_known_by_what_cuda_calls_them(name: str, gib: float, key: str | None) -> None:
    assert like(name, round(gib * 2**30)) == (GPUS[key] if key else None)
    assert like("NVIDIA A100-PCIE-40GB", 40 * 2**30) == replace(GPUS["a100-40"], nvlink=0.0)


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080"])
def test_a_gpu_that_is_not_in_the_table_is_not_taken_for_another(name: str) -> None:
    assert like(name, 8 * 2**30) is None


def test_an_imagined_machine_has_what_was_asked_for_and_the_rest_of_this_one() -> None:
    machine = imagined_machine("2x4090", "64GB")
    assert (machine.device, machine.devices, machine.device_bytes) == ("cuda", 2, GPUS["4090"].bytes)
    assert (machine.host_bytes, machine.cores, machine.here, machine.bf16) == (64 * 10**9, this_machine().cores, False, True)
    assert imagined_machine("2x4090", None).host_bytes == this_machine().host_bytes
    assert imagined_machine("2x4090", None).host_of_here
    assert not machine.host_of_here
    assert not imagined_machine(None, None).host_of_here
    assert not imagined_machine("1xt4", None).bf16
    alone = imagined_machine("none", "8GiB")
    assert (alone.device, alone.device_bytes, alone.gpu) == ("cpu", 8 * 2**30, None)
    assert imagined_machine("2x24GiB", None).name == "2 × 25.8 GB, as fast as an RTX 3090"


@pytest.mark.parametrize("text", ["much", "0GB", "-4", "64TB"])
def test_host_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="write the host's memory as 64GB"):
        machines.parse_ram(text)


# --- the cost model


def a_plan(**changes: Any) -> Plan:
    values = {
        "device": "cuda",
        "ranks": 1,
        "strategy": "single",
        "dtype": "bf16",
        "micro_batch": 1,
        "accumulation": 8,
        "checkpointing": False,
    }
    return Plan(**(values | changes))


def step(machine: Machine = MACHINE, context: int = 1024, sections: dict[str, Any] | None = None, **plan: Any) -> cost.Step:
    config = parse_config({"name": "x", "model": {"path": "x"}, "data": {"context": context}} | (sections or {}))
    made = a_plan(**plan)
    return step_cost(config, made, machine, MEASURE.persistent(config.model, config.adapt, config.train, made), NET)


@pytest.fixture
def _kernels_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAUNCH", "LAUNCH_WITH_ADAPTERS"):
        monkeypatch.setattr(cost, name, 0.0)


def test_few_tokens_take_as_long_as_their_kernels_take_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four layers, three passes each, for each of eight micro-batches; and many tokens at a time take longer than that."""
    assert step(context=64).arithmetic == 8 * 3 * 4 * cost.LAUNCH_WITH_ADAPTERS
    assert step(context=64, sections={"adapt": {"method": "expand", "new_blocks": 1}}).arithmetic == 8 * 3 * 4 * cost.LAUNCH
    assert step(context=64, micro_batch=8, accumulation=1).arithmetic < 0.2 * step(context=64).arithmetic
    assert step(micro_batch=8, accumulation=1).arithmetic > 3 * 4 * cost.LAUNCH_WITH_ADAPTERS


@pytest.mark.usefixtures("_kernels_start_at_once")
def test_arithmetic_is_the_sum_that_is_stated() -> None:
    weights = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    adapters = 4 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) + 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    norms = 9 * 4096
    per_token = 4 * (weights + norms) + 6 * adapters + 6 * 32000 * 4096 + 7 * 4 * 1024 * 4096
    decoded = 8 * 2 * weights * (4.5 / 8 + 4) / 1008e9
    outputs = 4 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    found = step().arithmetic - decoded - 8 * 1024 * cost.BETWEEN * 2 * outputs / 1008e9
    assert found == pytest.approx(8 * 1024 * per_token / (165.2e12 * cost.UTILIZATION), rel=1e-3)


@pytest.mark.usefixtures("_kernels_start_at_once")
def test_recomputing_half_of_the_layers_costs_half_of_recomputing_all() -> None:
    none, half, every = step(), step(checkpointing=True, checkpoint_every=2), step(checkpointing=True)
    assert half.arithmetic - none.arithmetic == pytest.approx((every.arithmetic - none.arithmetic) / 2)
    assert every.arithmetic > 1.3 * none.arithmetic


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"micro_batch": 1}, {"micro_batch": 8}),
        ({"ranks": 2, "strategy": "ddp"}, {"ranks": 4, "strategy": "ddp"}),
        ({"dtype": "fp32"}, {"dtype": "bf16"}),
        ({"context": 1024}, {"context": 512}),
        ({"sections": {"train": {"rows_per_step": 16}}}, {}),
        ({"sections": {"model": {"path": "x", "format": "nf4"}}}, {"sections": {"model": {"path": "x", "format": "none"}}}),
        ({"machine": replace(MACHINE, gpu=GPUS["3090"])}, {"machine": MACHINE}),
    ],
)
@pytest.mark.usefixtures("_kernels_start_at_once")
def test_what_does_more_takes_longer(slower: dict[str, Any], faster: dict[str, Any]) -> None:
    assert step(**slower).seconds > step(**faster).seconds


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"ranks": 2, "strategy": "fsdp"}, {"ranks": 2, "strategy": "fsdp-grad"}),
        ({"ranks": 4, "strategy": "fsdp"}, {"ranks": 4, "strategy": "hybrid", "shard_ranks": 2}),
        ({"ranks": 2, "strategy": "fsdp"}, {"ranks": 2, "strategy": "ddp"}),
        ({"ranks": 2, "strategy": "fsdp"}, {"ranks": 2, "strategy": "fsdp", "micro_batch": 4}),
        ({"offload_base": True}, {}),
        ({"checkpointing": True, "offload_activations": True}, {"checkpointing": True}),
        ({"ranks": 2, "strategy": "fsdp"}, {"ranks": 2, "strategy": "fsdp", "machine": replace(MACHINE, gpu=GPUS["a100-40"])}),
    ],
)
def test_what_moves_more_takes_longer_to_move(more: dict[str, Any], less: dict[str, Any]) -> None:
    assert step(**more).transfers > step(**less).transfers


def test_a_step_takes_as_long_as_the_slower_of_arithmetic_and_transfers() -> None:
    found = cost.Step(3.0, 2.0, 0.5, 1000)
    assert (found.seconds, found.bound) == (3.5, "arithmetic")
    assert cost.Step(1.0, 2.0, 0.5, 1000).bound == "transfers"


def test_a_later_start_is_quicker_where_a_cache_is_kept_and_a_local_base_is_not_downloaded() -> None:
    def start(local: bool, plan: Plan | None = None, **model: Any) -> cost.Start:
        config = parse_config({"name": "x", "model": {"path": "x"} | model})
        made = plan or a_plan()
        return start_cost(config, made, MACHINE, MEASURE.persistent(config.model, config.adapt, config.train, made), local)

    assert start(True).download == 0 < start(False).download
    assert start(True).again < start(True).first
    assert start(True, format="none").again == start(True, format="none").first
    assert start(True, cache=False).again == start(True, cache=False).first
    on_cpu = {"plan": a_plan(device="cpu", dtype="fp32")}
    assert start(True, format="int4", **on_cpu).first > 3 * start(True, **on_cpu).first - 2 * start(True, format="none", **on_cpu).first


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0184, "0.018 s"), (9.96, "10 s"), (119, "119 s"), (200, "3.3 minutes"), (4e4, "11 hours"), (4e5, "4.6 days")]
)
def test_durations_are_said_to_two_digits(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_this_machine_knows_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory, major, minor, name = GPUS["3090"].bytes, 8, 6, "NVIDIA GeForce RTX 3090"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert (this_machine().gpu, this_machine().here, this_machine().devices) == (GPUS["3090"], True, 2)
