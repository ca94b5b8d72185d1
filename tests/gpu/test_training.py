"""Training on a GPU by the same code as on a CPU: resumed exactly, offloaded without a difference, within what was planned."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from burnish import pipeline
from burnish.config import Plan
from burnish.data.batches import Step, on_device
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.model.network import packed
from burnish.parallel.rows import local_rows
from burnish.parallel.world import World
from burnish.plan.machine import this_machine
from burnish.plan.phases import PIECES, Measure, needed
from burnish.plan.trace import worst_batch
from burnish.runs import open_run
from burnish.skeleton import Built
from burnish.toml import load_config, parse_config
from burnish.train import optimizer
from burnish.train.optimizer import OPTIMIZERS
from burnish.train.step import take_step
from tests.model.test_offload import WAYS
from tests.plan.test_trace import batch_of_lengths
from tests.ranks.jobs import Job, check_resumed, fp_equal, make_tokens, train_job
from tests.tiny import METHOD_SECTIONS, SIZES, a_plan, built_from, tiny_folder, train_a_little

CARD = World(0, 1, torch.device("cuda"), None)
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Large enough that a copy takes longer than a kernel's start: a race would show."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    tiny_folder(root / "model")
    tiny_folder(root / "wide" / "model", **WIDE, head_dim=64, vocab_size=2048, max_position_embeddings=2048)
    make_tokens(root / "tokens")
    (root / "wide" / "tokens").symlink_to(root / "tokens")
    return root


@pytest.mark.parametrize("method", METHOD_SECTIONS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_as_a_cpu_does(folder, method, dtype):
    """In fp32 to rounding, in 16 bits near it: every method, over two micro-batches a step."""
    model, adapt = METHOD_SECTIONS[method]
    job = Job(str(folder), run=f"cpu-{method}-{dtype}", dtype="fp32", model=model, adapt={"method": method} | adapt)
    here = train_job(job)
    there = train_job(replace(job, run=f"gpu-{method}-{dtype}", dtype=dtype, device="cuda"))
    close = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}[dtype]
    for one, other in zip(here["records"], there["records"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=close)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_that_breaks_off_and_continues_equals_the_uninterrupted_one_bit_for_bit(folder, name, dtype):
    """With dropout, whose masks come from the GPU's own random state."""
    job = Job(
        str(folder),
        run=f"{name}-{dtype}",
        device="cuda",
        dtype=dtype,
        adapt={"dropout": 0.1, "rank": 64},
        rows_per_step=2,
        train={"steps": 5, "checkpoint_every": 2, "optimizer": name, "lr": {"sgd": 0.05, "adadelta": 1.0}.get(name, 1e-2)},
    )
    check_resumed(job)


def swept() -> int:
    """Bytes that are allocated once what nobody refers to is gone."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def built_so(folder: Path, plan: dict[str, Any], adapt: dict[str, Any] | None = None, **model: Any) -> Built:
    built = built_from(folder, model, adapt, a_plan(device="cuda", dtype="bf16", **plan), CARD)
    train_a_little(built, size=0.01)
    return built


def results(built: Built, rounds: int = 6) -> dict[str, torch.Tensor]:
    """Losses and gradients of some micro-batches, one behind the other without a pause between them."""
    torch.manual_seed(5)
    built.model.train()
    batch = on_device(batch_of_lengths((400, 600, 30, 900)), CARD.device)
    found = {}
    with packed(built.model):
        for number in range(rounds):
            loss = built.model.loss_of(batch)  # pyright: ignore[reportCallIssue]
            loss.backward()
            found[f"loss {number}"] = loss.detach()
    return found | {name: parameter.grad for name, parameter in built.adapters.trainable().items()}  # pyright: ignore


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["nf4", "int4", "none"])
def test_what_waits_in_host_memory_changes_no_bit(folder, way, form):
    model = folder / "wide" / "model"
    expected, found = results(built_so(model, {}, format=form)), results(built_so(model, WAYS[way], format=form))
    for name, right in expected.items():
        assert torch.equal(found[name], right), name


def test_a_base_in_host_memory_takes_two_layers_of_the_gpu(folder):
    model = folder / "wide" / "model"

    def held(**plan: bool) -> int:
        before = swept()
        built = built_so(model, plan)
        held = swept() - before
        del built
        return held

    plain, moved = held(), held(offload_base=True)
    codes = 6 * (512 * 512 * 3 + 512 * 1536 * 3) * 0.5
    assert 0.5 * codes < plain - moved < codes * 1.2


def test_a_model_whose_base_waits_in_host_memory_answers_the_same(folder):
    model = folder / "wide" / "model"
    prompt = torch.arange(2, 40, device="cuda")[None]
    answers = []
    for plan in ({}, {"offload_base": True}):
        built = built_so(model, plan)
        built.model.eval()
        answers.append(built.model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=1))
    assert torch.equal(*answers)


# --- what was planned


SHAPES = {"vocab_size": 8192, "max_position_embeddings": 1024, "head_dim": 64} | WIDE


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", METHOD_SECTIONS)
def test_a_planned_step_is_an_upper_bound_of_a_real_one_and_within_a_tenth(folder, method, recomputed):
    """What is allocated at most: in blocks, whose rounding the allocator's part is for."""
    config = a_config(folder, method)
    plan = a_plan(device="cuda", dtype="bf16", checkpointing=recomputed, accumulation=2)
    measure = Measure(Pretrained("tiny", Path(), None, folder_config(), False))
    phases = needed(config, plan, this_machine(), measure)
    step = next(phase for phase in phases if phase.name == "train step")
    planned = step.bytes - PIECES - sum(part.bytes for part in step.parts if part.name in ("CUDA context", "cuBLAS workspaces"))
    torch.randn(8, 8, device="cuda", requires_grad=True).mm(torch.randn(8, 8, device="cuda")).sum().backward()  # its workspaces are there
    before = swept()
    held = two_steps(folder, method, plan) - before
    assert held <= planned <= 1.1 * held


def folder_config() -> Any:
    import transformers

    return transformers.LlamaConfig(**(SIZES | SHAPES))


def a_config(folder: Path, method: str) -> Any:
    model, adapt = METHOD_SECTIONS[method]
    sections = {"path": str(folder / "model"), "cache": False} | model
    return parse_config({"name": "x", "model": sections, "adapt": {"method": method} | adapt, "data": {"context": 1024}})


def two_steps(folder: Path, method: str, plan: Plan) -> int:
    """Bytes allocated at most."""
    model, adapt = METHOD_SECTIONS[method]
    config = a_config(folder, method)
    path = folder / "planned"
    if not path.exists():
        tiny_folder(path, **SHAPES)
    built = built_from(path, model, {"method": method, "rank": config.adapt.rank, **adapt}, plan, CARD)
    update = optimizer.build(built.adapters.trainable(), config.train)
    batch = on_device(worst_batch(1024, 1), CARD.device)
    step = Step((batch,) * plan.accumulation, len(batch.targets) * plan.accumulation, 1)
    torch.cuda.reset_peak_memory_stats()
    built.model.train()
    with packed(built.model):
        for _ in range(2):
            take_step(built, None, step, update, 1.0, CARD, str)
    return torch.cuda.max_memory_allocated()


# --- a whole run


@pytest.fixture
def whole(folder, tmp_path) -> Any:
    rows = [{"instruction": f"When does boat {number} leave?", "input": "", "output": f"at {number}"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.jsonl").write_text('{"question": "Boat 3 leaves when?", "answer": "at 3"}\n' * 4)
    (tmp_path / "run.toml").write_text(
        f"""name = "whole"
root = "{tmp_path}/runs"
[model]
path = "{folder}/model"
[data]
rows = ["rows.jsonl"]
questions = ["questions.jsonl"]
template = "chatml"
context = 128
[train]
steps = 3
rows_per_step = 2
log = ["stdout"]
[evaluate]
new_tokens = 4
resamples = 200
[export]
writers = ["peft", "transformers"]
dtype = "fp32"
"""
    )
    return lambda *changes: (config := load_config(tmp_path / "run.toml", changes), open_run(config.root, config.name))


def test_the_whole_path_runs_on_the_gpu_without_being_told(whole):
    config, run = whole("train.memory_snapshot=true", "train.profile=[1, 1, 1]")
    assert pipeline.run_all(config, run).steps_done == 3
    plan = pipeline.plan_of(run)
    assert (plan.device, plan.dtype) == ("cuda", "bf16" if this_machine().bf16 else "fp16")
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert 0 < metrics[-1]["memory_bytes"] < 1e9
    report = json.loads((run.stage("export") / "report.json").read_text())
    assert report["transformers"]["distance"]["mean"] < 0.1  # the run computes in 16 bits, the merged model in fp32
    assert (run.stage("train") / "memory" / "snapshot.pickle").stat().st_size > 1000
    (trace,) = (run.stage("train") / "profile").glob("*.json")
    assert any(event.get("cat") == "kernel" for event in json.loads(trace.read_text())["traceEvents"])


@pytest.fixture
def little_memory() -> Iterator[None]:
    """So little that a tiny model does not fit; other programs' use of the card does not matter."""
    swept()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_that_runs_out_is_answered_in_the_plans_words(whole, little_memory):
    config, run = whole()
    with pytest.raises(UserError, match=r"CUDA out of memory(.|\n)*planned(.|\n)*measured"):
        pipeline.run_all(config, run)


# --- NCCL


@pytest.fixture
def nccl(tmp_path) -> Iterator[World]:
    """A group of one: all calls are made, with nobody at the other end."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield World(0, 1, torch.device("cuda", 0), init_device_mesh("cuda", (1,)))
    dist.destroy_process_group()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("form", ["nf4", "int4", "none"])
@pytest.mark.parametrize("offloaded", [False, True], ids=["on the card", "base in host memory"])
def test_fsdp_over_nccl_gives_what_one_process_gives(folder, nccl, form, recomputed, offloaded):
    model, way = folder / "wide" / "model", {"checkpointing": recomputed, "offload_base": offloaded}
    expected = results(built_so(model, way, format=form), 2)
    plan = a_plan(device="cuda", dtype="bf16", strategy="fsdp", **way)
    built = built_from(model, {"format": form}, None, plan, nccl)
    # the same start as `train_a_little` gives, through the shards
    for name, parameter in built_so(model, way, format=form).adapters.trainable().items():
        local_rows(built.adapters.trainable()[name].data).copy_(parameter.data)
    built.adapters.switch.advance()
    found = results(built, 2)
    fp_equal({name: value.to_local() if hasattr(value, "to_local") else value for name, value in found.items()}, expected, 1e-3, 1e-5)
