"""A closer look at some of a training: where its time goes (a trace), and what its GPU memory holds. Neither changes a result."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from burnish.config import TrainConfig
from burnish.errors import UserError
from burnish.parallel.private import _dump_snapshot, _record_memory_history
from burnish.parallel.world import World
from burnish.runs import Run, write_whole
from burnish.words import counted

log = logging.getLogger("burnish")
ALLOCATIONS = 1_000_000
"""Newest allocations of a memory snapshot: some hundred bytes of host memory each."""


@contextmanager
def watched(config: TrainConfig, run: Run, world: World, steps: int) -> Iterator[Callable[[], None]]:
    """What is to be called after each of the `steps` that follow. The main rank watches itself; the others do nothing."""
    with ExitStack() as stack:
        step: Callable[[], None] = lambda: None  # noqa: E731
        traces = run.stage("train") / "profile"
        if config.profile is not None and not list(traces.glob("*.json")):  # a run that is continued may have its trace already
            check_profile(config.profile, steps)
            if world.is_main:
                step = stack.enter_context(_profiled(config.profile, traces, world.device.type))
        if config.memory_snapshot and world.is_main:
            stack.enter_context(_snapshot(run.stage("train") / "memory", world.device.type))
        yield step


def check_profile(asked: tuple[int, int, int], steps: int) -> None:
    """Raises a `UserError` where the run ends before all steps that were asked for are recorded."""
    if sum(asked) > steps:
        wait, warmup, active = asked
        raise UserError(
            f"train.profile = [{wait}, {warmup}, {active}] waits {wait}, warms up {warmup}, records {counted(active, 'step')}: "
            f"{sum(asked)} in all; this run has {steps} left. Ask for fewer, or leave train.profile out."
        )


@contextmanager
def _profiled(asked: tuple[int, int, int], folder: Path, device: str) -> Iterator[Callable[[], None]]:
    """torch's profiler. The trace is written when the last of its steps is recorded; chrome://tracing and Perfetto read it."""
    wait, warmup, active = asked
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]

    def written(profiler: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = folder / f"steps-{wait + warmup + 1}-to-{sum(asked)}.json"
        write_whole(name, lambda path: profiler.export_chrome_trace(str(path)))
        log.info("a trace of %d steps lies in %s", active, name)

    plan = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=written, record_shapes=True, acc_events=True) as profiler:
        yield profiler.step


@contextmanager
def _snapshot(folder: Path, device: str) -> Iterator[None]:
    """A history of allocations, written at the end however the training ends: then most of all where memory ran out."""
    if device != "cuda":
        log.warning("train.memory_snapshot is not taken: torch keeps a history of GPU memory alone, and this run is on a CPU")
        yield
        return
    _record_memory_history(max_entries=ALLOCATIONS)
    try:
        yield
    finally:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "snapshot.pickle", lambda path: _dump_snapshot(str(path)))
        _record_memory_history(enabled=None)
        log.info("what GPU memory held lies in %s: drag it onto https://pytorch.org/memory_viz", folder / "snapshot.pickle")
