"""Memory that ran out and ranks that died, answered in the plan's words: what was planned, what was measured, what needs less."""

import json
import logging
import os
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from burnish.config import Plan, RunConfig
from burnish.errors import UserError
from burnish.parallel.failures import let_the_cause_be_seen, lost_the_others
from burnish.parallel.launch import RankDied
from burnish.parallel.world import World
from burnish.plan.machine import host_bytes
from burnish.plan.report import Report
from burnish.runs import Run, read_json, write_json, write_whole
from burnish.train.checkpoint import newest
from burnish.train.progress import memory_bytes
from burnish.words import counted, gb, gb_of

log = logging.getLogger("burnish")
SHOWN = 4
"""Changes that are proposed."""
LESS = 0.9
"""Changes are looked for that need so much of what was planned: the plan itself has just failed."""

_GPU = re.compile(r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED")
_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|unable to mmap|std::bad_alloc|cudaErrorMemoryAllocation|cudaHostAlloc")

_DRIVER = re.compile(r"CUDA driver error|device not ready")
SEGMENTS = (
    "If it is there again, try PYTORCH_ALLOC_CONF=expandable_segments:False: some drivers (WSL2, Jetson, virtual GPUs) cannot give memory "
    "in segments that grow. `burnish doctor` shows the driver."
)

RUNNING = "running.json"
"""In the run's folder while a phase is under way: one that is found there was never ended."""

SIGNALS: dict[int, str] = {
    signal.SIGKILL: "as the system does with a process where memory runs out (dmesg says so)",
    signal.SIGBUS: "as happens where /dev/shm is too small: start the container with --shm-size=8g",
    signal.SIGABRT: "as torch and NCCL do when they give up; what stands above says why",
    signal.SIGSEGV: "which is a fault in a driver or a compiled library: `burnish doctor` shows their versions",
    signal.SIGTERM: "as somebody asked it to",
}
"""Why a process that said nothing may have ended."""


@dataclass(frozen=True)
class Attempt:
    """What is being tried, by whom; and how its plan is made, for what another plan would need."""

    config: RunConfig
    run: Run
    here: World
    decided_for: Callable[[RunConfig], tuple[Plan, Report]]


def place_of(problem: BaseException) -> str | None:
    """Whose memory ran out: `GPU` or `memory` (the host's), as phases of a plan call them. None where the error is another."""
    text = str(problem)
    if isinstance(problem, MemoryError):
        return "memory"
    if not isinstance(problem, (RuntimeError, OSError)):
        return None
    if isinstance(problem, torch.OutOfMemoryError) or _GPU.search(text):
        return "GPU"
    return "memory" if _HOST.search(text) else None


@contextmanager
def answered(attempt: Attempt, phase: str) -> Iterator[None]:
    """Turns memory that runs out inside the block, and a connection that breaks there, into a `UserError`.

    `phase` is one of the plan's, or `data`. The error itself is kept in `failure.log` of the run's folder. Nothing else is caught.
    A block that the last process never left, because it was killed, is told of first.
    """
    marks = attempt.here.is_main and phase != "data"
    if marks:
        _tell_of_the_last(attempt.run)
        write_json(attempt.run.folder / RUNNING, {"phase": phase, "process": os.getpid()})
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        place = place_of(problem)
        lost = place is None and attempt.here.size > 1 and lost_the_others(problem)
        if place is None and not lost:
            if _DRIVER.search(str(problem)):
                raise UserError(f"{phase}: {str(problem).splitlines()[0]}\n  {SEGMENTS}{_kept(attempt, problem)}") from None
            raise
        measured = memory_bytes(attempt.here.device if place == "GPU" else torch.device("cpu"))
        kept = _kept(attempt, problem)
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        if lost:
            let_the_cause_be_seen()
            text = _of_lost(attempt, phase, first)
        else:
            text = _of_memory(attempt, phase, place or "memory", first, measured)
        raise UserError(f"{text}{kept}") from None
    finally:
        if marks:
            (attempt.run.folder / RUNNING).unlink(missing_ok=True)


def _tell_of_the_last(run: Run) -> None:
    """Of a process that was killed in a phase, and so could say nothing itself."""
    path = run.folder / RUNNING
    if not path.exists():
        return
    left = read_json(path)
    if psutil.pid_exists(left["process"]):
        return
    planned = _planned(run, left["phase"], "memory")
    said = f" planned: {gb_of(planned['bytes'], planned['limit_bytes'])} memory." if planned else ""
    peak = _peak_of_steps(run)
    log.warning(
        f"the last start was ended from outside in the phase `{left['phase']}`, as the system does with a process where memory runs out "
        f"(dmesg says so).{said}{f' measured: {peak}' if peak else ''}"
    )


def died(attempt: Attempt, end: RankDied) -> UserError:
    """The answer to a rank that ended without a word."""
    (attempt.run.folder / RUNNING).unlink(missing_ok=True)
    why = SIGNALS.get(end.number, "without a word")
    name = signal.Signals(end.number).name if end.number in set(signal.Signals) else f"signal {end.number}"
    lines = [f"process {end.rank} of {end.ranks} was ended by {name}, {why}."]
    report = _report(attempt.run)
    for phase in report["phases"] if report else ():
        if phase["place"] == "memory" and phase["required"] and phase["name"] != "save":  # that one is counted for all processes
            of = f"{gb(phase['bytes'])} in each of {counted(end.ranks, 'process', 'processes')}"
            lines.append(f"planned: {phase['name']}: {of}; this machine has {gb(host_bytes())}, so {gb(phase['limit_bytes'])} for each.")
    if (peak := _peak_of_steps(attempt.run)) is not None:
        lines.append(f"measured: {peak}")
    if end.number == signal.SIGKILL:
        lines += _needs_less(attempt, "train step", "memory")
        lines.append("Fewer processes need less too (plan.ranks), and so do other programs that are ended.")
    return UserError("\n  ".join([*lines, *_continues(attempt.run)]))


# --- the parts of an answer


def _of_memory(attempt: Attempt, phase: str, place: str, first: str, measured: int) -> str:
    whose = "the GPU's memory" if place == "GPU" else "memory"
    rank = f" of process {attempt.here.rank}" if attempt.here.size > 1 else ""
    lines = [f"{whose} ran out in the phase `{phase}`{rank}: {first}"]
    planned = _planned(attempt.run, phase, place)
    if planned is not None:
        parts = sorted(planned["parts"], key=lambda part: -part["bytes"])[:3]
        most = ", ".join(f"{part['name']} {gb(part['bytes'])}" for part in parts if part["bytes"])
        lines.append(f"planned: {gb_of(planned['bytes'], planned['limit_bytes'])}; most of it {most}.")
    asked = _asked_for(first)
    lines.append(f"measured: at most {gb(measured)} until then" + (f", and {gb(asked)} more were asked for." if asked else "."))
    if planned is not None and measured + asked > planned["bytes"]:
        lines.append("That is more than was planned: the plan's estimate is too low here. plan.device_gb and plan.host_gb plan for less.")
    elif planned is not None and place == "GPU":
        lines.append(
            "That is less than was planned: other programs hold some of it (nvidia-smi lists them), or it is in pieces. "
            "plan.device_gb=… plans for what is left."
        )
    elif planned is not None:
        lines.append("That is less than was planned: other programs hold some of it, or a limit does (ulimit -v, a container's).")
    lines += [planned["way_out"]] if planned and planned["way_out"] else _needs_less(attempt, phase, place)
    return "\n  ".join([*lines, *_continues(attempt.run)])


def _asked_for(text: str) -> int:
    """Bytes of the allocation that failed, as torch's messages have it; 0 where they do not."""
    found = re.search(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)", text, re.IGNORECASE)
    return (
        round(float(found.group(1)) * {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}[found.group(2).lower()]) if found else 0
    )


def _of_lost(attempt: Attempt, phase: str, first: str) -> str:
    here = attempt.here
    hints = (
        "NCCL_DEBUG=INFO says what NCCL does, NCCL_P2P_DISABLE=1 helps GPUs that cannot read each other's memory (3090, 4090), "
        "and `burnish doctor` shows a /dev/shm that is too small."
        if here.device.type == "cuda"
        else "A process that was killed took more memory than there was, most often."
    )
    lines = [f"process {here.rank} of {here.size} lost the others in the phase `{phase}`: {first}"]
    lines.append("Another process ended or hangs: its own message, above or in failure*.log of the run's folder, is the cause.")
    return "\n  ".join([*lines, hints, *_continues(attempt.run)])


def _needs_less(attempt: Attempt, phase: str, place: str) -> list[str]:
    """What would need less, by the plan: the cheapest first. Where not even that can be computed, what always does."""
    found: list[str] = []
    with suppress(Exception):  # memory has just run out, and this takes some
        planned = _planned(attempt.run, phase, place)
        plan = Plan(**read_json(attempt.run.stage("plan") / "plan.json"))
        if planned is not None:
            changes = attempt.decided_for(_planned_for_less(attempt.config, plan, place, planned["bytes"]))[1].changes
            fitting = [change for change in changes if change.fits] or changes
            found = [f"  {change.settings}: {gb(change.bytes)} {change.tight.place}" for change in fitting[:SHOWN]]
    if found:
        return ["what needs less, by the plan:", *found]
    return ["What needs less: plan.micro_batch=1, plan.checkpointing=layers, a lower data.context. `burnish plan` counts them."]


def _planned_for_less(config: RunConfig, plan: Plan, place: str, planned_bytes: int) -> RunConfig:
    """The same run as it was planned, pinned, on a machine that has too little for it: then the plan says what would fit."""
    room = LESS * planned_bytes / 1e9
    pins = replace(
        config.plan,
        ranks=plan.ranks,
        strategy=plan.strategy,
        shard_ranks=plan.shard_ranks,
        micro_batch=plan.micro_batch,
        checkpointing="layers" if plan.checkpointing else "none",
        checkpoint_every=plan.checkpoint_every,
        **({"device_gb": room} if place == "GPU" else {"host_gb": room * plan.ranks}),
    )
    return replace(config, plan=pins)


def _continues(run: Run) -> list[str]:
    path = newest(run.stage("train") / "checkpoints")
    if path is None or not int(path.name.rpartition("-")[2]):
        return []
    step = int(path.name.rpartition("-")[2])
    return [
        f"What was trained up to step {step} is saved: the same command continues, with other settings of [plan] too. "
        "Other settings of [data], [model] and [adapt] begin another training (--name NAME)."
    ]


def _report(run: Run) -> dict[str, Any] | None:
    path = run.stage("plan") / "report.json"
    return read_json(path) if path.exists() else None


def _planned(run: Run, phase: str, place: str) -> dict[str, Any] | None:
    """The plan's entry of a phase in a place."""
    phases = (_report(run) or {"phases": []})["phases"]
    return next((entry for entry in phases if (entry["name"], entry["place"]) == (phase, place)), None)


def _peak_of_steps(run: Run) -> str | None:
    """The most memory that the steps before told of."""
    records: list[dict[str, Any]] = []
    with suppress(OSError, json.JSONDecodeError):  # the last line may be half there
        records += [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    if not records:
        return None
    most = max(record["memory_bytes"] for record in records)
    return f"at most {gb(most)} in process 0, up to step {records[-1]['step']}."


def _kept(attempt: Attempt, problem: Exception) -> str:
    """Writes the traceback into the run's folder; returns where it lies, as the end of a message."""
    rank = f"-{attempt.here.rank}" if attempt.here.size > 1 else ""
    path = attempt.run.folder / f"failure{rank}.log"
    with suppress(Exception):
        attempt.run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, f"process {os.getpid()}\n{''.join(traceback.format_exception(problem))}")
        return f"\n  The whole error is in {path}."
    return ""
