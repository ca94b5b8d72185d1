"""Processes that run out of memory or are killed, for real: the command ends with 2 and the plan's words, and what was saved stays."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from burnish import pipeline
from burnish.config import canonical
from burnish.errors import UserError
from burnish.parallel.launch import RankDied, launch
from burnish.runs import open_run
from burnish.toml import load_config
from tests.ranks.test_processes import ended, folder, start, wait_for_step  # noqa: F401  (the fixture works where it is imported)

pytestmark = pytest.mark.ranks
TWO = ("plan.ranks=2", 'plan.strategy="ddp"')

LIMITED = """
    import resource
    import psutil, torch
    from burnish import cli
    from burnish.train import run as training

    steps, real = [], training.take_step

    def take(*given):
        steps.append(1)
        if len(steps) == 9:
            size = psutil.Process().memory_info().vms + (32 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            torch.ones(1 << 28)
        return real(*given)

    training.take_step = take
    cli.main(["train", "run.toml", "--name", "limited"])
"""
"""A step that allocates 1 GB where the system gives 32 MB: what follows, the answer too, has no more than that either."""


def test_a_process_that_the_system_gives_no_more_memory_says_so_and_what_was_saved_stays(folder):  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr
    assert "error: memory ran out in the phase `train step`: " in done.stderr
    assert "can't allocate memory" in done.stderr
    assert "planned: " in done.stderr
    assert "up to step 7 is saved" in done.stderr
    assert "Traceback" not in done.stderr
    code, out, err = ended(start(folder, "train", "run.toml", "--name", "limited"))
    assert code == 0, err
    assert "step 7/" not in out, "it began again instead of continuing"


def test_a_rank_that_is_killed_is_answered_with_its_planned_memory(folder):  # noqa: F811
    process = start(folder, "train", "run.toml", "--name", "killed-rank", *TWO)
    wait_for_step(process, 8)
    ranks = [child for child in psutil.Process(process.pid).children() if any("spawn_main" in word for word in child.cmdline())]
    ranks[-1].send_signal(signal.SIGKILL)
    code, _, err = ended(process)
    assert code == 2, err
    assert " of 2 was ended by SIGKILL, as the system does with a process where memory runs out" in err
    assert "planned: train step: " in err
    assert "up to step 7 is saved" in err
    assert "Traceback" not in err.partition("error: ")[2]


def one_runs_out(config: dict[str, Any], place: str) -> Any:
    """What a rank does, of which the second has no memory for its third step."""
    from burnish.train import run as training

    calls, real = [], training.take_step

    def take(*given: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            raise MemoryError
        return real(*given)

    training.take_step = take
    return pipeline._rank(config, place)


def test_of_two_ranks_the_one_that_ran_out_of_memory_is_told_and_not_the_one_that_lost_it(folder: Path) -> None:  # noqa: F811
    config = load_config(folder / "run.toml", ("name=one-runs-out", *TWO, "train.log=[none]"))
    run = open_run(config.root, config.name)
    pipeline.prepare(config, run)
    pipeline.plan(config, run)
    with pytest.raises(UserError, match=r"^memory ran out in the phase `train step` of process 1: MemoryError\n  planned: "):
        launch(one_runs_out, (canonical(config), str(run.folder)), 2)
    assert "MemoryError" in (run.folder / "failure-1.log").read_text()


def dies(number: int) -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), number)
    time.sleep(60)


def test_a_rank_that_a_signal_ended_is_named_with_the_signal() -> None:
    with pytest.raises(RankDied) as end:
        launch(dies, (signal.SIGBUS,), 2)
    assert (end.value.rank, end.value.ranks, end.value.number) == (0, 2, signal.SIGBUS)
