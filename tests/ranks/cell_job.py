"""One cell of the table of what is proven: trained, saved, and continued from a save in mid-epoch. Run on ranks, and in this process."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from burnish.config import TrainConfig
from burnish.data.batches import Batches
from burnish.data.tokens import open_tokens
from burnish.model.network import packed
from burnish.parallel.rows import local_rows, whole
from burnish.parallel.world import World, alone, barrier, world
from burnish.runs import Run
from burnish.skeleton import Built
from burnish.train.run import train
from burnish.train.start import check_start
from burnish.train.validate import validation_loss
from tests.ranks.cells import Cell
from tests.tiny import a_plan, built_from

ROWS_PER_STEP, STEPS, SAVED, CONTEXT = 5, 4, 2, 64
"""Contexts in a step: no number of ranks divides them, so some rank has a forward pass without rows. The save is in the first epoch, and
its end is inside the third step."""


@dataclass(frozen=True)
class Found:
    """What one rank saw of a run. Tensors are whole ones, and none of the resumed run: its last save is compared instead."""

    records: list[dict[str, float]]
    """Of each step, from metrics.jsonl: loss, gradient norm, tokens … without what the clock says."""
    before: float
    """The loss on some of the trained rows before the first step."""
    after: float
    weights: dict[str, Tensor]
    frozen: dict[str, Tensor]
    """Tensors of the quantized layers."""
    moved: set[str]
    """Parameters and buffers of which this rank's part is not, bit for bit, what it was."""


def run_cell(folder: str, cell: Cell) -> tuple[Found, Found]:
    """The straight run in `folder/runs/CELL/straight`, and one in `resumed` that continues from its save after `SAVED` steps.

    That run finds what a process leaves that is killed after the save: the files up to there, and nothing in memory.
    """
    runs = Path(folder) / "runs" / cell.name
    with world("cpu", cell.ranks) if cell.ranks > 1 else nullcontext(alone("cpu")) as here:
        straight = _run(Path(folder), cell, runs / "straight", here)
        if here.is_main:
            shutil.copytree(runs / "straight", runs / "resumed")
            for saved in saves(runs / "resumed")[SAVED // 2 + 1 :]:
                shutil.rmtree(saved)
        barrier()
        return straight, _run(Path(folder), cell, runs / "resumed", here, whole_ones=False)


def saves(run: Path) -> list[Path]:
    return sorted((run / "3-train" / "checkpoints").iterdir())


def _run(root: Path, cell: Cell, folder: Path, here: World, whole_ones: bool = True) -> Found:
    model, adapt, _ = cell.sections()
    accumulation = -(-ROWS_PER_STEP // cell.ranks)
    plan = a_plan(
        ranks=cell.ranks,
        strategy=cell.strategy,
        shard_ranks=cell.shard_ranks,
        dtype="fp64",
        accumulation=accumulation,
        checkpointing=cell.checkpointing,
    )
    config = TrainConfig(rows_per_step=ROWS_PER_STEP, steps=STEPS, lr=1e-2, checkpoint_every=SAVED, keep=STEPS, log=())
    built = built_from(root / model.path, {"format": cell.format, "block": model.block}, vars(adapt), plan, here)
    tokens = open_tokens(root / "tokens")
    batches = Batches(tokens, CONTEXT, ROWS_PER_STEP, cell.ranks, here.rank, 1, accumulation, seed=0)
    watched = open_tokens(root / "watched")
    with packed(built.model):
        before = validation_loss(built, watched, CONTEXT, here)
    check_start(built, batches, here)  # as `finetune` does, which trains right after it
    held, losses = _tensors(built), []

    def measure() -> float:
        losses.append(validation_loss(built, watched, CONTEXT, here))
        return losses[-1]

    folder.mkdir(parents=True, exist_ok=True)
    train(built, batches, config, Run(folder), here, validate=measure)
    barrier()  # the main rank writes the metrics that all of them read
    return Found(
        [_without_time(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        before,
        losses[-1],
        {name: whole(parameter).detach().clone() for name, parameter in built.adapters.trainable().items() if whole_ones},
        {
            f"{name}.{part}": whole(getattr(layer, part)).clone()
            for name, layer in built.linears.items()
            for part in layer.names
            if whole_ones
        },
        {name for name, now in _tensors(built).items() if not torch.equal(_bytes(now), _bytes(held[name]))},
    )


def _without_time(record: dict[str, float]) -> dict[str, float]:
    return {
        name: value for name, value in record.items() if not name.endswith("_per_s") and name not in ("seconds", "memory_bytes", "time")
    }


def _tensors(built: Built) -> dict[str, Tensor]:
    """A copy of what this rank holds of every parameter and buffer."""
    named = {**dict(built.model.named_parameters()), **dict(built.model.named_buffers())}
    return {name: local_rows(tensor).clone() for name, tensor in named.items()}


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
