"""Where progress is shown. metrics.jsonl is always written; each row of `LOGGERS` is one more place."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from burnish.runs import Run, write_whole

Log = Callable[[dict[str, Any]], None]
"""Takes one step's record: step, steps, epoch, loss, lr, gradient_norm, tokens_per_s, supervised_per_s, memory_bytes, seconds."""


@contextmanager
def _rich(run: Run, steps: int, done: int) -> Iterator[Log]:
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("train", total=steps, completed=done, note="")
        yield lambda record: bar.update(task, completed=record["step"], note=_line(record))


@contextmanager
def _stdout(run: Run, steps: int, done: int) -> Iterator[Log]:
    yield lambda record: print(f"step {record['step']}/{steps}  {_line(record)}", flush=True, file=sys.stdout)


@contextmanager
def _tensorboard(run: Run, steps: int, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.stage("train") / "tensorboard"), purge_step=done + 1) as writer:

        def write(record: dict[str, Any]) -> None:
            for name in ("loss", "lr", "gradient_norm", "tokens_per_s", "memory_bytes", "validation_loss"):
                if name in record:
                    writer.add_scalar(f"train/{name}", record[name], record["step"])

        yield write


LOGGERS = {"rich": _rich, "stdout": _stdout, "tensorboard": _tensorboard}


def _line(record: dict[str, Any]) -> str:
    watched = f"  validation {record['validation_loss']:.4f}" if "validation_loss" in record else ""
    speed, memory = f"{record['tokens_per_s']:.0f} tokens/s", f"{record['memory_bytes'] / 1e9:.2f} GB"
    return f"loss {record['loss']:.4f}{watched}  lr {record['lr']:.2e}  {speed}  {memory}"


@contextmanager
def loggers(names: tuple[str, ...], run: Run, steps: int, done: int) -> Iterator[Log]:
    """One function that tells them all. Lines of metrics.jsonl after step `done` are of an interrupted run that is done again, and go."""
    _cut_metrics(run.metrics, done)
    with ExitStack() as stack:
        logs = [stack.enter_context(LOGGERS[name](run, steps, done)) for name in names]
        file = stack.enter_context(run.metrics.open("a", encoding="utf-8"))

        def tell(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            for log in logs:
                log(record)

        yield tell


def _cut_metrics(path: Path, done: int) -> None:
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= done]
    write_whole(path, "".join(line + "\n" for line in lines))


def memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the device where it is a GPU, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", 0) or _peak_resident() or info.rss


def _peak_resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
