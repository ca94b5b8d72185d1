"""The loop: batches → steps → checkpoints. Continues where an interrupted run stopped, bit for bit."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from burnish.config import TrainConfig
from burnish.data.batches import Batches
from burnish.errors import UserError
from burnish.model.network import packed
from burnish.parallel.shard import replicate
from burnish.parallel.world import World, any_rank
from burnish.runs import Run
from burnish.skeleton import Built
from burnish.train import checkpoint, optimizer, scaler
from burnish.train.checkpoint import State
from burnish.train.progress import Log, loggers, memory_bytes
from burnish.train.schedule import rate
from burnish.train.step import take_step
from burnish.train.watch import watched

log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, or stopped by a signal after a checkpoint."""

    steps_done: int
    steps: int
    interrupted: bool


def train(
    built: Built,
    batches: Batches,
    config: TrainConfig,
    run: Run,
    world: World,
    describe: Callable[[tuple[int, ...]], str] = str,
    validate: Callable[[], float] | None = None,
) -> Outcome:
    """Trains from the newest checkpoint, or from the start, to the last step. Every rank calls it.

    `describe` turns sample numbers into the rows' files and lines, for messages. `validate` gives the loss on rows that are not trained; it
    is called every `config.validate_every` steps and after the last one, on every rank.
    """
    checkpoints = run.stage("train") / "checkpoints"
    contexts = config.steps * config.rows_per_step if config.steps else batches.total_contexts(config.epochs)
    steps = math.ceil(contexts / config.rows_per_step)
    if not steps:
        raise UserError("train.epochs is so small that no context would be trained. Raise it, or set train.steps.")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.manual_seed(config.seed * 1_000_003 + world.rank)  # dropout: other masks on other ranks
    trainable = built.adapters.trainable()
    update = optimizer.build(trainable, config)
    state = _begin(checkpoints, trainable, update, config, world, built)
    scaling = scaler.begin(built.products, state.scale, state.since_scaled)
    replicas = replicate(built.model, world) if built.plan.strategy == "ddp" and world.size > 1 else None
    built.model.train()
    with (
        packed(built.model),
        watched(config, run, world, steps - state.steps_done) as watched_step,
        loggers_of_main(config, run, steps, state, world) as tell,
        stop_signals() as stopped,
    ):
        while state.steps_done < steps:
            started = time.perf_counter()
            step = batches.step(state.position, contexts)
            step_rate = rate(state.steps_done, steps, config)
            optimizer.set_rate(update, step_rate)
            done = take_step(built, replicas, step, update, config.clip, world, describe, scaling)
            watched_step()
            seconds = time.perf_counter() - started
            state = State(
                state.steps_done + 1,
                min(state.position + config.rows_per_step, contexts),
                state.supervised_tokens + step.supervised,
                state.seconds + seconds,
                state.skipped + done.skipped,
                scaling.scale,
                scaling.since,
            )
            due = state.steps_done == steps or (config.validate_every and state.steps_done % config.validate_every == 0)
            validated = {"validation_loss": validate()} if validate is not None and due else {}
            tell(
                {
                    "step": state.steps_done,
                    "steps": steps,
                    "epoch": batches.locate(state.position - 1)[0],
                    "loss": done.loss,
                    "lr": step_rate,
                    "gradient_norm": None if done.skipped else done.gradient_norm,
                    "tokens": step.tokens,
                    "supervised": step.supervised,
                    "tokens_per_s": step.tokens / seconds,
                    "supervised_per_s": step.supervised / seconds,
                    "seconds": seconds,
                    "memory_bytes": memory_bytes(world.device),
                }
                | ({"loss_scale": scaling.scale, "skipped": state.skipped} if scaling.on else {})
                | validated
            )
            stop = any_rank(stopped(), world.device)
            if stop or state.steps_done == steps or state.steps_done % config.checkpoint_every == 0:
                checkpoint.save(checkpoints, state, trainable, update, config, world)
            if stop and state.steps_done < steps:
                return Outcome(state.steps_done, steps, interrupted=True)
    built.model.eval()
    return Outcome(state.steps_done, steps, interrupted=False)


def _begin(
    checkpoints: Path,
    trainable: dict[str, torch.nn.Parameter],
    update: torch.optim.Optimizer,
    config: TrainConfig,
    world: World,
    built: Built,
) -> State:
    """The newest checkpoint's state, loaded; or a first save at step 0, read back, so that no run fails at its end for want of a disk."""
    path = checkpoint.newest(checkpoints)
    if path is None:
        state = State(steps_done=0, position=0, scale=scaler.START)
        path = checkpoint.save(checkpoints, state, trainable, update, config, world)
        checkpoint.load(path, trainable, update, world)
        return state
    state = checkpoint.load(path, trainable, update, world)
    built.adapters.switch.advance()
    if world.is_main and state.steps_done:
        log.info("continuing after step %d (%s)", state.steps_done, path)
    return state


@contextmanager
def loggers_of_main(config: TrainConfig, run: Run, steps: int, state: State, world: World) -> Iterator[Log]:
    """One rank speaks."""
    if not world.is_main:
        yield lambda record: None
        return
    with loggers(config, run, steps, state.steps_done) as tell:
        yield tell


@contextmanager
def stop_signals() -> Iterator:
    """A function that says whether SIGINT or SIGTERM came: the step is finished and saved. A second SIGINT interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT and came.count(signal.SIGINT):
            raise KeyboardInterrupt
        came.append(number)
        log.warning("finishing this step, then saving (Ctrl-C again to stop without saving)")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread (a test's worker, a notebook): whoever called us handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
