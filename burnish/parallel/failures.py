"""Which errors mean that a rank lost the others. What became of them is told by whoever ended first."""

import re
import time

from torch.distributed import DistError

GRACE_SECONDS = 20.0
"""How long a rank that lost the others waits before it ends, so that the launcher sees the one first that is the cause."""
_LOST = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|socket (closed|timeout)|"
    r"nccl (error|communicator was aborted)|nccl(unhandledcuda|system|remote|internal)error|"
    r"timed out waiting \d+ ?ms|(gloo|watchdog|barrier).*(timeout|timed out)",
    re.IGNORECASE,
)
"""Words of gloo, of NCCL and of torch's stores. gloo raises plain RuntimeErrors."""


def lost_the_others(problem: BaseException) -> bool:
    """Whether the error is of the connection between ranks, and so most often an echo of another rank's."""
    return isinstance(problem, DistError) or (isinstance(problem, (RuntimeError, OSError)) and _LOST.search(str(problem)) is not None)


def let_the_cause_be_seen() -> None:
    """Waits until whoever ended first has been noticed; the launcher then ends this process too."""
    time.sleep(GRACE_SECONDS)
