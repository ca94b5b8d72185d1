"""Whole processes from the command line: interrupted, killed, launched in two ways. What is saved stays, and the same command continues."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_folder

pytestmark = pytest.mark.ranks
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("processes")
    tiny_folder(root / "model")
    rows = [{"instruction": f"When does boat {number} leave?", "input": "", "output": f"at {number}"} for number in range(30)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run.toml").write_text(
        f"""name = "straight"
root = "{root}/runs"
[model]
path = "model"
[data]
rows = ["rows.jsonl"]
template = "chatml"
context = 128
[adapt]
dropout = 0.1
[train]
steps = {STEPS}
rows_per_step = 2
checkpoint_every = 7
log = ["stdout"]
"""
    )
    return root


def start(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *launcher, "-m", "burnish.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def adapter(folder: Path, name: str) -> bytes:
    return (folder / "runs" / name / "3-train" / "adapter" / "adapter_model.safetensors").read_bytes()


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read() if process.stderr else ''}")


@pytest.fixture(scope="module")
def straight(folder) -> bytes:
    code, _, err = ended(start(folder, "train", "run.toml"))
    assert code == 0, err
    return adapter(folder, "straight")


def test_a_killed_process_loses_nothing_that_was_saved_and_continues_bit_for_bit(folder, straight):
    killed = start(folder, "train", "run.toml", "--name", "killed")
    wait_for_step(killed, 10)
    killed.send_signal(signal.SIGKILL)
    assert ended(killed)[0] == -signal.SIGKILL
    saved = {path.name for path in (folder / "runs" / "killed" / "3-train" / "checkpoints").glob("step-*")}
    assert "step-000007" in saved
    code, out, err = ended(start(folder, "train", "run.toml", "--name", "killed"))
    assert code == 0, err
    assert "step 1/" not in out, "it began again instead of continuing"
    assert adapter(folder, "killed") == straight
    steps = [json.loads(line)["step"] for line in (folder / "runs" / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), "a step that was done twice stands twice in the metrics, or one is lost"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_says_so_and_continues(folder, straight, number):
    name = f"interrupted-{number.name}"
    process = start(folder, "train", "run.toml", "--name", name)
    wait_for_step(process, 4)
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == 130, err
    assert "The same command continues" in err
    assert "Traceback" not in err
    assert ended(start(folder, "train", "run.toml", "--name", name))[0] == 0
    assert adapter(folder, name) == straight


def test_two_launched_ranks_that_are_interrupted_save_together_and_continue(folder):
    whole_run = start(folder, "train", "run.toml", "--name", "two", "plan.ranks=2", 'plan.strategy="fsdp"')
    assert ended(whole_run)[0] == 0
    process = start(folder, "train", "run.toml", "--name", "two-stopped", "plan.ranks=2", 'plan.strategy="fsdp"')
    wait_for_step(process, 4)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130, err
    assert ended(start(folder, "train", "run.toml", "--name", "two-stopped", "plan.ranks=2", 'plan.strategy="fsdp"'))[0] == 0
    assert adapter(folder, "two-stopped") == adapter(folder, "two")


def test_torchrun_gives_the_bytes_that_burnishs_own_launcher_gives(folder):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code, _, err = ended(start(folder, "train", "run.toml", "--name", "torchrun", 'plan.strategy="ddp"', launcher=torchrun))
    assert code == 0, err
    assert ended(start(folder, "train", "run.toml", "--name", "launched", 'plan.strategy="ddp"', "plan.ranks=2"))[0] == 0
    assert adapter(folder, "torchrun") == adapter(folder, "launched")


def test_a_mistake_of_a_rank_is_told_once_without_a_traceback(folder):
    code, _, err = ended(start(folder, "train", "run.toml", "--name", "wrong", "plan.ranks=2", 'adapt.targets=["q_porj"]'))
    assert code == 2, err
    assert "Did you mean q_proj?" in err
    assert "Traceback" not in err


def test_a_training_that_stands_there_with_other_settings_is_never_overwritten(folder, straight):
    code, _, err = ended(start(folder, "train", "run.toml", "train.lr=1e-3"))
    assert code == 2
    assert "train.lr: 0.0002 → 0.001" in err
    assert "--redo train" in err
    assert adapter(folder, "straight") == straight
