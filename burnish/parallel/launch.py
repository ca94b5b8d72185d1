"""Starting ranks on this machine through torch's elastic launcher: what `torchrun` does, from inside burnish."""

import os
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from burnish.errors import UserError


def launch(work: Callable[..., Any], arguments: tuple[Any, ...], ranks: int) -> None:
    """Runs `work(*arguments)` on `ranks` processes of this machine and waits for all of them.

    A `UserError` of a rank comes back as one, with its message; another failure is raised with the rank's traceback.
    """
    threads = max(1, (os.cpu_count() or 1) // ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, _worker)(work, arguments)
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        message = first.message if isinstance(first.message, str) else first.message.get("message", "")
        if USER_ERROR in message:
            raise UserError(message.partition(USER_ERROR)[2].strip()) from None
        raise


USER_ERROR = "burnish.UserError:"


def _worker(work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
    except UserError as problem:
        raise SystemExit(f"{USER_ERROR} {problem}") from problem
