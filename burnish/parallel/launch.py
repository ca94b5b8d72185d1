"""Starting ranks on this machine through torch's elastic launcher: what `torchrun` does, from inside burnish."""

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from burnish.errors import UserError

USER_ERROR = "burnish.UserError: "


class RankDied(Exception):
    """A rank was ended by a signal, and could say nothing."""

    def __init__(self, rank: int, ranks: int, number: int):
        super().__init__(f"rank {rank} of {ranks} was ended by signal {number}")
        self.rank, self.ranks, self.number = rank, ranks, number


def launch(work: Callable[..., Any], arguments: tuple[Any, ...], ranks: int) -> dict[int, Any]:
    """Runs `work(*arguments)` on `ranks` processes of this machine, waits for all of them, and returns what each returned.

    A `UserError` of a rank comes back as one, with its message; a rank that a signal ended is a `RankDied`; another failure is raised with
    the rank's traceback. SIGINT and SIGTERM are passed on and waited for: the ranks decide together when to stop, after a save.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # the launcher's own answer to the others kills ranks that are still saving
    )
    stopped: list[int] = []
    try:
        with _passed_on(stopped):
            return elastic_launch(config, _work)(work, arguments)
    except ChildFailedError as failure:
        first = failure.get_first_failure()[1]
        told: Any = first.message  # a rank's own file is nested
        message = str(told["message"] if isinstance(told, dict) else told)
        if USER_ERROR in message:
            raise UserError(message.partition(USER_ERROR)[2].strip()) from None
        if stopped:  # before a rank could promise to save
            raise KeyboardInterrupt from None
        if first.exitcode < 0:
            raise RankDied(first.local_rank, ranks, -first.exitcode) from None
        raise


@record
def _work(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return work(*arguments)
    except UserError as problem:
        raise RuntimeError(f"{USER_ERROR}{problem}") from None


@contextmanager
def _passed_on(came: list[int]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for child in psutil.Process().children():
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
