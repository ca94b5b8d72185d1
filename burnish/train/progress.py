"""Where progress is shown. metrics.jsonl is always written; each row of `LOGGERS` is one more place."""

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from burnish.config import TrainConfig, canonical
from burnish.errors import UserError
from burnish.runs import Run, write_whole
from burnish.words import now_and_then

Log = Callable[[dict[str, Any]], None]
"""Takes one step's record: step, steps, epoch, loss, lr, gradient_norm (None where the step was skipped), tokens_per_s, supervised_per_s,
memory_bytes, seconds; in fp16 loss_scale and skipped too."""
SHOWN = ("validation_loss", "loss", "lr", "gradient_norm", "tokens_per_s", "memory_bytes", "loss_scale", "skipped")
"""What is drawn over the steps."""


@contextmanager
def _rich(run: Run, config: TrainConfig, steps: int, done: int) -> Iterator[Log]:
    console = Console(stderr=True)
    if not console.is_terminal:  # a bar in a file would be one line at the end
        say = now_and_then(lambda text: print(text, file=sys.stderr, flush=True))
        yield lambda record: say(f"train: step {record['step']} of {steps}  {_line(record)}")
        return
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=steps, completed=done, note="")
        yield lambda record: bar.update(task, completed=record["step"], note=_line(record))


@contextmanager
def _stdout(run: Run, config: TrainConfig, steps: int, done: int) -> Iterator[Log]:
    yield lambda record: print(f"step {record['step']}/{steps}  {_line(record)}", flush=True, file=sys.stdout)


@contextmanager
def _tensorboard(run: Run, config: TrainConfig, steps: int, done: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.stage("train") / "tensorboard"), purge_step=done + 1) as writer:

        def write(record: dict[str, Any]) -> None:
            for name, value in _shown(record).items():
                writer.add_scalar(f"train/{name}", value, record["step"])

        yield write


@contextmanager
def _tqdm(run: Run, config: TrainConfig, steps: int, done: int) -> Iterator[Log]:
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, desc="train", unit="step") as bar:

        def write(record: dict[str, Any]) -> None:
            bar.set_postfix_str(_line(record), refresh=False)
            bar.update(record["step"] - bar.n)

        yield write


@contextmanager
def _wandb(run: Run, config: TrainConfig, steps: int, done: int) -> Iterator[Log]:
    check_installed(("wandb",))
    import wandb

    folder = run.stage("train")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "wandb-id").exists():  # a run that is continued goes on in the same curve, one that is trained anew does not
        write_whole(folder / "wandb-id", uuid.uuid4().hex)
    session = wandb.init(
        project=config.wandb_project,
        name=run.folder.resolve().name,
        id=(folder / "wandb-id").read_text(),
        dir=str(folder),
        config=canonical(config),
        resume="allow",
    )
    try:
        yield lambda record: session.log({f"train/{key}": value for key, value in _shown(record).items()}, step=record["step"])
    finally:
        session.finish()


@contextmanager
def _none(run: Run, config: TrainConfig, steps: int, done: int) -> Iterator[Log]:
    yield lambda record: None


LOGGERS = {"rich": _rich, "stdout": _stdout, "tqdm": _tqdm, "tensorboard": _tensorboard, "wandb": _wandb, "none": _none}


def check_installed(names: tuple[str, ...]) -> None:
    """Raises a `UserError` where a place that was asked for needs a package that is not there."""
    if "wandb" in names and find_spec("wandb") is None:
        raise UserError(
            "train.log names wandb, which is not installed. Install it (pip install burnish[wandb]), or take it out of train.log."
        )


def _shown(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[name] for name in SHOWN if record.get(name) is not None}


def _line(record: dict[str, Any]) -> str:
    skipped = f"  {record['skipped']} skipped, loss × {record['loss_scale']:g}" if record.get("skipped") else ""
    watched = f"  validation {record['validation_loss']:.4f}" if "validation_loss" in record else ""
    return (
        f"loss {record['loss']:.4f}{watched}  lr {record['lr']:.2e}  {record['tokens_per_s']:.0f} tokens/s  "
        f"{record['memory_bytes'] / 1e9:.2f} GB{skipped}"
    )


@contextmanager
def loggers(config: TrainConfig, run: Run, steps: int, done: int) -> Iterator[Log]:
    """One function that tells them all. Lines of metrics.jsonl after step `done` are of an interrupted run that is done again, and go."""
    _cut_metrics(run.metrics, done)
    with ExitStack() as stack:
        logs = [stack.enter_context(LOGGERS[name](run, config, steps, done)) for name in config.log]
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
