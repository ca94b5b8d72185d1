"""Real steps of models whose shapes are tiny: what is really held, and what is alive at most, on this process or on ranks."""

from dataclasses import dataclass, field
from typing import Any

import torch

from burnish.config import Plan, RunConfig, TrainConfig
from burnish.data.batches import Step
from burnish.model.network import packed, renew_buffers
from burnish.parallel.rows import here
from burnish.parallel.shard import replicate
from burnish.parallel.world import World, world
from burnish.plan.live import Live
from burnish.plan.trace import worst_batch
from burnish.skeleton import Built, skeleton
from burnish.toml import parse_config
from burnish.train import optimizer
from burnish.train.step import take_step
from tests.tiny import FAMILIES, ONE, SIZES, a_plan, asked

LAYERS, CONTEXT = 6, 64


@dataclass(frozen=True)
class Cell:
    """One plan of one model."""

    method: str = "dora"
    format: str = "nf4"
    checkpointing: bool = False
    ranks: int = 1
    strategy: str = "single"
    shard_ranks: int = 0
    accumulation: int = 1
    family: str = "llama"
    dtype: str = "fp32"
    every: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of it beside the format."""
    adapt: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        names = ("checkpointing", "ranks", "strategy", "shard_ranks", "accumulation", "dtype")
        return a_plan(**{name: getattr(self, name) for name in names}, checkpoint_every=self.every)

    @property
    def net(self) -> Any:
        return FAMILIES[self.family](**(SIZES | {"num_hidden_layers": LAYERS} | self.sizes))

    @property
    def config(self) -> RunConfig:
        adapt = {"method": self.method, "rank": 8} | ({"new_blocks": 2} if self.method == "expand" else {}) | self.adapt
        model = asked("tiny", {"format": self.format})
        sections = {"format": model.format, "bits": model.bits, "double_quantized": model.double_quantized, "path": "tiny", "cache": False}
        sections |= self.model
        return parse_config({"name": "x", "model": sections, "adapt": adapt, "data": {"context": CONTEXT}})


def zeroed(cell: Cell, world: World = ONE, plan: Plan | None = None) -> Built:
    """The model with real tensors in it, all zero: as many bytes as any others, and a finite loss."""
    config = cell.config
    built = skeleton(cell.net, config.model, config.adapt, plan or cell.plan, world)
    built.model.to_empty(device="cpu")
    if not cell.plan.sharded:
        built.model.tie_weights()
    with torch.no_grad():
        for parameter in built.model.parameters():
            here(parameter).zero_()
    renew_buffers(built.model)
    return built


@dataclass(frozen=True)
class Real:
    """Bytes on one rank."""

    held: int
    """Parameters, buffers and the optimizer's state."""
    peaks: tuple[int, ...]
    """The most beside them in each of two steps, from the first pass to the update."""

    @property
    def total(self) -> int:
        return self.held + max(self.peaks)

    @property
    def least(self) -> int:
        """Of the steps the one that needed less: gloo's threads let go of a gathered layer now and then only when the next is there."""
        return self.held + min(self.peaks)


def real(cell: Cell, world: World = ONE) -> Real:
    """Two whole steps through the training loop's own `take_step`."""
    built = zeroed(cell, world)
    trainable = built.adapters.trainable()
    update = optimizer.build(trainable, TrainConfig())
    replicas = replicate(built.model, world) if cell.strategy == "ddp" else None
    state = [tensor for entry in update.state.values() for tensor in entry.values()]
    known = [*built.model.parameters(), *built.model.buffers(), *state]
    batch = worst_batch(CONTEXT, 1)
    step = Step((batch,) * cell.accumulation, len(batch.targets) * cell.accumulation * cell.ranks, 1)
    live, peaks = Live(known), []
    built.model.train()
    with packed(built.model), live:
        for _ in range(2):
            live.begin()
            take_step(built, replicas, step, update, 1.0, world, str)
            peaks.append(live.peak)
    sizes = {here(tensor).untyped_storage().data_ptr(): here(tensor).untyped_storage().nbytes() for tensor in known}
    return Real(sum(sizes.values()), tuple(peaks))


def real_on_ranks(cells: tuple[Cell, ...]) -> list[Real]:
    """The same of each cell, on as many ranks as all of them say. Runs in a worker of the pool."""
    with world("cpu", cells[0].ranks) as mine:
        return [real(cell, mine) for cell in cells]
