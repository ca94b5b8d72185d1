"""Memory that runs out, in each phase and place, is answered with what was planned, what was measured and what needs less."""

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import cli, pipeline
from burnish.config import Plan, RunConfig, canonical
from burnish.errors import UserError
from burnish.parallel import failures
from burnish.parallel.failures import lost_the_others
from burnish.parallel.launch import RankDied
from burnish.parallel.world import World
from burnish.plan import failure
from burnish.plan.decide import decide
from burnish.plan.failure import Attempt, answered, died, place_of
from burnish.plan.machine import Machine, with_pins
from burnish.plan.report import Report, as_json
from burnish.runs import Run, open_run, write_json
from burnish.toml import load_config
from burnish.train import run as training
from tests.plan.test_decide import TINY, _measured_once, asked, gpus  # noqa: F401  (the fixture works where it is imported)
from tests.tiny import tiny_folder

GB = 10**9
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB")
HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
)


@pytest.mark.parametrize(
    ("problem", "place"),
    [
        (CUDA, "GPU"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"), "GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU"),
        (HOST, "memory"),
        (MemoryError(), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("CUDA out of memory"), None),
        (OSError(28, "No space left on device"), None),
    ],
)
def test_whose_memory_ran_out_is_told_by_the_error(problem, place):
    assert place_of(problem) == place


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 55)
    assert place_of(refused.value) == "memory"


@pytest.mark.parametrize(
    ("problem", "lost"),
    [
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"), True),
        (torch.distributed.DistStoreError("wait timeout after 300000ms"), True),
        (RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4242"), True),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("the loss is not finite"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_an_echo_of_another_ranks_end_is_known(problem, lost):
    assert lost_the_others(problem) == lost


# --- a run


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("failure")
    tiny_folder(root / "model")
    rows = [{"question": f"When does boat {at} leave?", "answer": f"at {at}"} for at in range(12)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run.toml").write_text(
        f'name = "one"\nroot = "{root}/runs"\n[model]\npath = "model"\n[data]\nrows = ["rows.jsonl"]\ntemplate = "chatml"\ncontext = 128\n'
        '[plan]\ncheckpointing = "none"\n[train]\nsteps = 4\nrows_per_step = 2\ncheckpoint_every = 2\nlog = ["none"]\n'
    )
    return root


def opened(project: Path, *overrides: str) -> tuple[RunConfig, Run]:
    config = load_config(project / "run.toml", overrides)
    return config, open_run(config.root, config.name)


def fails_at(step: int, problem: Exception) -> Callable[..., Any]:
    """In the place of `take_step`: the error of so many steps later."""
    calls, real = [], training.take_step

    def take(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            raise problem
        return real(*arguments)

    return take


def test_a_driver_that_cannot_grow_segments_is_answered_with_the_variable(project):
    config, run = opened(project, 'name="driver"')
    run.folder.mkdir(parents=True)
    attempt = Attempt(config, run, World(0, 1, torch.device("cpu"), None), lambda config: pytest.fail("nothing is planned"))
    with pytest.raises(UserError) as refused, answered(attempt, "load"):
        raise RuntimeError("CUDA driver error: unknown error\nmore")
    assert re.match(r"load: CUDA driver error: unknown error\n.*PYTORCH_ALLOC_CONF=expandable_segments:False", str(refused.value))


def test_a_step_that_runs_out_of_memory_ends_with_the_plans_words_and_the_same_command_continues(project, monkeypatch, capsys):
    monkeypatch.setattr(training, "take_step", fails_at(4, HOST))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(project / "run.toml")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    report = json.loads((project / "runs/one/2-plan/report.json").read_text())
    phase = next(entry for entry in report["phases"] if entry["name"] == "train step")
    assert "error: memory ran out in the phase `train step`: [enforce fail at alloc_cpu.cpp:127]" in said
    assert f"planned: {phase['bytes'] / 1e9:.1f} GB of {phase['limit_bytes'] / 1e9:.1f} GB; most of it " in said
    assert "measured: at most " in said
    assert "up to step 2 is saved: the same command continues" in said
    assert "Traceback" not in said
    kept = project / "runs/one/failure.log"
    assert f"The whole error is in {kept}." in said
    assert "in take\n" in kept.read_text()
    monkeypatch.undo()
    assert pipeline.trained(*opened(project)).steps_done == 4
    assert [json.loads(line)["step"] for line in (project / "runs/one/metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_other_errors_pass_as_they_are(project, monkeypatch):
    monkeypatch.setattr(training, "take_step", fails_at(1, ValueError("a fault of ours")))
    with pytest.raises(ValueError, match="a fault of ours"):
        pipeline.trained(*opened(project, "name=two"))
    monkeypatch.setattr(training, "take_step", fails_at(1, UserError("look at these rows")))
    with pytest.raises(UserError, match=r"^look at these rows$"):
        pipeline.trained(*opened(project, "name=two"))


def test_loading_that_runs_out_of_memory_names_its_own_phase(project, monkeypatch):
    def fails(*_: Any) -> str:
        raise MemoryError

    monkeypatch.setattr(pipeline, "fill", fails)
    with pytest.raises(UserError, match=r"^memory ran out in the phase `load`: MemoryError\n  planned: "):
        pipeline.trained(*opened(project, "name=three"))


# --- machines that are not here


def planned_run(folder: Path, config: RunConfig, machine: Machine) -> Attempt:
    """A run with a plan for another machine, as the pipeline would have written it."""

    def decided_for(changed: RunConfig) -> tuple[Plan, Report]:
        return decide(changed, TINY, with_pins(machine, changed.plan))

    run = Run(folder)
    plan, report = decided_for(config)
    run.stage("plan").mkdir(parents=True)
    write_json(run.stage("plan") / "plan.json", canonical(plan))
    write_json(run.stage("plan") / "report.json", as_json(report))
    return Attempt(config, run, World(0, plan.ranks, torch.device("cpu"), None), decided_for)


def refusal(attempt: Attempt, phase: str, problem: Exception) -> str:
    with pytest.raises(UserError) as refused, answered(attempt, phase):
        raise problem
    return str(refused.value)


@pytest.fixture
def on_gpus(tmp_path) -> Attempt:
    return planned_run(tmp_path / "run", asked(plan={"checkpointing": "none", "micro_batch": 4}), gpus(2))


def test_a_gpu_that_runs_out_is_told_what_would_need_less(on_gpus, monkeypatch):
    monkeypatch.setattr(failure, "memory_bytes", lambda device: 1_000_000)
    text = refusal(on_gpus, "train step", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 MiB. GPU 0 has …"))
    assert text.startswith("the GPU's memory ran out in the phase `train step` of process 0: CUDA out of memory. Tried to allocate 4")
    assert "measured: at most 1 MB until then, and 4 MB more were asked for." in text
    assert "less than was planned: other programs hold some of it (nvidia-smi lists them)" in text
    lines = text.partition("what needs less, by the plan:\n")[2].splitlines()
    assert lines[0].strip().startswith("plan.micro_batch=1: ")
    assert (on_gpus.run.folder / "failure-0.log").exists()


def test_more_than_was_planned_is_said_to_be_the_plans_fault(on_gpus, monkeypatch):
    monkeypatch.setattr(failure, "memory_bytes", lambda device: 900 * GB)
    text = refusal(on_gpus, "train step", CUDA)
    assert "measured: at most 900.0 GB until then, and 2.1 GB more were asked for.\n  That is more than was planned" in text


@pytest.mark.parametrize(
    ("text", "count"),
    [(str(CUDA), 2 << 30), (str(HOST), 4), ("Tried to allocate 20.50 MiB (GPU 0)", 41 << 19), ("no numbers", 0)],
)
def test_what_was_asked_for_is_read_from_torchs_words(text, count):
    assert failure._asked_for(text) == count


def test_an_evaluation_that_runs_out_is_told_the_plans_own_way_out(on_gpus):
    assert "a lower evaluate.batch needs less" in refusal(on_gpus, "evaluate", CUDA)


def test_where_no_plan_can_be_made_any_more_what_always_helps_is_told(on_gpus):
    def nothing(config: RunConfig) -> Any:
        raise MemoryError

    text = refusal(replace(on_gpus, decided_for=nothing), "train step", CUDA)
    assert "What needs less: plan.micro_batch=1, plan.checkpointing=layers" in text


def test_before_there_is_a_plan_the_answer_has_none(tmp_path):
    config = asked()
    alone = World(0, 1, torch.device("cpu"), None)
    text = refusal(Attempt(config, Run(tmp_path / "new"), alone, pipeline.decided_for), "data", MemoryError())
    assert text.startswith("memory ran out in the phase `data`: MemoryError\n  measured: ")
    assert "planned" not in text


def test_a_rank_that_lost_the_others_points_at_the_cause_and_waits_for_it_to_be_seen(on_gpus, monkeypatch):
    waited = []
    monkeypatch.setattr(failures.time, "sleep", waited.append)
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:4242")
    text = refusal(on_gpus, "train step", broken)
    assert waited == [failures.GRACE_SECONDS]
    assert text.startswith("process 0 of 2 lost the others in the phase `train step`: [gloo")
    assert "its own message, above or in failure*.log" in text
    with (
        pytest.raises(RuntimeError, match="Connection closed"),
        answered(replace(on_gpus, here=World(0, 1, torch.device("cpu"), None)), "load"),
    ):
        raise broken  # alone, it is no rank's


@pytest.mark.parametrize(
    ("number", "why"), [(9, "SIGKILL, as the system does"), (7, "SIGBUS, as happens where /dev/shm is too small"), (63, "signal")]
)
def test_a_rank_that_died_is_answered_with_its_planned_memory_and_the_machines(on_gpus, number, why):
    (on_gpus.run.folder / "metrics.jsonl").write_text('{"step": 7, "memory_bytes": 3000000000}\n{"step": 8, "memory_bytes": 2000000000}\n')
    text = str(died(on_gpus, RankDied(1, 2, number)))
    assert f"process 1 of 2 was ended by {why}" in text
    assert "planned: train step: " in text
    assert " in each of 2 processes; this machine has " in text
    assert "measured: at most 3.0 GB in process 0, up to step 8." in text
    assert ("plan.ranks" in text) == (number == signal.SIGKILL)


def test_a_start_that_was_killed_is_told_of_by_the_next(on_gpus, caplog):
    attempt, run = on_gpus, on_gpus.run
    (run.folder / "metrics.jsonl").write_text('{"step": 8, "memory_bytes": 2000000000}\n')
    write_json(run.folder / failure.RUNNING, {"phase": "train step", "process": os.getpid()})
    with answered(attempt, "train step"):
        assert caplog.messages == [], "that process is still there"
    write_json(run.folder / failure.RUNNING, {"phase": "train step", "process": 2**22 + 1})  # more than Linux gives
    with answered(attempt, "load"):
        (line,) = caplog.messages
        assert line.startswith("the last start was ended from outside in the phase `train step`, as the system does")
        assert " planned: " in line
        assert "measured: at most 2.0 GB in process 0, up to step 8." in line
        assert json.loads((run.folder / failure.RUNNING).read_text())["phase"] == "load"
    assert not (run.folder / failure.RUNNING).exists()
    with answered(attempt, "load"):
        assert len(caplog.messages) == 1
